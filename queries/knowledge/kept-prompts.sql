-- Prompts that pass the filter, and reasons why others fail
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the filter of its datasets
--
-- One row per model, dataset and category, over all prompts. A prompt is kept if the right token is among the model's
-- ten most probable tokens, no other answer of the category begins with it, and it is more probable than they are.
-- Other prompts are counted under the first of these conditions that fails. With `kdb ingest --answer-tokens all`,
-- whole answers are compared, so they may begin with the same token.
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
    count(*) FILTER (not_kept_because = 'shares_first_token') AS shares_first_token,
    count(*) FILTER (
        NOT kept AND target_rank <= 10 AND not_kept_because IS DISTINCT FROM 'shares_first_token'
    ) AS beaten_by_another_answer
FROM prompts
JOIN chosen_runs('prompts', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE kept IS NOT NULL
    AND among(model, getvariable('model'))
    AND among(category, getvariable('category'))
    AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
GROUP BY model, dataset, category
ORDER BY model, dataset, category_order(category);
