-- Accuracy of the probe at every layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the curves of experiments 1 to 3
--
-- One row per model, dataset, variant and layer. The interval is the 95 % Wilson interval over the test prompts.
-- control_accuracy is the accuracy of the same probe on shuffled labels; selectivity is accuracy minus
-- control_accuracy. jump and converging mark the layers of J and C.
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
    accuracy, accuracy_low, accuracy_high, f1, auc, converged, n_test,
    control_accuracy, selectivity,
    coalesce(layer = jump_layer, false) AS jump,
    coalesce(layer = converging_layer, false) AS converging,
    variant, n_layers, family, round(n_params / 1e9, 3) AS size_billions
FROM probe_scores
JOIN (FROM _depths_of_all() SELECT * EXCLUDE (n_layers)) USING (model, dataset, run, site, classifier, split)
JOIN models USING (model, dataset, run)
JOIN chosen_runs('probe_scores', nullif(getvariable('variant'), 'all'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
ORDER BY model, dataset, variant, layer;
