-- Model families compared at one size
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): experiment 2, families at one size
--
-- One row per dataset and model whose number of parameters is within a factor of size. best_layer is the first layer
-- that reaches best_accuracy. depth_90, J and C are in percent of depth; depth_90 is that of concept-depth. J and C are
-- the paper's, of its objective and split (logistic-raw, paper) unless a classifier or split is given. By chance alone,
-- most flat curves of 100 test prompts have a J, and on real ones C is nearly always one of the last two layers.
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
    n_test, best_accuracy, best_layer, baseline, baseline_accuracy,
    100 * depth_90_layer / n_layers::DOUBLE AS depth_90_percent, jump_percent, converging_percent
FROM _measures_of_all()
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
LEFT JOIN paper_points(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, site)
JOIN models USING (model, dataset, run)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE n_params / 1e9 BETWEEN getvariable('size') / getvariable('within') AND getvariable('size') * getvariable('within')
    AND among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
ORDER BY dataset, family, n_params, model;
