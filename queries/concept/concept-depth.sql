-- Where a model comes to know a concept: jump point and converging point
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the metrics J and C
--
-- One row per model, dataset and site. J is the first depth at which accuracy jumps to jump_ratio times that of
-- the layer before; C is the last at which it changes by less than convergence_tolerance. Empty where there is
-- no such layer.
--
-- Parameters:
--   model       texts = all        models, side by side
--   dataset     texts = all        datasets
--   site        text = all         where the hidden state is read: resid_post or ffn_norm
--   classifier  text = logistic    logistic, logistic-paper or random-forest
--   split       text = paper       paper, stratified-SEED or grouped
--   variant     text = default     newest runs of this variant; `kdb runs` lists them
--   run         text = all         this run alone, whatever its variant
--   jump_ratio  number = 1.1       smallest variation rate that is a jump
--   convergence_tolerance  number = 0.03  largest change of a rate that has converged, itself excluded
SELECT
    model, dataset, site, n_layers,
    jump_layer, 100 * jump_point AS jump_percent,
    converging_layer, 100 * converging_point AS converging_percent
FROM concept_depth(
    jump_ratio := getvariable('jump_ratio'), convergence_tolerance := getvariable('convergence_tolerance')
)
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND (getvariable('site') IS NULL OR site = getvariable('site'))
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
ORDER BY model, dataset, site DESC;
