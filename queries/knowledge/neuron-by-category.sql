-- One neuron: its score for each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value and query neurons, by neuron
--
-- One row per model, dataset, category and role: for a value neuron, its mean log-probability increase of the right
-- token; for a query neuron, its mean share of the activation. The mean is over all n_kept kept prompts. n_prompts is
-- the number of prompts in which its score is known; in the others, it counts as 0. layers_percent compares the score of
-- a value neuron with the sum of all layers' scores in the same prompts.
--
-- Parameters:
--   neuron
--   model
--   category
--   dataset
--   variant
--   run
--   pool
WITH kept AS (
    FROM _kept_prompts(
        'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
),

by_role AS (
    SELECT
        model, shown_dataset, category, role, mean_over(sum(score), n_kept) AS score,
        count(DISTINCT (dataset, run, prompt_id)) AS n_prompts, n_kept
    FROM _roles_of_neuron(getvariable('neuron'))
    JOIN kept USING (model, dataset, run, prompt_id)
    GROUP BY model, shown_dataset, category, role, n_kept
),

of_layers AS (
    SELECT model, shown_dataset, category, mean_over(sum(score), n_kept) AS total
    FROM layer_scores
    JOIN kept USING (model, dataset, run, prompt_id)
    GROUP BY model, shown_dataset, category, n_kept
)

SELECT
    model, shown_dataset AS dataset, category, getvariable('neuron') AS neuron_name, role, score,
    CASE role WHEN 'value neuron' THEN 100 * score / nullif(total, 0) END AS layers_percent, n_prompts, n_kept
FROM by_role
LEFT JOIN of_layers USING (model, shown_dataset, category)
ORDER BY model, dataset, role DESC, category_order(category);
