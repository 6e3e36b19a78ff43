-- Model families compared at one size
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 2, families at one size
--
-- One row per dataset and model whose number of parameters is within a factor of size. best_layer is the first layer
-- that reaches best_accuracy. J and C are in percent of depth.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant
--   run
--   size        number = 7         number of parameters, in billions
--   within      number = 1.5       factor by which a model may be smaller or larger
SELECT
    dataset, family, model, round(n_params / 1e9, 3) AS size_billions,
    max(accuracy) AS best_accuracy,
    arg_max(layer, (accuracy, -layer)) AS best_layer,
    100 * jump_point AS jump_percent,
    100 * converging_point AS converging_percent
FROM probe_scores
JOIN _depths_of_all() USING (model, dataset, run, site, classifier, split)
JOIN models USING (model, dataset, run)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE n_params / 1e9 BETWEEN getvariable('size') / getvariable('within') AND getvariable('size') * getvariable('within')
    AND among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
GROUP BY dataset, family, model, n_params, jump_point, converging_point
ORDER BY dataset, family, n_params, model;
