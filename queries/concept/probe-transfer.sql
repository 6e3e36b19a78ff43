-- Probes applied to other datasets
-- After Marks and Tegmark, The Geometry of Truth (arXiv 2310.06824)
--
-- One row per model, layer and pair of datasets: probes fitted to source_dataset, applied to dataset. auc and accuracy
-- have 95 % intervals; accuracy is with the probe's own intercept, accuracy_refitted with one that predicts as many
-- prompts of each label as there are. n prompts were scored; n_left_out share a text or a group with the probe's training
-- part. Within one dataset they are those of its test part. cosine is between the two probes' directions. best marks
-- the layer at which the probe is most accurate on its own test part.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   layer       integer = all  layer, from 0; all layers side by side
--   variant
--   run
SELECT
    model, source_dataset, dataset, layer, 100 * layer / n_layers AS depth_percent, auc, auc_low, auc_high,
    accuracy, accuracy_low, accuracy_high, accuracy_refitted, cosine, n, n_left_out, split,
    coalesce(layer = best_layer, false) AS best
FROM probe_transfer
LEFT JOIN (
    SELECT
        model, dataset AS source_dataset, run AS probe_run, site, classifier, split,
        arg_max(layer, (accuracy, -layer)) AS best_layer
    FROM probe_scores
    GROUP BY ALL
) USING (model, source_dataset, probe_run, site, classifier, split)
JOIN chosen_runs('probe_transfer', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
JOIN models USING (model, dataset, run)
WHERE among(model, getvariable('model')) AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = CASE getvariable('classifier') WHEN 'default' THEN usual_classifier() ELSE getvariable('classifier') END
    AND (getvariable('layer') IS NULL OR layer = getvariable('layer'))
ORDER BY model, source_dataset, dataset, layer;
