-- One neuron: the prompts to which it contributes most directly
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value and query neurons, prompt by prompt
--
-- One row per model, dataset, kept prompt and role: for a value neuron, its log-probability increase of the right token
-- (summed over positions for an attention neuron); for a query neuron, its share of the activation. rank is its best
-- rank among the prompt's neurons of that role. The largest scores of each dataset come first; n_prompts is the
-- number of kept prompts in which its score in that role is known.
--
-- Parameters:
--   neuron
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k         integer = 50     maximum number of prompts per model, dataset and role
SELECT
    model, dataset, category, prompt_id, getvariable('neuron') AS neuron_name, role, sum(score) AS score,
    min(rank) AS rank, text, target_token,
    count(*) OVER (PARTITION BY model, shown_dataset, role) AS n_prompts
FROM _roles_of_neuron(getvariable('neuron'))
JOIN _kept_prompts(
    'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
) USING (model, dataset, run, prompt_id)
JOIN prompts USING (model, dataset, run, prompt_id, category)
GROUP BY model, dataset, shown_dataset, category, prompt_id, role, text, target_token
QUALIFY row_number() OVER (
    PARTITION BY model, shown_dataset, role ORDER BY sum(score) DESC, dataset, prompt_id
) <= getvariable('k')
ORDER BY model, shown_dataset, role DESC, score DESC, dataset, prompt_id;
