-- One head: the prompts to which it contributes most directly
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): its heads, prompt by prompt
--
-- One row per model, dataset and kept prompt: the head's log-probability increase of the right token. If the head is
-- among the prompt's best, also the token that it reads most, as a JSON string. The largest scores of each
-- dataset come first; n_prompts is the number of kept prompts from which they are chosen.
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
--   k         integer = 50     maximum number of prompts per model and dataset
WITH scores AS (
    SELECT
        model, dataset, shown_dataset, run, category, prompt_id, layer, head, score,
        count(*) OVER (PARTITION BY model, shown_dataset) AS n_prompts
    FROM head_scores
    JOIN _kept_prompts(
        'head_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    ) USING (model, dataset, run, prompt_id)
    WHERE layer = getvariable('layer') AND head = getvariable('head')
    QUALIFY row_number() OVER (
        PARTITION BY model, shown_dataset ORDER BY score DESC, dataset, prompt_id
    ) <= getvariable('k')
),

reading AS (
    SELECT model, dataset, run, prompt_id, to_json(arg_max(token, score))::VARCHAR AS reads
    FROM head_position_scores
    WHERE layer = getvariable('layer') AND head = getvariable('head')
    GROUP BY ALL
)

SELECT
    scores.model, scores.dataset, category, prompt_id, head_name(layer, head) AS head_name, score, reads, text,
    target_token, n_prompts
FROM scores
JOIN prompts USING (model, dataset, run, prompt_id, category)
LEFT JOIN reading USING (model, dataset, run, prompt_id)
ORDER BY model, shown_dataset, score DESC, dataset, prompt_id;
