-- Jump and converging point of models of growing size
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 3, sizes within one family
--
-- One row per dataset, family and model, smallest first: jump point and converging point in percent of depth.
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
