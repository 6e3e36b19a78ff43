-- Training step at which attention and FFN layers acquire each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 4, over checkpoints
--
-- One row per model, dataset, category, checkpoint whose revision contains a training step, and component: the sum over
-- layers of the mean log-probability increase in the kept prompts, and the layer with the largest score. Each
-- checkpoint counts the prompts that it knows; n_prompts is their number.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant   text = default  variant of the runs apart from the checkpoint, such as bfloat16
--   pool
WITH kept AS MATERIALIZED (
    SELECT model, dataset, run, step, revision, prompt_id, category
    FROM prompts
    JOIN checkpoints('layer_scores', getvariable('variant')) USING (model, dataset, run)
    WHERE kept
        AND among(model, getvariable('model'))
        AND among(category, getvariable('category'))
        AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
),

named AS (
    SELECT model, dataset, shown_dataset(getvariable('pool'), model, dataset) AS shown_dataset
    FROM (SELECT DISTINCT model, dataset FROM kept)
),

by_layer AS (
    SELECT
        model, shown_dataset AS dataset, category, step, revision, component, layer, count(*) AS n_prompts,
        mean_over(sum(score), count(*)) AS score
    FROM layer_scores
    JOIN kept USING (model, dataset, run, prompt_id)
    JOIN named USING (model, dataset)
    GROUP BY model, shown_dataset, category, step, revision, component, layer
)

SELECT
    model, dataset, category, step, revision, component, steady(sum(score)) AS score,
    layer_name(component, arg_max(layer, (score, -layer))) AS best_layer, max(score) AS best_score,
    max(n_prompts) AS n_prompts
FROM by_layer
GROUP BY model, dataset, category, step, revision, component
ORDER BY model, dataset, category_order(category), step, revision, component;
