-- Accuracy of the model's own answers, without a probe
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): its datasets, as questions to the model
--
-- One row per model and dataset, over all prompts: the accuracy of the more probable of the two answers, with its 95 %
-- Wilson interval, and the accuracy for label 1 and label 0. answered_percent is the mean probability of both answers
-- together: if it is small, the model would say something else. auc is the area under the ROC curve of the difference
-- of both probabilities: it needs no threshold, so it also serves a model that prefers one answer. best_probe_accuracy
-- is that of the best layer.
--
-- A dataset of your own has rows only if it was measured with `kdb ingest --ask QUESTION --answers NO,YES`.
--
-- Parameters:
--   model
--   dataset texts
--   site        text = resid_post  site of the probe to compare with: resid_post or ffn_norm
--   classifier  text = default     classifier of the probe to compare with
--   split       text = default     split of the probe to compare with
--   variant
--   run
WITH ranked AS (
    SELECT
        *, predicted = correct::INTEGER AS positive_label,
        rank() OVER (PARTITION BY model, dataset, run ORDER BY prob_positive - prob_negative)
        + (count(*) OVER (PARTITION BY model, dataset, run, prob_positive - prob_negative) - 1) / 2 AS mean_rank
    FROM zero_shot
    JOIN chosen_runs('zero_shot', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE among(model, getvariable('model')) AND among(dataset, getvariable('dataset'))
),

answers AS (
    SELECT
        model, dataset, run, variant,
        min(positive) AS positive, min(negative) AS negative,
        avg(correct::INTEGER) AS accuracy,
        avg(correct::INTEGER) FILTER (positive_label) AS true_positive_rate,
        avg(correct::INTEGER) FILTER (NOT positive_label) AS true_negative_rate,
        count(*) FILTER (positive_label) AS n_positive,
        (sum(mean_rank) FILTER (positive_label) - n_positive * (n_positive + 1) / 2)
        / nullif(n_positive * (count(*) - n_positive), 0) AS auc,
        100 * mean_over(sum(prob_positive + prob_negative), count(*)) AS answered_percent,
        count(*) AS n_prompts
    FROM ranked
    GROUP BY ALL
),

probes AS (
    SELECT model, dataset, variant, max(accuracy) AS best_probe_accuracy
    FROM probe_scores
    JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
    JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE site = getvariable('site')
    GROUP BY ALL
)

SELECT
    model, dataset, negative, positive, accuracy,
    wilson_low(accuracy, n_prompts) AS accuracy_low, wilson_high(accuracy, n_prompts) AS accuracy_high,
    auc, true_positive_rate, true_negative_rate, answered_percent, n_prompts, best_probe_accuracy
FROM answers
LEFT JOIN probes USING (model, dataset, variant)
ORDER BY model, dataset, variant;
