-- Score of every used expert in every kept prompt
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the score of heads, for experts
--
-- One row per model, category, prompt, layer and expert: the log-probability increase of the right token. An expert that
-- the router does not choose at the last position has no row, and adds 0.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
SELECT model, category, dataset, prompt_id, layer, expert, expert_name(layer, expert) AS expert_name, score
FROM expert_scores
JOIN _kept_prompts(
    'expert_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run')
) USING (model, dataset, run, prompt_id)
ORDER BY model, category_order(category), dataset, prompt_id, layer, expert;
