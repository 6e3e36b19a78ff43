-- Tokens that a head reads
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): what its best heads attend to
--
-- One row per model, dataset, category, head and token: the attention of the last token to it, and the log-probability
-- increase of the right token that the head reads there. Both are summed if the token occurs more than once. They are
-- means over the n_prompts kept prompts that contain the token and in which the head is among the stored ones. The rows
-- are those of the k best heads, or of all heads of a given layer or number, each with its tokens of largest score.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k            integer = 10    number of best heads per category and dataset, if neither layer nor head is given
--   layer        integer = all   layer of the heads, from 0
--   head         integer = all   number of the head within its layer, from 0
--   tokens       integer = 5     maximum number of tokens per head
--   min_prompts  integer = 1     minimum number of prompts that contain a token
WITH by_prompt AS (
    SELECT
        model, category, layer, head, token, dataset, shown_dataset, run, prompt_id,
        sum(attention) AS attention, sum(score) AS score
    FROM head_position_scores
    JOIN _kept_prompts(
        'head_position_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    ) USING (model, dataset, run, prompt_id)
    WHERE among(model, getvariable('model'))
        AND (getvariable('layer') IS NULL OR layer = getvariable('layer'))
        AND (getvariable('head') IS NULL OR head = getvariable('head'))
    GROUP BY ALL
),

by_token AS (
    SELECT
        model, shown_dataset AS dataset, category, layer, head, token, count(*) AS n_prompts,
        mean_over(sum(attention), count(*)) AS attention, mean_over(sum(score), count(*)) AS score
    FROM by_prompt
    GROUP BY model, shown_dataset, category, layer, head, token
    HAVING count(*) >= getvariable('min_prompts')
),

heads AS (
    SELECT model, dataset, category, layer, head, rank
    FROM ranked_heads(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
    WHERE rank <= getvariable('k') OR getvariable('layer') IS NOT NULL OR getvariable('head') IS NOT NULL
)

SELECT model, dataset, category, rank, head_name(layer, head) AS head_name, token, n_prompts, attention, score
FROM by_token
JOIN heads USING (model, dataset, category, layer, head)
QUALIFY row_number() OVER (
    PARTITION BY model, dataset, category, rank ORDER BY score DESC, token
) <= getvariable('tokens')
ORDER BY model, dataset, category_order(category), rank, score DESC, token;
