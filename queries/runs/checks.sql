-- Checks of the reliability of each run
-- Runs of both studies, compared on a few chosen prompts with the loaded model, which runs one prompt at a time
--
-- One row per run and check: those that did not pass first, then the checks of each run in the order in which their
-- details refer to each other. Counts of prompts (doubled_bos, repeated_texts, …) are last; they have no
-- tolerance, so passed is NULL. Models, weight formats and devices are shown side by side.
--
-- Parameters:
--   model
--   dataset
--   study
--   variant  text = all   variant of the runs (`kdb runs`); the newest ones are used
--   run
SELECT
    model, dtype, quantization, device, dataset, study, runs.variant, "check", value, tolerance, passed, detail
FROM checks
JOIN chosen_runs('checks', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
JOIN runs USING (model, dataset, run)
LEFT JOIN models USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
    AND (getvariable('study') IS NULL OR study = getvariable('study'))
ORDER BY model, passed IS false DESC, dataset, study, runs.variant, run, check_order("check");
