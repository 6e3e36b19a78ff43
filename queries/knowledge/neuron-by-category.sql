-- One neuron: how much it matters for each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value and query neurons, by neuron
--
-- One row per model, category and role: as a value neuron, its mean log-probability increase of the right token; as a
-- query neuron, its mean share of the activation. The mean is over all kept prompts; n_prompts are those that store
-- the neuron, and it counts 0 in the others.
--
-- Parameters:
--   neuron
--   model
--   category
--   dataset
--   variant
--   run
SELECT
    model, category, getvariable('neuron') AS neuron_name, role, mean_over(sum(score), n_kept) AS score,
    count(DISTINCT (dataset, run, prompt_id)) AS n_prompts, n_kept
FROM _roles_of_neuron(getvariable('neuron'))
JOIN _kept_prompts(
    'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run')
) USING (model, dataset, run, prompt_id)
GROUP BY model, category, role, n_kept
ORDER BY model, role DESC, category_order(category);
