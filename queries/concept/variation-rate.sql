-- Change of accuracy from one layer to the next
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the variation rate β
--
-- One row per model, dataset and layer: β is the layer's accuracy divided by that of the layer before. It is NULL at
-- layer 0.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant
--   run
SELECT model, dataset, site, layer, 100 * depth AS depth_percent, accuracy, variation_rate
FROM _rates_of_all()
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
ORDER BY model, dataset, layer;
