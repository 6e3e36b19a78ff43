-- Distribution of the query neurons over layers
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): query neurons, by layer
--
-- One row per model, dataset, category, kind of value neuron activated and layer, including layers without any: the
-- number of a prompt's k best query neurons in the layer, as a mean over the kept prompts and as a share of all of
-- them.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   activates
--   k          integer = 300   number of best query neurons per prompt and kind
WITH kept AS (
    SELECT *
    FROM _kept_prompts(
        'query_neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
),

found AS (
    SELECT
        model, shown_dataset AS dataset, category, activates, layer, n_kept,
        mean_over(count(*), n_kept) AS neurons
    FROM query_neuron_scores
    JOIN kept USING (model, dataset, run, prompt_id)
    WHERE rank <= getvariable('k')
        AND among(model, getvariable('model'))
        AND (getvariable('activates') IS NULL OR activates = getvariable('activates'))
    GROUP BY model, shown_dataset, category, activates, layer, n_kept
),

depths AS (
    SELECT model, max(n_layers) AS n_layers
    FROM known_runs
    SEMI JOIN kept USING (model, dataset, run)
    GROUP BY model
),

layers AS (
    SELECT DISTINCT model, dataset, category, activates, n_kept, n_layers, unnest(range(n_layers))::SMALLINT AS layer
    FROM found
    JOIN depths USING (model)
)

SELECT
    model, dataset, category, activates, layer,
    coalesce(neurons, 0) AS neurons,
    coalesce(
        steady(100 * neurons / sum(neurons) OVER (PARTITION BY model, dataset, category, activates)), 0
    ) AS share_percent,
    n_layers, layers.n_kept AS n_prompts
FROM layers
LEFT JOIN found USING (model, dataset, category, activates, layer)
ORDER BY model, dataset, category_order(category), activates, layer;
