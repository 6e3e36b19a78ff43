-- Number of heads that two kinds of knowledge share
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 10, compared
--
-- One row per model and pair of categories: the number of heads that are among the k best of both, by mean score over
-- the kept prompts, and the Jaccard index of the two sets.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   k         integer = 10    number of heads per category
WITH best AS (
    SELECT model, category, list(head_name(layer, head)) AS heads
    FROM ranked_heads(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run')
    )
    WHERE rank <= getvariable('k')
    GROUP BY ALL
)

SELECT
    model, a.category AS category_a, b.category AS category_b,
    n_shared(a.heads, b.heads) AS shared, jaccard(a.heads, b.heads) AS jaccard
FROM best AS a
JOIN best AS b USING (model)
WHERE category_order(a.category) < category_order(b.category)
ORDER BY model, category_order(a.category), category_order(b.category);
