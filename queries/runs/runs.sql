-- Runs that were measured, with date and variant
-- The warehouse itself
--
-- One row per run, in the order in which they were finished.
--
-- Parameters:
--   model
--   dataset
--   study
SELECT
    run, model, dataset, variant, study, source_run, round(seconds, 1) AS seconds,
    strftime(finished_at, '%Y-%m-%d %H:%M') AS finished_utc, left(revision, 12) AS revision, imported_from, preferred
FROM runs
LEFT JOIN (SELECT model, dataset, run, revision FROM models) USING (model, dataset, run)
WHERE among(model, getvariable('model'))
    AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
    AND (getvariable('study') IS NULL OR study = getvariable('study'))
ORDER BY finished_at, run;
