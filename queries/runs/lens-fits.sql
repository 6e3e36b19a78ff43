-- How close a tuned lens comes to the model's output, beside the logit lens
-- Belrose et al. 2023, figure 4
--
-- One row per model, dataset, layer and place, of the newest run of `kdb lens --lens tuned`. kl_logit and kl_tuned are mean
-- KL divergences (nat) from the model's output, on n_tokens tokens of held-out text; gain is their difference, with its
-- 95 % interval over the n_passages passages (none below five). A layer that is not kept is worse, and has no readouts.
--
-- Parameters:
--   model
--   dataset
--   variant
--   run
SELECT
    model, dataset, layer, place, kl_logit, kl_tuned, kl_logit - kl_tuned AS gain, gain_low, gain_high, kept,
    n_tokens, n_passages, run
FROM lens_fits
JOIN chosen_runs('lens_fits', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model')) AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
ORDER BY model, dataset, layer, place DESC;
