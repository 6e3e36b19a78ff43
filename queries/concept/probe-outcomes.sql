-- Correct and wrong predictions of the probe for test prompts, layer by layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the predictions z behind the accuracy
--
-- One row per model, dataset, run and layer. outcomes has a character for each test prompt, in the order of prompt_id:
-- 1 if the probe is right, 0 if it is wrong. With it, layers, or two runs on the same prompts, can be compared prompt
-- by prompt and resampled.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant
--   run
SELECT
    model, dataset, run, layer, n_layers, string_agg(correct::TINYINT, '' ORDER BY prompt_id) AS outcomes
FROM probe_predictions
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
JOIN (SELECT model, dataset, run, n_layers FROM known_runs) USING (model, dataset, run)
JOIN chosen_runs('probe_predictions', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
GROUP BY ALL
ORDER BY model, dataset, run, layer;
