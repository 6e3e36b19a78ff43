-- Training step and depth at which a model comes to know a concept
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the metrics J and C, over checkpoints
--
-- One row per model, dataset, site and checkpoint whose revision contains a training step: the best accuracy of any
-- layer, the layer that has it, and the jump and converging points. NULL if a checkpoint has no such point.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant     text = default       variant of the runs apart from the checkpoint, such as bfloat16
WITH best AS (
    SELECT
        model, dataset, run, site, classifier, split, max(accuracy) AS best_accuracy,
        arg_max(layer, (accuracy, -layer)) AS best_layer
    FROM probe_scores
    GROUP BY ALL
)

SELECT
    model, dataset, step, revision, site, n_layers, best_accuracy, best_layer, jump_layer, 100 * jump_point AS jump_percent,
    converging_layer, 100 * converging_point AS converging_percent
FROM best
JOIN _depths_of_all() USING (model, dataset, run, site, classifier, split)
JOIN checkpoints('probe_scores', getvariable('variant')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
    AND classifier = getvariable('classifier')
    AND split = getvariable('split')
ORDER BY model, dataset, step, revision;
