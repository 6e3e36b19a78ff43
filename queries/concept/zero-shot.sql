-- Accuracy of the model's own answers, without a probe
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): its datasets, as questions to the model
--
-- One row per model and dataset, over all prompts: the accuracy of the more probable of the two answers, with its 95 %
-- Wilson interval, and the accuracy for label 1 and label 0. answered_percent is the mean probability of both answers
-- together: if it is small, the model would say something else. best_probe_accuracy is that of the best layer.
--
-- Parameters:
--   model
--   dataset texts
--   site        text = resid_post  site of the probe to compare with: resid_post or ffn_norm
--   classifier  text = default     classifier of the probe to compare with
--   split       text = default     split of the probe to compare with
--   variant
--   run
WITH answers AS (
    SELECT
        model, dataset, run, variant,
        min(positive) AS positive, min(negative) AS negative,
        avg(correct::INTEGER) AS accuracy,
        avg(correct::INTEGER) FILTER (predicted = correct::INTEGER) AS true_positive_rate,
        avg(correct::INTEGER) FILTER (predicted != correct::INTEGER) AS true_negative_rate,
        100 * mean_over(sum(prob_positive + prob_negative), count(*)) AS answered_percent,
        count(*) AS n_prompts
    FROM zero_shot
    JOIN chosen_runs('zero_shot', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE among(model, getvariable('model')) AND among(dataset, getvariable('dataset'))
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
    true_positive_rate, true_negative_rate, answered_percent, n_prompts, best_probe_accuracy
FROM answers
LEFT JOIN probes USING (model, dataset, variant)
ORDER BY model, dataset, variant;
