-- Depth at which models of growing size know a concept
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 3, sizes within one family
--
-- One row per dataset, family and model, smallest first: the best layer, depth_90, jump and converging point in percent
-- of depth, beside the accuracies of n_test prompts of the best layer and of the best baseline, and the area between. J
-- and C are the paper's, of its objective and split (logistic-raw, paper) unless a classifier or split is given. By
-- chance alone, most flat curves of 100 test prompts have a J, and on real ones C is nearly always one of the last two
-- layers.
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
    dataset, family, round(n_params / 1e9, 3) AS size_billions, model,
    n_test, 100 * best_layer / n_layers::DOUBLE AS best_percent, best_accuracy, baseline_accuracy, area,
    100 * depth_90_layer / n_layers::DOUBLE AS depth_90_percent, converging_percent, jump_percent
FROM _measures_of_all()
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
LEFT JOIN paper_points(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, site)
JOIN models USING (model, dataset, run)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
ORDER BY dataset, family, n_params, model;
