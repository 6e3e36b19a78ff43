-- One neuron: the prompts to which it contributes most directly
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value and query neurons, prompt by prompt
--
-- One row per model, dataset, kept prompt and role: for a value neuron, its log-probability increase of the right token
-- (summed over positions for an attention neuron); for a query neuron, its share of the activation. rank is its best
-- rank among the prompt's neurons of that role. The largest scores come first.
--
-- Parameters:
--   neuron
--   model
--   category
--   dataset
--   variant
--   run
--   k         integer = 50     maximum number of prompts per model and role
SELECT
    model, category, dataset, prompt_id, getvariable('neuron') AS neuron_name, role, sum(score) AS score,
    min(rank) AS rank, text, target_token
FROM _roles_of_neuron(getvariable('neuron'))
JOIN _kept_prompts(
    'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run')
) USING (model, dataset, run, prompt_id)
JOIN prompts USING (model, dataset, run, prompt_id, category)
GROUP BY model, category, dataset, prompt_id, role, text, target_token
QUALIFY row_number() OVER (PARTITION BY model, role ORDER BY sum(score) DESC, dataset, prompt_id) <= getvariable('k')
ORDER BY model, role DESC, score DESC, dataset, prompt_id;
