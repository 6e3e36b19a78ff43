-- FFN neurons that activate the value neurons
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): query neurons
--
-- One row per model, category, kind of value neuron activated and rank: the query neurons with the largest mean score
-- over the kept prompts. A prompt counts as 0 for a neuron that is not stored with it; n_prompts is the number of
-- prompts with which it is stored. The tokens are the ten that the neuron raises most, and least.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   activates
--   k          integer = 10    number of neurons per category and kind
WITH scores AS (
    SELECT
        model, category, activates, layer, neuron, neuron_name('ffn', layer, NULL, neuron) AS neuron_name,
        mean_over(sum(score), n_kept) AS score, count(*) AS n_prompts,
        min({run: run, dataset: dataset}).dataset AS dataset, min({run: run, dataset: dataset}).run AS run
    FROM query_neuron_scores
    JOIN _kept_prompts(
        'query_neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run')
    ) USING (model, dataset, run, prompt_id)
    WHERE among(model, getvariable('model'))
        AND (getvariable('activates') IS NULL OR activates = getvariable('activates'))
    GROUP BY model, category, activates, layer, neuron, n_kept
),

best AS MATERIALIZED (
    SELECT
        *, row_number() OVER (PARTITION BY model, category, activates ORDER BY score DESC, layer, neuron) AS rank
    FROM scores
    QUALIFY rank <= getvariable('k')
)

SELECT
    model, category, activates, rank, neuron_name, layer, neuron, score, n_prompts, top_tokens, bottom_tokens
FROM best
LEFT JOIN tokens_of_neurons(
    (
        SELECT list({
            model: model, dataset: dataset, run: run, component: 'ffn', layer: layer, head: NULL::SMALLINT,
            neuron: neuron
        })
        FROM best
    )
)
    USING (model, dataset, run, neuron_name)
ORDER BY model, category_order(category), activates, rank;
