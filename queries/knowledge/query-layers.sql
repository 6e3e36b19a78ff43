-- Layers that activate the value neurons
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): query layers
--
-- One row per model, dataset, category, kind of value neuron activated and rank: the layer outputs with the largest
-- mean score over the n_prompts kept prompts. a5 is attention layer 5, f3 is FFN layer 3; embed is the embedding, whose
-- layer is NULL.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   activates
--   k          integer = 10    number of layers per category, dataset and kind
WITH scores AS (
    SELECT
        model, shown_dataset AS dataset, category, activates, component, layer,
        mean_over(sum(score), count(*)) AS score, count(*) AS n_prompts
    FROM query_layer_scores
    JOIN _kept_prompts(
        'query_layer_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    ) USING (model, dataset, run, prompt_id)
    WHERE among(model, getvariable('model'))
        AND (getvariable('activates') IS NULL OR activates = getvariable('activates'))
    GROUP BY model, shown_dataset, category, activates, component, layer
)

SELECT
    model, dataset, category, activates,
    row_number() OVER (
        PARTITION BY model, dataset, category, activates ORDER BY score DESC, layer NULLS FIRST, component
    ) AS rank,
    layer_name(component, layer) AS layer_name, component, layer, score, n_prompts
FROM scores
QUALIFY rank <= getvariable('k')
ORDER BY model, dataset, category_order(category), activates, rank;
