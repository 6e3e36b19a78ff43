-- Attention heads with the largest direct contribution to each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 10
--
-- One row per model, dataset, category and rank: the heads with the largest mean log-probability increase of the right
-- token over the n_prompts kept prompts. a23.12 is head 12 of layer 23, both numbered from 0.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k         integer = 10    number of heads per category and dataset
SELECT model, dataset, category, rank, head_name(layer, head) AS head_name, layer, head, score, n_prompts
FROM ranked_heads(
    getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
)
WHERE rank <= getvariable('k')
ORDER BY model, dataset, category_order(category), rank;
