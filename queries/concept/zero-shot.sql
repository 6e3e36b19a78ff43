-- What the model itself answers, without a probe
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): its datasets, asked instead of probed
--
-- One row per model and dataset, over all prompts: how often the likelier of the two answers is right, with its 95 %
-- Wilson interval, and how often where label 1 or label 0 is right. answered_percent is the mean probability of either
-- answer: where it is small, the model was about to say something else. best_probe_accuracy is that of the best layer.
--
-- Parameters:
--   model
--   dataset texts
--   site        text = resid_post  of the probe beside it: resid_post or ffn_norm
--   classifier  text = logistic    of the probe beside it
--   split       text = paper       of the probe beside it
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
    JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE site = getvariable('site') AND classifier = getvariable('classifier') AND split = getvariable('split')
    GROUP BY ALL
)

SELECT
    model, dataset, negative, positive, accuracy,
    wilson_low(accuracy, n_prompts) AS accuracy_low, wilson_high(accuracy, n_prompts) AS accuracy_high,
    true_positive_rate, true_negative_rate, answered_percent, n_prompts, best_probe_accuracy
FROM answers
LEFT JOIN probes USING (model, dataset, variant)
ORDER BY model, dataset, variant;
