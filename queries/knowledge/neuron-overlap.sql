-- Number of value neurons that two kinds of knowledge share
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value neurons, compared
--
-- One row per model and pair of categories: the number of neurons that are among the k best of both, by mean score over
-- the kept prompts, and the Jaccard index of the two sets.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   component  text = ffn      component: attn or ffn
--   k          integer = 300   number of neurons per category
WITH best AS (
    SELECT model, category, list(neuron_name) AS neurons
    FROM ranked_neurons(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), getvariable('k')
    )
    WHERE component = getvariable('component')
    GROUP BY ALL
)

SELECT
    model, a.category AS category_a, b.category AS category_b,
    n_shared(a.neurons, b.neurons) AS shared, jaccard(a.neurons, b.neurons) AS jaccard
FROM best AS a
JOIN best AS b USING (model)
WHERE category_order(a.category) < category_order(b.category)
ORDER BY model, category_order(a.category), category_order(b.category);
