-- From which layer on the answer is the model's first choice
-- nostalgebraist 2020, the logit lens
--
-- One row per model, dataset and category: the layer after which the answer is the most probable token of the readout, and
-- stays so to the last layer; its quartiles over the n_settled prompts in which there is one, of n_prompts kept ones.
-- The last readout is the model's own output. A tuned lens may lack a layer (`lens-fits`). percent is the median's depth, (layer + 1) / n_layers.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   lens
--   pool
WITH settled AS (
    SELECT
        model, shown_dataset, category, run, prompt_id, max(layer) + 1 AS n_layers,
        nullif(coalesce(max(layer) FILTER (target_rank > 1), -1) + 1, max(layer) + 1) AS layer
    FROM answer_ranks(
        getvariable('model'), getvariable('category'), getvariable('dataset'), getvariable('variant'),
        getvariable('run'), getvariable('lens'), wanted_pool := getvariable('pool')
    )
    GROUP BY ALL
)

SELECT
    model, shown_dataset AS dataset, category, quantile_disc(layer, 0.25) AS first_quartile,
    quantile_disc(layer, 0.5) AS median_layer, quantile_disc(layer, 0.75) AS third_quartile,
    100 * (quantile_disc(layer, 0.5) + 1) / max(n_layers)::DOUBLE AS percent,
    count(layer) AS n_settled, count(*) AS n_prompts
FROM settled
GROUP BY model, shown_dataset, category
ORDER BY model, dataset, category_order(category);
