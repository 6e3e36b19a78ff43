-- Concepts that a model knows early, and late
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 1, datasets within one model
--
-- One row per model and dataset, best accuracy first. accuracy_at_50_percent is the accuracy of the layer half way from
-- the first to the last, and so on. best_layer is the first layer that reaches best_accuracy. J and C are in percent of
-- depth.
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
    model, dataset, depths.n_layers,
    max(accuracy) FILTER (layer = 0) AS accuracy_at_0_percent,
    max(accuracy) FILTER (layer = round(0.25 * (n_layers - 1))) AS accuracy_at_25_percent,
    max(accuracy) FILTER (layer = round(0.5 * (n_layers - 1))) AS accuracy_at_50_percent,
    max(accuracy) FILTER (layer = round(0.75 * (n_layers - 1))) AS accuracy_at_75_percent,
    max(accuracy) FILTER (layer = n_layers - 1) AS accuracy_at_100_percent,
    max(accuracy) AS best_accuracy,
    arg_max(layer, (accuracy, -layer)) AS best_layer,
    100 * jump_point AS jump_percent,
    100 * converging_point AS converging_percent
FROM probe_scores
JOIN _depths_of_all() AS depths USING (model, dataset, run, site, classifier, split)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
GROUP BY model, dataset, n_layers, jump_point, converging_point
ORDER BY model, best_accuracy DESC, dataset;
