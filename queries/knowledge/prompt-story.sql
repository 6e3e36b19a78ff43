-- One prompt in detail: layers, heads and what they read, neurons and their tokens
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): its case studies
--
-- One row per model, dataset, part and rank. The parts are the k layers, heads, experts, attention and FFN value neurons,
-- and query neurons with the largest score for the right token of one prompt, and the positions that the best heads read.
-- score is the log-probability increase in nat; for query neurons, the share of activation. tokens are the token at a
-- head's position, or the ten tokens that a neuron raises most.
--
-- Parameters:
--   prompt   integer required    prompt_id of the prompt (`kdb query prompts`)
--   model
--   dataset
--   variant
--   run
--   k        integer = 10        number of rows per part
WITH chosen AS (
    SELECT model, dataset, run
    FROM chosen_runs('layer_scores', getvariable('variant'), getvariable('run'))
    WHERE among(model, getvariable('model')) AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
),

parts AS (
    SELECT
        model, dataset, run, 'layer' AS part, layer_name(component, layer) AS name, component, layer, NULL AS head,
        NULL AS expert, NULL AS neuron, NULL AS position, NULL AS attention, score, NULL AS token
    FROM layer_scores
    JOIN chosen USING (model, dataset, run)
    WHERE prompt_id = getvariable('prompt')
    UNION ALL
    SELECT model, dataset, run, 'head', head_name(layer, head), 'attn', layer, head, NULL, NULL, NULL, NULL, score, NULL
    FROM head_scores
    JOIN chosen USING (model, dataset, run)
    WHERE prompt_id = getvariable('prompt')
    UNION ALL
    SELECT
        model, dataset, run, 'head reads', head_name(layer, head), 'attn', layer, head, NULL, NULL, position,
        attention, score, to_json(token)::VARCHAR
    FROM head_position_scores
    JOIN chosen USING (model, dataset, run)
    WHERE prompt_id = getvariable('prompt')
    UNION ALL
    SELECT
        model, dataset, run, 'expert', expert_name(layer, expert), 'ffn', layer, NULL, expert, NULL, NULL, NULL, score,
        NULL
    FROM expert_scores
    JOIN chosen USING (model, dataset, run)
    WHERE prompt_id = getvariable('prompt')
    UNION ALL
    SELECT
        model, dataset, run, component || ' value neuron', neuron_name(component, layer, head, expert, neuron),
        component, layer, head, expert, neuron, position, NULL, score, NULL
    FROM neuron_scores
    JOIN chosen USING (model, dataset, run)
    WHERE prompt_id = getvariable('prompt')
    UNION ALL
    SELECT
        model, dataset, run, 'query neuron of ' || activates, neuron_name('ffn', layer, NULL, expert, neuron), 'ffn',
        layer, NULL, expert, neuron, NULL, NULL, score, NULL
    FROM query_neuron_scores
    JOIN chosen USING (model, dataset, run)
    WHERE prompt_id = getvariable('prompt')
),

best AS MATERIALIZED (
    SELECT
        *, row_number() OVER (
            PARTITION BY model, dataset, run, part ORDER BY score DESC, layer, head, expert, neuron, position
        ) AS rank
    FROM parts
    QUALIFY rank <= getvariable('k')
)

SELECT
    best.model, best.dataset, part, best.rank, name, component, layer, head, expert, neuron, position, attention,
    score, coalesce(token, top_tokens) AS tokens,
    text, target_token, target_prob
FROM best
JOIN prompts
    ON prompts.model = best.model AND prompts.dataset = best.dataset AND prompts.run = best.run
    AND prompts.prompt_id = getvariable('prompt')
LEFT JOIN tokens_of_neurons(
    (
        SELECT list({
            model: model, dataset: dataset, run: run, component: component, layer: layer, head: head,
            expert: expert, neuron: neuron
        })
        FROM best
        WHERE neuron IS NOT NULL
    )
) AS named
    ON named.model = best.model AND named.dataset = best.dataset AND named.run = best.run AND neuron IS NOT NULL
    AND neuron_name = name
ORDER BY
    best.model, best.dataset,
    list_position(
        [
            'layer', 'head', 'head reads', 'expert', 'attn value neuron', 'ffn value neuron',
            'query neuron of attn', 'query neuron of ffn'
        ],
        part
    ),
    best.rank;
