-- Predictions of the probe for every test prompt, at every layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the predictions z behind the accuracy
--
-- One row per model, dataset, layer and test prompt, unordered.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant
--   run
SELECT model, dataset, run, layer, n_layers, prompt_id, predicted, correct
FROM probe_predictions
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
JOIN (SELECT model, dataset, run, n_layers FROM known_runs) USING (model, dataset, run)
JOIN chosen_runs('probe_predictions', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site');
