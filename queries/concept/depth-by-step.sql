-- Training step and depth at which a model comes to know a concept
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the metrics J and C, over checkpoints
--
-- One row per model, dataset, site and checkpoint whose revision contains a training step: the best accuracy of any
-- layer, the layer that has it, depth_90 as in concept-depth, and the jump and converging points. NULL if a checkpoint
-- has no such point. J and C are the paper's, of its objective and split (logistic-raw, paper) unless a classifier or
-- split is given. By chance alone, most flat curves of 100 test prompts have a J, and on real ones C is nearly always
-- one of the last two layers.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier
--   split
--   variant     text = default       variant of the runs apart from the checkpoint, such as bfloat16
SELECT
    model, dataset, step, revision, site, n_layers, n_test, best_accuracy, best_layer, baseline, baseline_accuracy,
    depth_90_layer, 100 * depth_90_layer / n_layers::DOUBLE AS depth_90_percent,
    jump_layer, jump_percent, converging_layer, converging_percent
FROM _measures_of_all()
JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, classifier, split)
LEFT JOIN paper_points(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, site)
JOIN (SELECT model, dataset, run, n_layers FROM known_runs) USING (model, dataset, run)
JOIN checkpoints('probe_scores', getvariable('variant')) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND among(dataset, getvariable('dataset'))
    AND site = getvariable('site')
ORDER BY model, dataset, step, revision;
