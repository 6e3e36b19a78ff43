-- Shares of attention and FFN layers in each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 4, summed up
--
-- One row per model, dataset and category: the log-probability increases of all attention layers, of all FFN layers and
-- of all mixers (state-space layers and the like), summed per prompt and averaged over the n_prompts kept prompts, and
-- each in percent of their sum. NULL for what the model lacks and if the sum is 0; below 0 or above 100 if one of them
-- lowers the probability of the right token.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
WITH sums AS (
    SELECT
        model, dataset, category,
        steady(sum(score) FILTER (component = 'attn')) AS attn_score,
        steady(sum(score) FILTER (component = 'ffn')) AS ffn_score,
        steady(sum(score) FILTER (component = 'mixer')) AS mixer_score,
        coalesce(attn_score, 0) + coalesce(ffn_score, 0) + coalesce(mixer_score, 0) AS total,
        max(n_prompts) AS n_prompts
    FROM mean_layer_scores(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
    GROUP BY ALL
)

SELECT
    model, dataset, category, attn_score, ffn_score, mixer_score,
    100 * attn_score / nullif(total, 0) AS attn_percent,
    100 * ffn_score / nullif(total, 0) AS ffn_percent,
    100 * mixer_score / nullif(total, 0) AS mixer_percent,
    n_prompts
FROM sums
ORDER BY model, dataset, category_order(category);
