-- Changes of J and C with their thresholds, the probe and the split
-- Jin et al., Exploring Concept Depth (arXiv 2404.07066): the metrics J and C, and what they depend on
--
-- One row per model, dataset, point (J or C) and condition. Conditions vary one thing at a time: the threshold (for J,
-- the smallest rate that is a jump; for C, the largest change), the classifier, or the split. The condition published
-- is that of the paper: thresholds 1.1 and 0.03, with the given classifier and split. moved_percent is the distance
-- from the published point in percent of depth; NULL if either does not exist. By chance alone, most flat curves of 100
-- test prompts have a J, and on real ones C is nearly always one of the last two layers.
--
-- Parameters:
--   model
--   dataset texts
--   site
--   classifier  text = logistic-raw classifier of the rows in which the split or a threshold varies
--   split       text = paper        split of the rows in which the classifier or a threshold varies
--   variant
--   run
WITH thresholds AS (
    SELECT 'J' AS point, unnest([1.1, 1.02, 1.05, 1.15, 1.2]) AS threshold
    UNION ALL
    SELECT 'C', unnest([0.03, 0.01, 0.02, 0.05, 0.1])
),

rates AS (
    SELECT model, dataset, run, site, classifier, split, layer, variation_rate
    FROM _rates_of_all()
    JOIN chosen_runs('probe_scores', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
    WHERE among(model, getvariable('model'))
        AND among(dataset, getvariable('dataset'))
        AND site = getvariable('site')
        AND (classifier = getvariable('classifier') OR split = getvariable('split'))
),

points AS (
    SELECT
        model, dataset, run, site, classifier, split, point, threshold,
        coalesce(
            min(layer) FILTER (point = 'J' AND is_jump(variation_rate, threshold)),
            max(layer) FILTER (point = 'C' AND has_converged(variation_rate, threshold))
        ) AS layer
    FROM rates, thresholds
    WHERE (classifier = getvariable('classifier') AND split = getvariable('split')) OR threshold IN (1.1, 0.03)
    GROUP BY ALL
),

conditions AS (
    SELECT
        *, 100 * layer / n_layers AS percent,
        threshold IN (1.1, 0.03) AS usual,
        CASE
            WHEN NOT usual THEN 'threshold'
            WHEN classifier != getvariable('classifier') THEN 'classifier'
            WHEN split != getvariable('split') THEN 'split'
            ELSE 'published'
        END AS varied
    FROM points
    JOIN known_runs USING (model, dataset, run)
)

SELECT
    model, dataset, site, point, varied,
    CASE varied
        WHEN 'threshold' THEN threshold::DECIMAL(4, 2)::VARCHAR
        WHEN 'classifier' THEN classifier
        WHEN 'split' THEN split
        ELSE 'published'
    END AS condition,
    n_layers, layer, percent,
    percent - max(percent) FILTER (varied = 'published') OVER (PARTITION BY model, dataset, point) AS moved_percent
FROM conditions
ORDER BY
    model, dataset, point DESC,
    list_position(['published', 'threshold', 'classifier', 'split'], varied), threshold, condition;
