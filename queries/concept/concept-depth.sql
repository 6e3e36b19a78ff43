-- Depth at which a model comes to know a concept: jump point and converging point
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the metrics J and C
--
-- One row per model, dataset and site. J is the first depth at which accuracy is at least jump_ratio times that of the
-- layer before. C is the last depth at which it changes by less than convergence_tolerance. NULL if there is no such
-- layer.
--
-- Parameters:
--   model
--   dataset texts
--   site        text = all         where the hidden state is read: resid_post or ffn_norm
--   classifier
--   split
--   variant
--   run
--   jump_ratio  number = 1.1       smallest variation rate that counts as a jump
--   convergence_tolerance  number = 0.03  a rate has converged if it changes by less than this
SELECT model, dataset, site, n_layers, jump_layer, jump_percent, converging_layer, converging_percent
FROM concept_depth(
    wanted_model := getvariable('model'), wanted_dataset := getvariable('dataset'), wanted_site := getvariable('site'),
    wanted_classifier := getvariable('classifier'), wanted_split := getvariable('split'),
    wanted_variant := getvariable('variant'), wanted_run := getvariable('run'),
    jump_ratio := getvariable('jump_ratio'), convergence_tolerance := getvariable('convergence_tolerance')
)
ORDER BY model, dataset, site DESC;
