-- Positions of the prompts in two dimensions, layer by layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the pictures of hidden states by layer
--
-- One row per model, dataset, layer and prompt: its position along the first two principal components of the layer's
-- hidden states, and the share of their variance in percent. The layers are evenly spaced from the first to the last;
-- the prompts are spread over the dataset. `kdb project` computes the positions.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   method   text = pca         projection: pca or umap
--   layers   integer = 12       maximum number of layers
--   prompts  integer = 300      maximum number of prompts
--   variant
--   run
WITH chosen AS (
    SELECT model, dataset, run, n_layers, coalesce(source_run, run) AS source
    FROM known_runs
    JOIN chosen_runs('projections', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE among(model, getvariable('model')) AND among(dataset, getvariable('dataset'))
),

shown AS (
    SELECT DISTINCT model, dataset, run, round(i * (n_layers - 1) / greatest(getvariable('layers') - 1, 1))::SMALLINT AS layer
    FROM chosen, unnest(range(least(getvariable('layers'), n_layers))) AS step (i)
),

points AS (
    SELECT *, row_number() OVER (PARTITION BY model, dataset, run, layer ORDER BY md5(prompt_id::VARCHAR), prompt_id) AS place
    FROM projections
    JOIN chosen USING (model, dataset, run)
    SEMI JOIN shown USING (model, dataset, run, layer)
    WHERE site = getvariable('site') AND method = getvariable('method')
    QUALIFY place <= getvariable('prompts')
)

SELECT
    points.model, points.dataset, layer, n_layers, points.prompt_id, label, pc1, pc2,
    100 * explained1 AS explained1_percent, 100 * explained2 AS explained2_percent, text
FROM points
JOIN prompts
    ON prompts.model = points.model AND prompts.dataset = points.dataset AND prompts.run = points.source
    AND prompts.prompt_id = points.prompt_id
ORDER BY points.model, points.dataset, layer, points.prompt_id;
