-- Concepts that a model knows early, and late
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 1, datasets within one model
--
-- One row per model and dataset, best accuracy first. accuracy_at_50_percent is the accuracy of the layer half way from
-- the first to the last, and so on. best_layer is the first layer that reaches best_accuracy. depth_90, J and C are in
-- percent of depth; depth_90 is that of concept-depth. J and C are the paper's, of its objective and split (logistic-
-- raw, paper) unless a classifier or split is given. By chance alone, most flat curves of 100 test prompts have a J,
-- and on real ones C is nearly always one of the last two layers.
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
    model, dataset, n_layers, measures.n_test,
    max(accuracy) FILTER (layer = 0) AS accuracy_at_0_percent,
    max(accuracy) FILTER (layer = round(0.25 * (n_layers - 1))) AS accuracy_at_25_percent,
    max(accuracy) FILTER (layer = round(0.5 * (n_layers - 1))) AS accuracy_at_50_percent,
    max(accuracy) FILTER (layer = round(0.75 * (n_layers - 1))) AS accuracy_at_75_percent,
    max(accuracy) FILTER (layer = n_layers - 1) AS accuracy_at_100_percent,
    best_accuracy, best_layer, baseline, baseline_accuracy,
    100 * depth_90_layer / n_layers::DOUBLE AS depth_90_percent, jump_percent, converging_percent
FROM probe_scores
JOIN _measures_of_all() AS measures USING (model, dataset, run, site, classifier, split)
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
LEFT JOIN paper_points(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, site)
JOIN (SELECT model, dataset, run, n_layers FROM known_runs) USING (model, dataset, run)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
GROUP BY ALL
ORDER BY model, best_accuracy DESC, dataset;
