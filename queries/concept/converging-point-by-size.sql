-- Jump and converging point of models of growing size
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 3, sizes within one family
--
-- One row per dataset, family and model, smallest first: jump point and converging point in percent of depth.
--
-- Parameters:
--   model       texts = all        names of models, shown side by side
--   dataset     texts = all        names of datasets
--   site        text = resid_post  where the hidden state is read: resid_post or ffn_norm
--   classifier  text = logistic    classifier: logistic, logistic-paper or random-forest
--   split       text = paper       split: paper, stratified-SEED or grouped
--   variant     text = default     variant of the runs (`kdb runs`); the newest ones are used
--   run         text = all         id of a single run to use, of any variant
SELECT
    dataset, family, round(n_params / 1e9, 3) AS size_billions, model,
    100 * converging_point AS converging_percent,
    100 * jump_point AS jump_percent
FROM _depths_of_all()
JOIN models USING (model, dataset, run)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
ORDER BY dataset, family, n_params, model;
