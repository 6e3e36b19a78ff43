-- FFN neurons that activate the value neurons
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): query neurons
--
-- One row per model, dataset, category, kind of value neuron activated and rank: the query neurons with the largest
-- mean score over the n_kept kept prompts. A prompt counts as 0 for a neuron that is not stored with it; n_prompts is
-- the number of prompts with which it is stored. The tokens are the ten that the neuron raises most, and least.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   activates
--   k          integer = 10    number of neurons per category, dataset and kind
WITH scores AS (
    SELECT
        model, shown_dataset AS dataset, category, activates, layer, expert, neuron,
        neuron_name('ffn', layer, NULL, expert, neuron) AS neuron_name,
        mean_over(sum(score), n_kept) AS score, count(*) AS n_prompts, n_kept,
        min({run: run, dataset: dataset}).dataset AS dataset_of_run, min({run: run, dataset: dataset}).run AS run
    FROM query_neuron_scores
    JOIN _kept_prompts(
        'query_neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    ) USING (model, dataset, run, prompt_id)
    WHERE among(model, getvariable('model'))
        AND (getvariable('activates') IS NULL OR activates = getvariable('activates'))
    GROUP BY model, shown_dataset, category, activates, layer, expert, neuron, n_kept
),

best AS MATERIALIZED (
    SELECT
        *, row_number() OVER (
            PARTITION BY model, dataset, category, activates ORDER BY score DESC, layer, expert, neuron
        ) AS rank
    FROM scores
    QUALIFY rank <= getvariable('k')
)

SELECT
    best.model, best.dataset, category, activates, rank, best.neuron_name, layer, expert, neuron, score, n_prompts,
    n_kept, top_tokens, bottom_tokens
FROM best
LEFT JOIN tokens_of_neurons(
    (
        SELECT list({
            model: model, dataset: dataset_of_run, run: run, component: 'ffn', layer: layer,
            head: NULL::SMALLINT, expert: expert, neuron: neuron
        })
        FROM best
    )
) AS named
    ON named.model = best.model AND named.dataset = best.dataset_of_run AND named.run = best.run
    AND named.neuron_name = best.neuron_name
ORDER BY best.model, best.dataset, category_order(category), activates, rank;
