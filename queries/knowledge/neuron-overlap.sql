-- How many value neurons two kinds of knowledge share
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value neurons, compared
--
-- One row per model and pair of categories: how many of the k best neurons of each, by mean score over the kept
-- prompts, are the same, and the Jaccard index of the two sets.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   component  text = ffn      attn or ffn
--   k          integer = 300   neurons of each category
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
