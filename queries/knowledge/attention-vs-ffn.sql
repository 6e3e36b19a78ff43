-- Whether attention or FFN layers hold more of each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 4, summed up
--
-- One row per model and category: the log-probability increases of all attention layers, and of all FFN layers,
-- as sums per prompt and means over the kept prompts, and each in percent of both together. Empty where both
-- together are 0; beyond 0 to 100 where one of them lowers the right token.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
WITH sums AS (
    SELECT
        model, category,
        steady(sum(score) FILTER (component = 'attn')) AS attn_score,
        steady(sum(score) FILTER (component = 'ffn')) AS ffn_score,
        max(n_prompts) AS n_prompts
    FROM mean_layer_scores(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run')
    )
    GROUP BY ALL
)

SELECT
    model, category, attn_score, ffn_score,
    100 * attn_score / nullif(attn_score + ffn_score, 0) AS attn_percent,
    100 * ffn_score / nullif(attn_score + ffn_score, 0) AS ffn_percent,
    n_prompts
FROM sums
ORDER BY model, category_order(category);
