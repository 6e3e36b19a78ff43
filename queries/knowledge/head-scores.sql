-- Score of every head in every kept prompt
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the values averaged in table 10
--
-- One row per model, category, prompt, layer and head: the log-probability increase of the right token.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
SELECT model, category, dataset, prompt_id, layer, head, head_name(layer, head) AS head_name, score
FROM head_scores
JOIN _kept_prompts(
    'head_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run')
) USING (model, dataset, run, prompt_id)
ORDER BY model, category_order(category), dataset, prompt_id, layer, head;
