-- Accuracy of the probe at every layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the curves of experiments 1 to 3
--
-- One row per model, dataset, variant and layer. The interval is the 95 % Wilson interval over the test prompts.
-- control_accuracy is the accuracy of the same probe on one random label for each group; NULL unless groups are on both
-- sides of the split. selectivity is accuracy minus control_accuracy. baseline is the best one on the same split. best
-- and depth_90 mark the layers of concept-depth, jump and converging those of J and C. J and C are the paper's, of its
-- objective and split (logistic-raw, paper) unless a classifier or split is given. By chance alone, most flat curves of
-- 100 test prompts have a J, and on real ones C is nearly always one of the last two layers.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant     text = default|all  variant of the runs (`kdb runs`), or all; the newest ones are used
--   run
SELECT
    model, dataset, site, layer, 100 * depth AS depth_percent,
    accuracy, accuracy_low, accuracy_high, balanced_accuracy, f1, auc, auc_low, auc_high, converged,
    probe_scores.n_test, baseline, baseline_accuracy,
    control_accuracy, selectivity,
    layer = best_layer AS best,
    coalesce(layer = depth_90_layer, false) AS depth_90,
    coalesce(layer = jump_layer, false) AS jump,
    coalesce(layer = converging_layer, false) AS converging,
    classifier, split, variant, run, n_layers, family, round(n_params / 1e9, 3) AS size_billions
FROM probe_scores
JOIN _measures_of_all() AS measures USING (model, dataset, run, site, classifier, split)
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
LEFT JOIN paper_points(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, site)
JOIN models USING (model, dataset, run)
JOIN chosen_runs('probe_scores', nullif(getvariable('variant'), 'all'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
ORDER BY model, dataset, variant, layer;
