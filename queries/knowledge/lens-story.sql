-- One prompt: what the model would say after each part of each block
-- nostalgebraist 2020, the logit lens
--
-- One row per model, dataset, position, layer and place, in the order of the model: before the first block (resid_pre),
-- after attention (resid_mid) and after the FFN (resid_post). Positions before the last are there after `kdb lens`; token
-- is the prompt's. tokens are the five most probable next ones, as JSON strings, and prob is the probability of the first;
-- answer and rival are in ranks and log-probabilities (nat); those of a text with a label are the words of its classes. kl is the KL divergence of the readout from the model's
-- output at the same position.
--
-- Parameters:
--   prompt   integer required    prompt_id of the prompt (`kdb query prompts`)
--   model
--   dataset
--   variant
--   run
--   lens
--   position integer = all      number of one position, from 0
SELECT
    model, dataset, "position", token, layer, place,
    list_aggregate(list_transform(tokens, lambda x: to_json(x)::VARCHAR), 'string_agg', ', ') AS tokens,
    exp(logps[1]) AS prob,
    readouts.target_rank, target_logp, rival_rank, readouts.rival_logp, entropy, kl,
    coalesce(target_token, if(label = 1, positive, negative)) AS target_token,
    coalesce(rival_token, if(label = 1, negative, positive)) AS rival_token, text
FROM _readouts(
    getvariable('model'), getvariable('dataset'), getvariable('variant'), getvariable('run'), getvariable('lens'),
    wanted_prompt := getvariable('prompt')
) AS readouts
JOIN prompts USING (model, dataset, run, prompt_id)
LEFT JOIN zero_shot USING (model, dataset, run, prompt_id)
WHERE getvariable('position') IS NULL OR "position" = getvariable('position')
ORDER BY model, dataset, "position", layer, list_position(['resid_pre', 'resid_mid', 'resid_post'], place);
