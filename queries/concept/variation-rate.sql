-- Change of accuracy from one layer to the next
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the variation rate β
--
-- One row per model, dataset and layer: β is the layer's accuracy divided by that of the layer before. It is NULL at
-- layer 0.
--
-- Parameters:
--   model       texts = all        names of models, shown side by side
--   dataset     texts = all        names of datasets
--   site        text = resid_post  where the hidden state is read: resid_post or ffn_norm
--   classifier  text = logistic    classifier: logistic, logistic-paper or random-forest
--   split       text = paper       split: paper, stratified-SEED or grouped
--   variant     text = default     variant of the runs (`kdb runs`); the newest ones are used
--   run         text = all         id of a single run to use, of any variant
SELECT model, dataset, site, layer, 100 * depth AS depth_percent, accuracy, variation_rate
FROM _rates_of_all()
JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
ORDER BY model, dataset, layer;
