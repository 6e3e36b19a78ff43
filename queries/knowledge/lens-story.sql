-- One prompt: what the model would say after each part of each block
-- nostalgebraist 2020, the logit lens
--
-- One row per model, dataset, layer and place, in the order of the model: before the first block (resid_pre), after attention
-- (resid_mid) and after the FFN (resid_post). tokens are the five most probable ones, as JSON strings,
-- and prob is the probability of the first; answer and rival are in
-- ranks and log-probabilities (nat). kl is the KL divergence of the readout from the model's output.
--
-- Parameters:
--   prompt   integer required    prompt_id of the prompt (`kdb query prompts`)
--   model
--   dataset
--   variant
--   run
SELECT
    model, dataset, layer, place, list_aggregate(list_transform(tokens, lambda x: to_json(x)::VARCHAR), 'string_agg', ', ') AS tokens,
    exp(logps[1]) AS prob,
    lens_readouts.target_rank, target_logp, rival_rank, lens_readouts.rival_logp, entropy, kl, target_token, rival_token, position
FROM lens_readouts
JOIN chosen_runs('lens_readouts', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
JOIN prompts USING (model, dataset, run, prompt_id)
WHERE among(model, getvariable('model')) AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
    AND prompt_id = getvariable('prompt')
    AND lens = 'logit'
ORDER BY model, dataset, position, layer, list_position(['resid_pre', 'resid_mid', 'resid_post'], place);
