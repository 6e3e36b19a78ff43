-- One head: its score for each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 10, by head
--
-- One row per model, dataset and category: the head's mean log-probability increase of the right token over the
-- n_prompts kept prompts, and its rank among the model's heads.
--
-- Parameters:
--   layer
--   head
--   model
--   category
--   dataset
--   variant
--   run
--   pool
SELECT model, dataset, category, head_name(layer, head) AS head_name, layer, head, rank, score, n_prompts
FROM ranked_heads(
    getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
)
WHERE layer = getvariable('layer') AND head = getvariable('head')
ORDER BY model, dataset, category_order(category);
