-- How often each expert is chosen for each kind of knowledge
-- Shazeer et al., Outrageously Large Neural Networks (arXiv 1701.06538): the router of a mixture of experts
--
-- One row per model, dataset, category, layer and rank, for models with experts: the k experts of a layer that the router
-- chooses in most of the n_prompts kept prompts, at the last position. chosen_percent is their share, with its 95 %
-- Wilson interval; weight is the mean factor of the expert's output in the prompts in which it is chosen. entropy is that
-- of the layer's routing, as a mean over the prompts. Shared experts are always used, and have no row.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k         integer = 3     number of experts per category, dataset and layer
WITH kept AS MATERIALIZED (
    SELECT *
    FROM _kept_prompts(
        'router', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
),

counted AS (
    SELECT
        model, shown_dataset AS dataset, category, layer, expert, count(*) AS n_chosen,
        mean_over(sum(weight), count(*)) AS weight, n_kept
    FROM router
    JOIN kept USING (model, dataset, run, prompt_id)
    WHERE chosen AND among(model, getvariable('model'))
    GROUP BY model, shown_dataset, category, layer, expert, n_kept
),

entropies AS (
    SELECT
        model, shown_dataset AS dataset, category, layer, mean_over(sum(entropy), count(*)) AS entropy
    FROM routing
    JOIN kept USING (model, dataset, run, prompt_id)
    WHERE among(model, getvariable('model'))
    GROUP BY model, shown_dataset, category, layer
)

SELECT
    model, dataset, category, layer,
    row_number() OVER (
        PARTITION BY model, dataset, category, layer ORDER BY n_chosen DESC, weight DESC, expert
    ) AS rank,
    expert_name(layer, expert) AS expert_name, expert,
    steady(100 * n_chosen / n_kept) AS chosen_percent,
    100 * wilson_low(n_chosen / n_kept, n_kept) AS chosen_percent_low,
    100 * wilson_high(n_chosen / n_kept, n_kept) AS chosen_percent_high,
    weight, entropy, n_kept AS n_prompts
FROM counted
LEFT JOIN entropies USING (model, dataset, category, layer)
QUALIFY rank <= getvariable('k')
ORDER BY model, dataset, category_order(category), layer, rank;
