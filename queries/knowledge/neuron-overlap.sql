-- Number of value neurons that two kinds of knowledge share
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value neurons, compared
--
-- One row per model, dataset and pair of categories: the number of neurons that are among the k best of both, by mean
-- score over the kept prompts (n_prompts_a and n_prompts_b), and the Jaccard index of the two sets. Beside each stands
-- its level by chance: the mean for two sets of the same sizes that are drawn at random from all neurons of the
-- component.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   component  text = ffn      component: attn or ffn
--   k          integer = 300   number of neurons per category and dataset
WITH best AS (
    SELECT model, dataset, category, list(neuron_name) AS neurons, any_value(n_kept) AS n_prompts
    FROM ranked_neurons(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), getvariable('k'), wanted_pool := getvariable('pool')
    )
    WHERE component = getvariable('component')
    GROUP BY model, dataset, category
),

sizes AS (
    SELECT
        model, CASE getvariable('component') WHEN 'attn' THEN n_attn_neurons ELSE n_ffn_neurons END AS n_neurons
    FROM sizes_of_models('neuron_sums', getvariable('variant'), getvariable('run'))
)

SELECT
    model, dataset, a.category AS category_a, b.category AS category_b,
    n_shared(a.neurons, b.neurons) AS shared,
    shared_by_chance(len(a.neurons), len(b.neurons), n_neurons) AS shared_by_chance,
    jaccard(a.neurons, b.neurons) AS jaccard,
    jaccard_by_chance(len(a.neurons), len(b.neurons), n_neurons) AS jaccard_by_chance,
    a.n_prompts AS n_prompts_a, b.n_prompts AS n_prompts_b
FROM best AS a
JOIN best AS b USING (model, dataset)
LEFT JOIN sizes USING (model)
WHERE category_order(a.category) < category_order(b.category)
ORDER BY model, dataset, category_order(a.category), category_order(b.category);
