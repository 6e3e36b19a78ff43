-- One neuron: the tokens whose logits it raises or lowers most
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): neurons projected to the vocabulary
--
-- One row per model, end and rank: the token, as a JSON string, and the neuron's logit of it.
--
-- Parameters:
--   neuron
--   model
--   variant
--   run
SELECT
    model, getvariable('neuron') AS neuron_name, sign, rank, to_json(min(token))::VARCHAR AS token,
    min(logit) AS logit
FROM neuron_tokens
JOIN named_neuron(getvariable('neuron')) AS named
    ON neuron_tokens.component = named.component AND neuron_tokens.layer = named.layer
    AND neuron_tokens.head IS NOT DISTINCT FROM named.head AND neuron_tokens.expert IS NOT DISTINCT FROM named.expert
    AND neuron_tokens.neuron = named.neuron
JOIN chosen_runs('neuron_tokens', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
GROUP BY model, sign, rank
ORDER BY model, sign DESC, rank;
