-- Layers with the largest direct contribution to each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 4
--
-- One row per model, dataset, category and rank: the attention and FFN layers, ranked together, with the largest mean
-- log-probability increase of the right token over the n_prompts kept prompts. Layers are numbered from 0; a23 is
-- attention layer 23, f29 is FFN layer 29.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k         integer = 10    number of layers per category and dataset
SELECT
    model, dataset, category,
    row_number() OVER (PARTITION BY model, dataset, category ORDER BY score DESC, layer, component) AS rank,
    layer_name(component, layer) AS layer_name, component, layer, score, n_prompts
FROM mean_layer_scores(
    getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
)
QUALIFY rank <= getvariable('k')
ORDER BY model, dataset, category_order(category), rank;
