-- Depth at which a model comes to know a concept: best layer and depth_90, beside the paper's J and C
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the metrics J and C
--
-- One row per model, dataset and site, of the default probe. best_layer is the first layer with the best accuracy of
-- n_test prompts; the interval beside it is that of this layer alone, although the layer was chosen. depth_90 is the
-- first at which 90 % of the way from the best baseline to the best layer is made. It is NULL unless the best layer is
-- better than the baseline by a bound that allows for the choice of the layer. area is the mean over layers of accuracy
-- minus the baseline's. first_within_one_se is the first layer within one standard error of the best; it depends on
-- n_test. The figure depth-measures adds tests and intervals. J is the first depth at which accuracy is at least
-- jump_ratio times that of the layer before. C is the last depth at which it changes by less than
-- convergence_tolerance. NULL if there is no such layer. J and C are the paper's, of its objective and split
-- (logistic-raw, paper) unless a classifier or split is given. By chance alone, most flat curves of 100 test prompts
-- have a J, and on real ones C is nearly always one of the last two layers.
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
SELECT
    model, dataset, site, classifier, split, n_layers, n_test,
    best_layer, best_percent, best_accuracy, best_accuracy_low, best_accuracy_high, baseline, baseline_accuracy, area,
    depth_90_layer, depth_90_percent, first_within_one_se,
    jump_layer, jump_percent, converging_layer, converging_percent
FROM concept_depth(
    wanted_model := getvariable('model'), wanted_dataset := getvariable('dataset'), wanted_site := getvariable('site'),
    wanted_classifier := getvariable('classifier'), wanted_split := getvariable('split'),
    wanted_variant := getvariable('variant'), wanted_run := getvariable('run'),
    jump_ratio := getvariable('jump_ratio'), convergence_tolerance := getvariable('convergence_tolerance')
)
ORDER BY model, dataset, site DESC;
