-- Accuracy of the probe at every layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the curves of experiments 1 to 3
--
-- One row per model, dataset and layer. The interval is Wilson's, at 95 %, over the test prompts.
--
-- Parameters:
--   model       text = all         one model
--   dataset     text = all         one dataset
--   site        text = resid_post  where the hidden state is read: resid_post or ffn_norm
--   classifier  text = logistic    logistic, logistic-paper or random-forest
--   split       text = paper       paper, stratified-SEED or grouped
--   variant     text = default     newest runs of this variant; `kdb runs` lists them
--   run         text = all         this run alone, whatever its variant
SELECT
    model, dataset, site, layer, 100 * depth AS depth_percent,
    accuracy, accuracy_low, accuracy_high, f1, auc, converged, n_test
FROM probe_scores
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE (getvariable('model') IS NULL OR model = getvariable('model'))
    AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
ORDER BY model, dataset, layer;
