-- What the probe says of every test prompt, at every layer
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the predictions z that accuracy counts
--
-- One row per model, dataset, layer and test prompt, in no order.
--
-- Parameters:
--   model       texts = all        models, side by side
--   dataset     texts = all        datasets
--   site        text = resid_post  where the hidden state is read: resid_post or ffn_norm
--   classifier  text = logistic    logistic, logistic-paper, logistic-standardised or random-forest
--   split       text = paper       paper, stratified-SEED or grouped
--   variant     text = default     newest runs of this variant; `kdb runs` lists them
--   run         text = all         this run alone, whatever its variant
SELECT model, dataset, run, layer, n_layers, prompt_id, predicted, correct
FROM probe_predictions
JOIN (SELECT model, dataset, run, n_layers FROM known_runs) USING (model, dataset, run)
JOIN chosen_runs('probe_predictions', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split');
