-- Number of heads that two kinds of knowledge share
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 10, compared
--
-- One row per model, dataset and pair of categories: the number of heads that are among the k best of both, by mean
-- score over the kept prompts (n_prompts_a and n_prompts_b), and the Jaccard index of the two sets. Beside each stands
-- its level by chance: the mean for two sets of the same sizes that are drawn at random from all heads of the model.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k         integer = 10    number of heads per category and dataset
WITH best AS (
    SELECT model, dataset, category, list(head_name(layer, head)) AS heads, any_value(n_prompts) AS n_prompts
    FROM ranked_heads(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
    WHERE rank <= getvariable('k')
    GROUP BY model, dataset, category
)

SELECT
    model, dataset, a.category AS category_a, b.category AS category_b,
    n_shared(a.heads, b.heads) AS shared, shared_by_chance(len(a.heads), len(b.heads), n_heads) AS shared_by_chance,
    jaccard(a.heads, b.heads) AS jaccard, jaccard_by_chance(len(a.heads), len(b.heads), n_heads) AS jaccard_by_chance,
    a.n_prompts AS n_prompts_a, b.n_prompts AS n_prompts_b
FROM best AS a
JOIN best AS b USING (model, dataset)
LEFT JOIN sizes_of_models('head_scores', getvariable('variant'), getvariable('run')) USING (model)
WHERE category_order(a.category) < category_order(b.category)
ORDER BY model, dataset, category_order(a.category), category_order(b.category);
