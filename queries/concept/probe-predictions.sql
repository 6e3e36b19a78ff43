-- What the probe says of every test prompt, at every layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the predictions z that accuracy counts
--
-- One row per model, dataset, layer and test prompt. place numbers the test prompts of a run from 0.
--
-- Parameters:
--   model       texts = all        models, side by side
--   dataset     texts = all        datasets
--   site        text = resid_post  where the hidden state is read: resid_post or ffn_norm
--   classifier  text = logistic    logistic, logistic-paper, logistic-standardised or random-forest
--   split       text = paper       paper, stratified-SEED or grouped
--   variant     text = default     newest runs of this variant; `kdb runs` lists them
--   run         text = all         this run alone, whatever its variant
WITH predictions AS (
    SELECT model, dataset, run, prompt_id, layer, predicted, correct
    FROM probe_predictions
    JOIN chosen_runs('probe_predictions', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE among(model, getvariable('model'))
        AND among(dataset, getvariable('dataset'))
        AND site = getvariable('site')
        AND classifier = getvariable('classifier')
        AND split = getvariable('split')
),

places AS (
    SELECT run, prompt_id, row_number() OVER (PARTITION BY run ORDER BY prompt_id) - 1 AS place
    FROM (SELECT DISTINCT run, prompt_id FROM predictions)
)

SELECT model, dataset, layer, n_layers, prompt_id, place, predicted, correct
FROM predictions
JOIN places USING (run, prompt_id)
JOIN models USING (model, dataset, run)
ORDER BY model, dataset, layer, place;
