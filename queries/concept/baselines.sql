-- Accuracy of the baselines with which probes are compared
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the paper has no baselines; these are of its datasets and splits
--
-- One row per model, dataset and baseline on the split, the best one first: the more frequent label of the training
-- part (majority), a bag of words, and the number of tokens. The interval of accuracy is Wilson's, that of auc
-- DeLong's, over n_test prompts. A probe that is not better than words may have found the words. A small below_chance_p
-- says that accuracy is below chance: then the split itself gives the labels away, with the wrong sign.
--
-- Parameters:
--   model
--   dataset texts
--   classifier
--   split
--   variant
--   run
SELECT
    model, dataset, split, baseline, accuracy, accuracy_low, accuracy_high, balanced_accuracy, auc, auc_low, auc_high,
    below_chance_p, n_train, n_test, n_groups
FROM baselines
SEMI JOIN chosen_probes(getvariable('classifier'), getvariable('split')) USING (model, dataset, run, split)
JOIN chosen_runs('baselines', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE among(model, getvariable('model')) AND among(dataset, getvariable('dataset'))
ORDER BY model, dataset, accuracy DESC, baseline;
