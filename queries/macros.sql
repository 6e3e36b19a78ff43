-- Views and table macros that saved queries build on; kdb.duckdb has them too, for the shell.
-- The papers' quantities are computed here and nowhere else.

-- The newest run of each model, dataset and variant, for each table that it has rows in. A refit is newer
-- than the run it was computed from, but has probe_scores only: hence for each table.
CREATE VIEW current_runs AS
SELECT table_name, model, dataset, variant, run
FROM (SELECT unnest(tables) AS table_name, model, dataset, variant, run, finished_at FROM runs)
QUALIFY row_number() OVER (
    PARTITION BY table_name, model, dataset, variant ORDER BY finished_at DESC, run DESC
) = 1;

COMMENT ON VIEW current_runs IS 'table × model × dataset × variant';
COMMENT ON COLUMN current_runs.table_name IS 'table that the run has rows in';
COMMENT ON COLUMN current_runs.model IS 'model';
COMMENT ON COLUMN current_runs.dataset IS 'dataset';
COMMENT ON COLUMN current_runs.variant IS 'what sets the run apart from the plain one; ''default'' when nothing does';
COMMENT ON COLUMN current_runs.run IS 'the newest such run';

-- The runs that a query is about: the current ones of a variant, or, where a run is named, that run alone.
CREATE MACRO chosen_runs(wanted_table, wanted_variant, wanted_run) AS TABLE
SELECT model, dataset, variant, run
FROM current_runs
WHERE wanted_run IS NULL AND table_name = wanted_table AND variant = wanted_variant
UNION ALL
SELECT model, dataset, variant, run
FROM runs
WHERE run = wanted_run;

-- Variation rate β_i = α_i / α_{i-1} of the accuracy α (Jin et al., arXiv 2404.07066, section on metrics).
-- NULL at layer 0, after a layer that was not measured, and after an accuracy of 0.
CREATE MACRO variation_rates() AS TABLE
SELECT
    model, dataset, run, site, classifier, split, layer, depth, accuracy,
    CASE WHEN lag(layer) OVER by_layer = layer - 1 THEN accuracy / nullif(lag(accuracy) OVER by_layer, 0) END
        AS variation_rate
FROM probe_scores
WINDOW by_layer AS (PARTITION BY model, dataset, run, site, classifier, split ORDER BY layer);

-- Jump point J = min{ i/d : β_i ≥ 1.1 } and converging point C = max{ i/d : |β_i − 1| < 0.03 } (ibid.), where
-- d is the number of layers. Either may not exist: then it is NULL.
-- β is a ratio of counts; rounding keeps one that meets a threshold exactly from being decided by the last
-- bit of a double. Ratios that differ, differ by more than 1e-12.
CREATE MACRO concept_depth(jump_ratio := 1.1, convergence_tolerance := 0.03) AS TABLE
SELECT
    model, dataset, run, site, classifier, split, n_layers,
    jump_layer, jump_layer / n_layers::DOUBLE AS jump_point,
    converging_layer, converging_layer / n_layers::DOUBLE AS converging_point
FROM (
    SELECT
        model, dataset, run, site, classifier, split,
        min(layer) FILTER (round(variation_rate, 12) >= jump_ratio) AS jump_layer,
        max(layer) FILTER (round(abs(variation_rate - 1), 12) < convergence_tolerance) AS converging_layer
    FROM variation_rates()
    GROUP BY ALL
)
JOIN models USING (model, dataset, run);
