-- How many prompts count, and why the others do not
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the filter of its datasets
--
-- One row per model, dataset and category, over all prompts. A prompt is kept where the right token is among the
-- model's ten best and ahead of the category's other answers; the others fall out by the first of the two that
-- fails.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
SELECT
    model, dataset, category,
    count(*) AS n_prompts,
    count(*) FILTER (kept) AS kept,
    100 * avg(kept::INTEGER) AS kept_percent,
    count(*) FILTER (NOT kept AND target_rank > 10) AS not_in_top_ten,
    count(*) FILTER (NOT kept AND target_rank <= 10) AS beaten_by_another_answer
FROM prompts
JOIN chosen_runs('prompts', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE kept IS NOT NULL
    AND among(model, getvariable('model'))
    AND among(category, getvariable('category'))
    AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
GROUP BY model, dataset, category
ORDER BY model, dataset, category_order(category);
