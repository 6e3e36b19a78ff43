-- Distribution of the value neurons over layers
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): figure 2
--
-- One row per model, dataset, category, component and layer, including layers without any: the number of a prompt's k
-- best value neurons in the layer, as a mean over the kept prompts and as a share of all of them. score is the sum of
-- their scores, also as a mean. An attention neuron counts at each position at which it is among the best.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   component
--   k          integer = 300   number of best neurons per prompt and component
WITH kept AS (
    SELECT *
    FROM _kept_prompts(
        'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
),

found AS (
    SELECT
        model, shown_dataset AS dataset, category, component, layer, n_kept,
        mean_over(count(*), n_kept) AS neurons, mean_over(sum(score), n_kept) AS score
    FROM neuron_scores
    JOIN kept USING (model, dataset, run, prompt_id)
    WHERE rank <= getvariable('k')
        AND among(model, getvariable('model'))
        AND (getvariable('component') IS NULL OR component = getvariable('component'))
    GROUP BY model, shown_dataset, category, component, layer, n_kept
),

depths AS (
    SELECT model, max(n_layers) AS n_layers
    FROM known_runs
    SEMI JOIN kept USING (model, dataset, run)
    GROUP BY model
),

layers AS (
    SELECT DISTINCT model, dataset, category, component, n_kept, unnest(range(n_layers))::SMALLINT AS layer
    FROM found
    JOIN depths USING (model)
)

SELECT
    model, dataset, category, component, layer,
    coalesce(neurons, 0) AS neurons,
    coalesce(
        steady(100 * neurons / sum(neurons) OVER (PARTITION BY model, dataset, category, component)), 0
    ) AS share_percent,
    coalesce(score, 0) AS score, layers.n_kept AS n_prompts
FROM layers
LEFT JOIN found USING (model, dataset, category, component, layer)
ORDER BY model, dataset, category_order(category), component, layer;
