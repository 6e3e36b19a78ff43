-- Score of every layer in every kept prompt
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the values averaged in table 4
--
-- One row per model, category, prompt, component and layer: the log-probability increase of the right token.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
SELECT model, category, dataset, prompt_id, component, layer, layer_name(component, layer) AS layer_name, score
FROM layer_scores
JOIN _kept_prompts(
    'layer_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run')
) USING (model, dataset, run, prompt_id)
ORDER BY model, category_order(category), dataset, prompt_id, component, layer;
