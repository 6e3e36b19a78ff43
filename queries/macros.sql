-- Views and table macros on which the saved queries depend; kdb.duckdb has them, too, for the DuckDB shell.
-- The papers' quantities are computed only here.

-- All runs, with the columns that decide whether each is current. standing: 1 for a run imported with
-- --prefer-imported, 2 for one measured here, 3 for any other imported one. since: the time at which it was finished,
-- but for an imported run not later than its import, so that a date in the future gives no precedence. Two models may
-- be stored under one name; they differ in their revision. shown_revision is the one that is shown for each variant:
-- that of the newest measured run with the best standing.
CREATE VIEW _known_runs AS
SELECT
    *,
    first_value(revision) OVER (
        PARTITION BY model, variant
        ORDER BY standing, source_run IS NOT NULL, since DESC NULLS LAST, run DESC, dataset
    ) AS shown_revision
FROM (
    SELECT
        model, dataset, run, study, variant, source_run, tables,
        CASE WHEN imported_from IS NULL THEN 2 WHEN preferred THEN 1 ELSE 3 END AS standing,
        least(finished_at, imported_at) AS since,
        coalesce(revision, '') AS revision, n_layers
    FROM runs
    LEFT JOIN models USING (model, dataset, run)
);

-- kdb itself replaces this view by a table, so that a query reads the runs only once.
CREATE VIEW known_runs AS
FROM _known_runs;

COMMENT ON VIEW known_runs IS 'run, with the columns that decide whether it is current';

-- The newest run of each study, model, dataset and variant, for each table in which it has rows. For each table,
-- because a refit is newer than its source run, but has only probe_scores. For each study, because both write prompts
-- and checks.
CREATE VIEW current_runs AS
SELECT table_name, study, model, dataset, variant, run
FROM (
    SELECT unnest(tables) AS table_name, study, model, dataset, variant, run, standing, since
    FROM known_runs
    WHERE revision = shown_revision
)
QUALIFY row_number() OVER (
    PARTITION BY table_name, study, model, dataset, variant ORDER BY standing, since DESC NULLS LAST, run DESC
) = 1;

COMMENT ON VIEW current_runs IS 'table × study × model × dataset × variant';
COMMENT ON COLUMN current_runs.table_name IS 'table in which the run has rows';
COMMENT ON COLUMN current_runs.study IS 'concept or knowledge';
COMMENT ON COLUMN current_runs.model IS 'model';
COMMENT ON COLUMN current_runs.dataset IS 'dataset';
COMMENT ON COLUMN current_runs.variant IS 'settings that differ from the default ones; ''default'' if none do';
COMMENT ON COLUMN current_runs.run IS 'newest such run of one revision of the model; local runs take precedence over imported ones';

-- The runs that are not current, although they were not measured again. The reason is 'revision' for runs of another
-- model that is stored under the same name. It is 'imported' for imported runs that local runs replace, and 'own' for
-- local runs that imported ones with --prefer-imported replace.
CREATE VIEW shadowed_runs AS
SELECT
    model, dataset, run, study, variant, revision, shown_revision,
    CASE WHEN revision != shown_revision THEN 'revision' WHEN standing = 3 THEN 'imported' ELSE 'own' END AS reason
FROM (
    SELECT
        *,
        min(standing) FILTER (revision = shown_revision) OVER (
            PARTITION BY study, model, dataset, variant
        ) AS first_standing
    FROM known_runs
)
ANTI JOIN current_runs USING (model, dataset, run, study, variant)
WHERE revision != shown_revision OR standing > first_standing;

COMMENT ON VIEW shadowed_runs IS 'run that is not shown because a run of another revision or origin is shown';

-- The runs that a query uses: the current ones of a variant (or of all, if it is NULL), or only the run that is given.
CREATE MACRO chosen_runs(wanted_table, wanted_variant, wanted_run) AS TABLE
SELECT model, dataset, variant, run
FROM current_runs
WHERE wanted_run IS NULL AND table_name = wanted_table AND (wanted_variant IS NULL OR variant = wanted_variant)
UNION ALL
SELECT model, dataset, variant, run
FROM known_runs
WHERE run = wanted_run;

-- The name of a variant without its revision.
CREATE MACRO without_revision(variant) AS
    coalesce(nullif(trim(regexp_replace(variant, 'revision=\S+', '')), ''), 'default');

-- The newest run of each checkpoint whose revision contains a training step, among runs whose variant is the given one
-- apart from the revision.
CREATE MACRO checkpoints(wanted_table, wanted_variant) AS TABLE
SELECT
    model, dataset, run, json_extract_string(settings, '$.step')::BIGINT AS step,
    regexp_extract(variant, 'revision=(\S+)', 1) AS revision
FROM current_runs
JOIN runs USING (model, dataset, variant, run)
WHERE table_name = wanted_table
    AND json_extract_string(settings, '$.step') IS NOT NULL
    AND without_revision(variant) = wanted_variant;

-- Whether a name is in the given list; NULL means all names. (In DuckDB 1, a variable set to NULL is an INTEGER.)
CREATE MACRO among(name, names) AS names IS NULL OR list_contains(names::VARCHAR[], name);

-- A sum of doubles, rounded, because its last bits depend on the order in which threads add; ranks must not depend on
-- it.
CREATE MACRO steady(total) AS round(total, 12);

CREATE MACRO mean_over(total, n) AS steady(total / n);

-- Concept depth ---------------------------------------------------------------------------------------------------

-- Variation rate β_i = α_i / α_{i-1} of the accuracy α (Jin et al., arXiv 2404.07066, section on metrics).
-- NULL at layer 0, after a layer that was not measured, and after a layer with an accuracy of 0.
CREATE MACRO _rates_of_all() AS TABLE
SELECT
    model, dataset, run, site, classifier, split, layer, depth, accuracy,
    CASE WHEN lag(layer) OVER by_layer = layer - 1 THEN accuracy / nullif(lag(accuracy) OVER by_layer, 0) END
        AS variation_rate
FROM probe_scores
WINDOW by_layer AS (PARTITION BY model, dataset, run, site, classifier, split ORDER BY layer);

-- Whether a variation rate is a jump, and whether accuracy has converged there (ibid.). β is a ratio of counts. It is
-- rounded, so that the last bit of a double does not decide whether it meets a threshold exactly. Different ratios
-- differ by more than 1e-12.
CREATE MACRO is_jump(variation_rate, jump_ratio) AS round(variation_rate, 12) >= jump_ratio;

CREATE MACRO has_converged(variation_rate, tolerance) AS round(abs(variation_rate - 1), 12) < tolerance;

-- Jump point J = min{ i/d : β_i ≥ 1.1 } and converging point C = max{ i/d : |β_i − 1| < 0.03 } (ibid.), where
-- d is the number of layers. A point that does not exist is NULL.
CREATE MACRO _depths_of_all(jump_ratio := 1.1, convergence_tolerance := 0.03) AS TABLE
SELECT
    model, dataset, run, site, classifier, split, n_layers,
    jump_layer, jump_layer / n_layers::DOUBLE AS jump_point,
    converging_layer, converging_layer / n_layers::DOUBLE AS converging_point
FROM (
    SELECT
        model, dataset, run, site, classifier, split,
        min(layer) FILTER (is_jump(variation_rate, jump_ratio)) AS jump_layer,
        max(layer) FILTER (has_converged(variation_rate, convergence_tolerance)) AS converging_layer
    FROM _rates_of_all()
    GROUP BY ALL
)
JOIN known_runs USING (model, dataset, run);

-- kdb.queries.domains.DEFAULT_CLASSIFIER, for runs that mark none of their probes as the default.
CREATE MACRO usual_classifier() AS 'logistic';

-- The probes that a query shows: the given classifier and split, each of which may be 'default'. The default ones of a
-- run are those of its rows with is_default.
CREATE MACRO chosen_probes(wanted_classifier, wanted_split) AS TABLE
SELECT model, dataset, run, classifier, split
FROM (
    SELECT
        *,
        coalesce(
            min(split) FILTER (by_default) OVER (PARTITION BY model, dataset, run),
            CASE WHEN bool_or(split = 'grouped') OVER (PARTITION BY model, dataset, run) THEN 'grouped' ELSE 'paper' END
        ) AS default_split,
        min(classifier) FILTER (by_default) OVER (PARTITION BY model, dataset, run) AS default_classifier
    FROM (
        SELECT model, dataset, run, classifier, split, coalesce(bool_or(is_default), false) AS by_default
        FROM probe_scores
        GROUP BY ALL
    )
)
WHERE classifier = CASE wanted_classifier
    WHEN 'default' THEN coalesce(default_classifier, usual_classifier()) ELSE wanted_classifier
END
    AND split = CASE wanted_split WHEN 'default' THEN default_split ELSE wanted_split END;

-- The probes of one run that have weights, and of which model they are: those of one layer and site, or of all if these
-- are NULL. accuracy, auc and scale are those of the probe's own test and training parts.
CREATE MACRO stored_probes(
    wanted_model, wanted_dataset, wanted_layer, wanted_site, wanted_classifier, wanted_split, wanted_variant
) AS TABLE
SELECT
    model, dataset, run, layer, site, classifier, split, weights, intercept, scale, accuracy, auc,
    revision, dtype, quantization, n_layers
FROM probe_weights
JOIN probe_scores USING (model, dataset, run, layer, site, classifier, split)
JOIN chosen_probes(wanted_classifier, wanted_split) USING (model, dataset, run, classifier, split)
JOIN chosen_runs('probe_weights', wanted_variant, NULL) USING (model, dataset, run)
JOIN models USING (model, dataset, run)
WHERE model = wanted_model AND dataset = wanted_dataset
    AND (wanted_layer IS NULL OR layer = wanted_layer)
    AND (wanted_site IS NULL OR site = wanted_site)
ORDER BY site DESC, layer;

-- J and C of every run and site: unless a classifier or split is given, those of the paper's objective (logistic-raw)
-- on its split.
CREATE MACRO paper_points(wanted_classifier, wanted_split, jump_ratio := 1.1, convergence_tolerance := 0.03) AS TABLE
SELECT
    model, dataset, run, site, jump_layer, 100 * jump_point AS jump_percent,
    converging_layer, 100 * converging_point AS converging_percent
FROM _depths_of_all(jump_ratio := jump_ratio, convergence_tolerance := convergence_tolerance)
WHERE classifier = CASE wanted_classifier WHEN 'default' THEN 'logistic-raw' ELSE wanted_classifier END
    AND split = CASE wanted_split WHEN 'default' THEN 'paper' ELSE wanted_split END;

-- The baseline with the best accuracy on each split of each run.
CREATE MACRO best_baselines() AS TABLE
SELECT
    model, dataset, run, split, arg_max(baseline, (accuracy, baseline)) AS baseline, max(accuracy) AS baseline_accuracy
FROM baselines
GROUP BY ALL;

-- Whether the best layer is better than the best baseline, although it is the best of many: by more than 3.09 standard
-- errors of the difference of two independent shares, which is Bonferroni's bound at the level 5 % for 50 layers.
CREATE MACRO beats_baseline(accuracy, baseline_accuracy, n) AS
    accuracy - baseline_accuracy
        > 3.09 * sqrt((accuracy * (1 - accuracy) + baseline_accuracy * (1 - baseline_accuracy)) / n);

-- Measures of each curve: the best layer, the first layer within one binomial standard error of it, depth_90 (the first
-- layer at which 90 % of the way from the best baseline to the best layer is made; NULL unless the best layer beats the
-- baseline), and the area between curve and baseline, a mean over layers.
CREATE MACRO _measures_of_all() AS TABLE
WITH best AS (
    SELECT
        model, dataset, run, site, classifier, split, max(accuracy) AS best_accuracy,
        arg_max(layer, (accuracy, -layer)) AS best_layer,
        arg_max(accuracy_low, (accuracy, -layer)) AS best_accuracy_low,
        arg_max(accuracy_high, (accuracy, -layer)) AS best_accuracy_high, max(n_test) AS n_test,
        mean_over(sum(accuracy), count(*)) AS mean_accuracy
    FROM probe_scores
    GROUP BY ALL
),

beside AS (
    SELECT
        *,
        best_accuracy - sqrt(best_accuracy * (1 - best_accuracy) / n_test) AS within,
        CASE WHEN beats_baseline(best_accuracy, baseline_accuracy, n_test)
            THEN baseline_accuracy + 0.9 * (best_accuracy - baseline_accuracy) END AS threshold
    FROM best
    LEFT JOIN best_baselines() USING (model, dataset, run, split)
)

SELECT
    model, dataset, run, site, classifier, split, beside.n_test, best_layer,
    best_accuracy, best_accuracy_low, best_accuracy_high,
    min(layer) FILTER (round(accuracy, 12) >= round(within, 12)) AS first_within_one_se,
    baseline, baseline_accuracy,
    min(layer) FILTER (round(accuracy - threshold, 12) >= 0) AS depth_90_layer,
    mean_accuracy - baseline_accuracy AS area
FROM probe_scores
JOIN beside USING (model, dataset, run, site, classifier, split)
GROUP BY ALL;

-- A macro with the name of a saved query computes its answer. It has the same parameters and defaults. A parameter with
-- the name of a column has the prefix wanted_.
CREATE MACRO concept_depth(
    wanted_model := NULL, wanted_dataset := NULL, wanted_site := NULL, wanted_classifier := 'default',
    wanted_split := 'default', wanted_variant := 'default', wanted_run := NULL, jump_ratio := 1.1,
    convergence_tolerance := 0.03
) AS TABLE
SELECT
    model, dataset, site, classifier, split, n_layers, n_test,
    best_layer, 100 * best_layer / n_layers::DOUBLE AS best_percent,
    best_accuracy, best_accuracy_low, best_accuracy_high, baseline, baseline_accuracy, area,
    depth_90_layer, 100 * depth_90_layer / n_layers::DOUBLE AS depth_90_percent, first_within_one_se,
    jump_layer, jump_percent, converging_layer, converging_percent
FROM _measures_of_all()
JOIN chosen_probes(wanted_classifier, wanted_split) USING (model, dataset, run, classifier, split)
LEFT JOIN paper_points(
    wanted_classifier, wanted_split, jump_ratio := jump_ratio, convergence_tolerance := convergence_tolerance
) USING (model, dataset, run, site)
JOIN chosen_runs('probe_scores', wanted_variant, wanted_run) USING (model, dataset, run)
JOIN (SELECT model, dataset, run, n_layers FROM known_runs) USING (model, dataset, run)
WHERE among(model, wanted_model)
    AND among(dataset, wanted_dataset)
    AND (wanted_site IS NULL OR site = wanted_site)
ORDER BY model, dataset, site DESC;

-- The ends of the 95 % interval of a share p of n (Wilson 1927); those in probe_scores are computed by SciPy and equal.
CREATE MACRO wilson_end(p, n, z) AS
    (p + z * z / (2 * n) + z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n);

CREATE MACRO wilson_low(p, n) AS wilson_end(p, n, -1.959963984540054);

CREATE MACRO wilson_high(p, n) AS wilson_end(p, n, 1.959963984540054);

-- Half the distance that the mean of two independent shares may move to one side, from the distances to which each may
-- (Newcombe 1998, method 10, for a sum); the 95 % interval of balanced accuracy.
CREATE MACRO half_of_both(a, b) AS sqrt(a * a + b * b) / 2;

-- Balanced accuracy of the chosen probes from their predictions, with its interval. Both columns give the true label.
CREATE MACRO balanced_accuracies(wanted_models, wanted_site, wanted_classifier, wanted_split) AS TABLE
SELECT
    model, dataset, run, layer, (positive + negative) / 2 AS balanced_accuracy,
    (positive + negative) / 2
        - half_of_both(positive - wilson_low(positive, n_positive), negative - wilson_low(negative, n_negative))
        AS balanced_accuracy_low,
    (positive + negative) / 2
        + half_of_both(wilson_high(positive, n_positive) - positive, wilson_high(negative, n_negative) - negative)
        AS balanced_accuracy_high
FROM (
    SELECT
        model, dataset, run, layer,
        avg(correct::INTEGER) FILTER (correct = (predicted = 1)) AS positive,
        count(*) FILTER (correct = (predicted = 1)) AS n_positive,
        avg(correct::INTEGER) FILTER (correct != (predicted = 1)) AS negative,
        count(*) FILTER (correct != (predicted = 1)) AS n_negative
    FROM probe_predictions
    SEMI JOIN chosen_probes(wanted_classifier, wanted_split) USING (model, dataset, run, classifier, split)
    WHERE among(model, wanted_models) AND site = wanted_site
    GROUP BY ALL
);

-- Correct and wrong predictions of each baseline for the test prompts of the chosen split, in the order of prompt_id.
CREATE MACRO baseline_outcomes(wanted_models, wanted_classifier, wanted_split) AS TABLE
SELECT model, dataset, run, baseline, string_agg(correct::TINYINT, '' ORDER BY prompt_id) AS outcomes
FROM baseline_predictions
SEMI JOIN chosen_probes(wanted_classifier, wanted_split) USING (model, dataset, run, split)
WHERE among(model, wanted_models)
GROUP BY ALL
ORDER BY ALL;

-- Test prompts of the chosen split in the order of prompt_id, and the group of each; NULL without groups. A refit has the
-- prompts of its source run.
CREATE MACRO test_prompts(wanted_models, wanted_site, wanted_classifier, wanted_split) AS TABLE
SELECT
    tested.model, tested.dataset, tested.run, list(tested.prompt_id ORDER BY tested.prompt_id) AS prompts,
    list(group_id ORDER BY tested.prompt_id) AS groups
FROM (
    SELECT DISTINCT model, dataset, run, coalesce(source_run, run) AS source, prompt_id
    FROM probe_predictions
    SEMI JOIN chosen_probes(wanted_classifier, wanted_split) USING (model, dataset, run, classifier, split)
    JOIN known_runs USING (model, dataset, run)
    WHERE among(model, wanted_models) AND site = wanted_site AND layer = 0
) AS tested
LEFT JOIN prompts
    ON prompts.model = tested.model AND prompts.dataset = tested.dataset AND prompts.run = source
    AND prompts.prompt_id = tested.prompt_id
GROUP BY ALL;

-- Prompts of a run, or of the run from which it was computed, with the text of each one's example: without the template
-- and the noise before the text. copy numbers prompts with the same text, label and answer.
CREATE MACRO example_texts(wanted_run) AS TABLE
WITH source AS (SELECT model, dataset, coalesce(source_run, run) AS run FROM known_runs WHERE run = wanted_run),

filled AS (
    SELECT
        prompt_id, label, answer, noise,
        substr(
            text, length(split_part(filling, '{text}', 1)) + 1,
            (length(text) - length(replace(filling, '{text}', ''))) // (len(string_split(filling, '{text}')) - 1)
        ) AS text
    FROM prompts
    JOIN (SELECT model, dataset, run, coalesce(template, '{text}') AS filling FROM datasets) USING (model, dataset, run)
    JOIN (SELECT model, dataset, run, noise FROM runs) USING (model, dataset, run)
    SEMI JOIN source USING (model, dataset, run)
),

examples AS (
    SELECT
        prompt_id, label, answer,
        -- noise is stored as 'aaa or bbb'
        CASE WHEN noise IS NULL THEN text
            ELSE regexp_replace(text, '^(' || replace(noise, ' or ', '|') || ') ', '') END AS text
    FROM filled
)

SELECT
    prompt_id, label, answer, text, row_number() OVER (PARTITION BY text, label, answer ORDER BY prompt_id) AS copy
FROM examples;

-- Checks ----------------------------------------------------------------------------------------------------------

-- Sort key of checks: in the order in which the details of some refer to others ('the same for …').
CREATE MACRO check_order("check") AS (
    coalesce(
        list_position(
            [
                'resid_post', 'final_norm', 'readout', 'readout_kl', 'stored_states', 'stored_answers', 'stored_probs',
                'logits', 'logits_kl', 'residual_sum', 'head_sum', 'ffn_sum', 'value_keys', 'ffn_keys',
                'frozen_readout', 'frozen_readout_kl', 'head_positions',
                'ffn_neurons', 'layer_score_sum'
            ],
            "check"
        ),
        20
    ),
    "check"
);

-- Knowledge attribution -------------------------------------------------------------------------------------------

-- Sort key of categories: the paper's six in its order, then others by name.
CREATE MACRO category_order(category) AS (
    coalesce(list_position(['language', 'color', 'number', 'capital', 'country', 'month'], category), 7), category
);

-- Names as in the paper's tables: a23 and f29 for layers, a23.12 for heads, f29_1234 and a23.12_45 for neurons. f29.3 is
-- expert 3 of FFN layer 29, and f29.3_45 its neuron 45. m5 is the mixer of layer 5.
CREATE MACRO layer_name(component, layer) AS
    CASE component
        WHEN 'attn' THEN 'a' || layer WHEN 'ffn' THEN 'f' || layer WHEN 'mixer' THEN 'm' || layer ELSE component
    END;

CREATE MACRO head_name(layer, head) AS layer_name('attn', layer) || '.' || head;

CREATE MACRO expert_name(layer, expert) AS layer_name('ffn', layer) || '.' || expert;

CREATE MACRO neuron_name(component, layer, head, expert, neuron) AS
    CASE component WHEN 'attn' THEN head_name(layer, head)
        ELSE coalesce(expert_name(layer, expert), layer_name(component, layer)) END || '_' || neuron;

-- The neuron with such a name.
CREATE MACRO named_neuron(name) AS TABLE
SELECT
    CASE name[1] WHEN 'a' THEN 'attn' ELSE 'ffn' END AS component,
    regexp_extract(name, '^[af](\d+)', 1)::INTEGER AS layer,
    nullif(regexp_extract(name, '^a\d+\.(\d+)_', 1), '')::INTEGER AS head,
    nullif(regexp_extract(name, '^f\d+\.(\d+)_', 1), '')::INTEGER AS expert,
    regexp_extract(name, '_(\d+)$', 1)::INTEGER AS neuron
WHERE regexp_full_match(name, '(f\d{1,5}(\.\d{1,5})?|a\d{1,5}\.\d{1,5})_\d{1,8}');

-- The number of members that two lists share, and their Jaccard index |a ∩ b| / |a ∪ b|.
CREATE MACRO n_shared(a, b) AS len(list_intersect(a, b));

CREATE MACRO jaccard(a, b) AS n_shared(a, b) / (len(a) + len(b) - n_shared(a, b))::DOUBLE;

-- How many members two lists of a and of b drawn at random from n share on average: k * k / n for two lists of k.
CREATE MACRO shared_by_chance(a, b, n) AS a * b / nullif(n, 0)::DOUBLE;

-- Logarithm of the number of ways to choose k of n.
CREATE MACRO _log_choose(n, k) AS lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1);

-- Mean Jaccard index of two such lists; the number that they share has a hypergeometric distribution.
CREATE MACRO jaccard_by_chance(a, b, n) AS
    CASE WHEN n >= greatest(a, b) THEN steady(list_sum(list_transform(
        range(greatest(0, a + b - n), least(a, b) + 1),
        lambda x: x / (a + b - x) * exp(_log_choose(a, x) + _log_choose(n - a, b - x) - _log_choose(n, b))
    ))) END;

-- The name under which the prompts of a dataset are shown and ranked: its own. With pool, the prompts of all datasets
-- of a model are added up, and the name lists them, such as 'knowledge + relations'. Whether datasets are added up is
-- decided only here. It is a window over the rows of a query: few rows, since DuckDB reads what is behind them twice.
CREATE MACRO shown_dataset(pool, model, dataset) AS
    CASE WHEN pool THEN string_agg(DISTINCT dataset, ' + ' ORDER BY dataset) OVER (PARTITION BY model)
        ELSE dataset END;

-- The kept prompts of the given categories, from the chosen runs that have a table. n_kept is the number of those of
-- the model and category that are shown together. For a derived run without prompts, those of its source run are used.
CREATE MACRO _kept_prompts(
    wanted_table, wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_pool := false
) AS TABLE
WITH chosen AS (
    SELECT model, dataset, run, CASE WHEN list_contains(tables, 'prompts') THEN run ELSE source_run END AS prompts_run
    FROM known_runs
    JOIN chosen_runs(wanted_table, wanted_variant, wanted_run) USING (model, dataset, run)
    WHERE among(model, wanted_models) AND (wanted_dataset IS NULL OR dataset = wanted_dataset)
),

found AS MATERIALIZED (
    SELECT chosen.model, chosen.dataset, chosen.run, prompt_id, category
    FROM prompts
    JOIN chosen ON prompts.model = chosen.model AND prompts.dataset = chosen.dataset AND prompts.run = prompts_run
    WHERE kept AND among(category, wanted_categories)
),

named AS (
    SELECT model, dataset, shown_dataset(wanted_pool, model, dataset) AS shown_dataset
    FROM (SELECT DISTINCT model, dataset FROM found)
)

SELECT
    model, dataset, run, prompt_id, category, shown_dataset,
    count(*) OVER (PARTITION BY model, shown_dataset, category) AS n_kept
FROM found
JOIN named USING (model, dataset);

-- Mean score of every layer output over the kept prompts (Yu and Ananiadou, arXiv 2312.12141, table 4).
CREATE MACRO mean_layer_scores(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_pool := false
) AS TABLE
SELECT
    model, shown_dataset AS dataset, category, component, layer,
    mean_over(sum(score), count(*)) AS score, count(*) AS n_prompts
FROM layer_scores
JOIN _kept_prompts(
    'layer_scores', wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run,
    wanted_pool := wanted_pool
) USING (model, dataset, run, prompt_id)
WHERE among(model, wanted_models)
GROUP BY model, shown_dataset, category, component, layer;

-- Heads by mean score over the kept prompts (ibid., table 10).
CREATE MACRO ranked_heads(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_pool := false
) AS TABLE
SELECT *, row_number() OVER (PARTITION BY model, dataset, category ORDER BY score DESC, layer, head) AS rank
FROM (
    SELECT
        model, shown_dataset AS dataset, category, layer, head,
        mean_over(sum(score), count(*)) AS score, count(*) AS n_prompts
    FROM head_scores
    JOIN _kept_prompts(
        'head_scores', wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run,
        wanted_pool := wanted_pool
    ) USING (model, dataset, run, prompt_id)
    WHERE among(model, wanted_models)
    GROUP BY model, shown_dataset, category, layer, head
);

-- Experts by mean score over the kept prompts. An expert counts as 0 in a prompt in which it is not used.
CREATE MACRO ranked_experts(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_pool := false
) AS TABLE
SELECT *, row_number() OVER (PARTITION BY model, dataset, category ORDER BY score DESC, layer, expert) AS rank
FROM (
    SELECT
        model, shown_dataset AS dataset, category, layer, expert,
        mean_over(sum(score), n_kept) AS score, count(*) AS n_used, n_kept AS n_prompts
    FROM expert_scores
    JOIN _kept_prompts(
        'expert_scores', wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run,
        wanted_pool := wanted_pool
    ) USING (model, dataset, run, prompt_id)
    WHERE among(model, wanted_models)
    GROUP BY model, shown_dataset, category, layer, expert, n_kept
);

-- The best k value neurons of each component, by mean score over the n_kept kept prompts. The scores of an attention
-- neuron are summed over its positions. exact: all n_kept prompts are counted; otherwise only those n_prompts in whose
-- lists it is, and it counts as 0 in the others. Neurons that a run proves to be its best come first; pooled runs prove
-- nothing. run and dataset_of_run: among the runs that store it, the one with the most prompts of the category. Rows are
-- grouped by numbers, because texts as keys are slower.
CREATE MACRO ranked_neurons(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_k, wanted_pool := false
) AS TABLE
WITH kept AS MATERIALIZED (
    SELECT
        model, dataset, run, category, shown_dataset, n_kept,
        dense_rank() OVER (ORDER BY model, shown_dataset, category)::INTEGER AS kind,
        row_number() OVER (ORDER BY count(*) DESC, run, dataset, category)::INTEGER AS number
    FROM _kept_prompts(
        'neuron_sums', wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run,
        wanted_pool := wanted_pool
    )
    GROUP BY model, dataset, run, category, shown_dataset, n_kept
),

kinds AS (SELECT kind, n_kept, count(*) AS n_runs FROM kept GROUP BY ALL),

sums AS (
    SELECT
        kind, component, layer, head, expert, neuron, sum(total) AS total, sum(n_prompts)::BIGINT AS n_prompts,
        min(number) AS number, bool_and(coalesce(exact, false)) AND count(*) = any_value(n_runs) AS exact,
        CASE WHEN any_value(n_runs) = 1 THEN any_value(rank) END AS proved
    FROM neuron_sums
    JOIN kept USING (model, dataset, run, category)
    JOIN kinds USING (kind)
    WHERE among(neuron_sums.model, wanted_models)
    GROUP BY ALL
),

-- Ordered by one value, so that DuckDB keeps only the best k of each group, and does not sort the others.
best AS (
    SELECT
        component, layer, head, expert, neuron, mean_over(total, n_kept) AS score, n_prompts, number, exact,
        coalesce(proved, 1_000_000) AS proved
    FROM sums
    JOIN kinds USING (kind)
    QUALIFY row_number() OVER (PARTITION BY kind, component ORDER BY (proved, -score, layer, head, expert, neuron)) <= wanted_k
)

SELECT
    model, shown_dataset AS dataset, category, component, layer, head, expert, neuron, score, exact, n_prompts, n_kept,
    kept.dataset AS dataset_of_run, run, neuron_name(component, layer, head, expert, neuron) AS neuron_name,
    row_number() OVER (
        PARTITION BY model, shown_dataset, category, component ORDER BY proved, score DESC, layer, head, expert, neuron
    ) AS rank
FROM best
JOIN kept USING (number);

-- The numbers of heads and of neurons of each component that a model has, from the chosen runs. Those of experts are
-- listed one by one.
CREATE MACRO sizes_of_models(wanted_table, wanted_variant, wanted_run) AS TABLE
SELECT
    model,
    max(n_layers::BIGINT * n_heads) AS n_heads,
    max(n_layers::BIGINT * n_heads * head_dim) AS n_attn_neurons,
    max(coalesce(n_of_experts, n_layers::BIGINT * intermediate_size)) AS n_ffn_neurons
FROM models
JOIN chosen_runs(wanted_table, wanted_variant, wanted_run) USING (model, dataset, run)
LEFT JOIN (
    SELECT model, dataset, run, sum(n_neurons)::BIGINT AS n_of_experts FROM experts GROUP BY ALL
) USING (model, dataset, run)
GROUP BY model;

-- The ten tokens with the largest and smallest logits of some neurons, a list of {model, dataset, run, component,
-- layer, head, expert, neuron}. Tokens are JSON strings, so that spaces are visible and line ends are escaped. No other runs'
-- files are read.
CREATE MACRO tokens_of_neurons(wanted_neurons) AS TABLE
WITH wanted AS (SELECT DISTINCT * FROM (SELECT unnest(wanted_neurons, recursive := true)))

SELECT
    model, dataset, run, neuron_name(component, layer, head, expert, neuron) AS neuron_name,
    string_agg(to_json(token)::VARCHAR, ', ' ORDER BY rank) FILTER (sign = 'top') AS top_tokens,
    string_agg(to_json(token)::VARCHAR, ', ' ORDER BY rank) FILTER (sign = 'bottom') AS bottom_tokens
FROM (
    FROM neuron_tokens SEMI JOIN (SELECT DISTINCT model, dataset, run FROM wanted) USING (model, dataset, run)
) AS named
SEMI JOIN wanted
    ON named.model = wanted.model AND named.dataset = wanted.dataset AND named.run = wanted.run
    AND named.component = wanted.component AND named.layer = wanted.layer AND named.neuron = wanted.neuron
    AND named.head IS NOT DISTINCT FROM wanted.head AND named.expert IS NOT DISTINCT FROM wanted.expert
WHERE rank <= 10
GROUP BY model, dataset, run, component, layer, head, expert, neuron;

-- Rank and probability of the right token in each kept prompt when a method's k best neurons are set to 0 (ibid., table
-- 2); the unmodified model is the method none, with k = 0.
CREATE MACRO _ablated(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_positions, wanted_k,
    wanted_mode, wanted_pool := false
) AS TABLE
WITH ablated AS (
    SELECT *
    FROM ablations
    JOIN _kept_prompts(
        'ablations', wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run,
        wanted_pool := wanted_pool
    ) USING (model, dataset, run, prompt_id)
    WHERE positions = wanted_positions AND (wanted_k IS NULL OR k = wanted_k)
        AND (wanted_mode IS NULL OR mode = wanted_mode)
)
SELECT
    model, category, dataset, shown_dataset, run, prompt_id, method, k, mode,
    rank_after AS rank, prob_after AS prob, logp_after AS logp, control_of, control_ratio, held_out
FROM ablated
UNION ALL
SELECT
    model, category, dataset, shown_dataset, run, prompt_id, 'none', 0, mode,
    min(rank_before), min(prob_before), min(logp_before), NULL, NULL, bool_and(held_out)
FROM ablated
GROUP BY model, category, dataset, shown_dataset, run, prompt_id, mode;

-- How many control sets without a common unit tell as much as a run's controls, which may share units (Kish's effective
-- sample size): their number where no two share a unit. Of units of several layers and kinds, those that are shared most
-- decide: one head may make the whole effect of a set, however many neurons are beside it.
CREATE MACRO independent_controls() AS TABLE
SELECT model, dataset, run, min(n_effective) AS n_independent
FROM (
    SELECT model, dataset, run, any_value(n_controls) * sum(uses) / sum(uses * uses) AS n_effective
    FROM (
        SELECT model, dataset, run, component, layer, neuron IS NULL AS whole, head, expert, neuron, count(*) AS uses
        FROM ablated_parts
        WHERE prompt_id IS NULL AND starts_with("method", 'control-')
        GROUP BY ALL
    )
    JOIN (
        SELECT model, dataset, run, count(DISTINCT "method") AS n_controls
        FROM ablated_parts
        WHERE prompt_id IS NULL AND starts_with("method", 'control-')
        GROUP BY ALL
    ) USING (model, dataset, run)
    GROUP BY model, dataset, run, component, layer, whole
)
GROUP BY model, dataset, run;

-- p-value of a set's rank among its controls: (1 + controls at least as strong) / (1 + controls) if no two of them share a
-- unit; if they do, both counts are scaled to the number of independent ones.
CREATE MACRO rank_p(n_as_strong, n_controls, n_independent) AS
    (1 + n_as_strong * n_independent / n_controls) / (1 + n_independent);

CREATE MACRO ablation_effects(
    wanted_model := NULL, wanted_category := NULL, wanted_dataset := NULL, wanted_variant := 'default',
    wanted_run := NULL, wanted_positions := 'last', wanted_k := NULL, wanted_mode := NULL
) AS TABLE
SELECT
    model, category, dataset, prompt_id, method, k, mode, 1 / rank AS mrr, 100 * prob AS prob_percent, logp,
    control_of, control_ratio, held_out
FROM _ablated(
    wanted_model, wanted_category, wanted_dataset, wanted_variant, wanted_run, wanted_positions, wanted_k, wanted_mode
)
ORDER BY model, category_order(category), dataset, prompt_id, method, k, mode;

-- Effects of replacing parts of the model, in the kept prompts. Of each part, those of the newest run of the model,
-- dataset and variant: every knowledge run stores some effects, and each `kdb patch` adds a run.
CREATE MACRO _effects(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_role, wanted_replacement,
    wanted_method, wanted_direction, wanted_pool := false
) AS TABLE
WITH having_effects AS (
    SELECT model, dataset, variant, run, coalesce(source_run, run) AS prompts_run, standing, since
    FROM known_runs
    WHERE list_contains(tables, 'effects')
        AND among(model, wanted_models) AND (wanted_dataset IS NULL OR dataset = wanted_dataset)
        AND CASE WHEN wanted_run IS NULL THEN revision = shown_revision AND (wanted_variant IS NULL OR variant = wanted_variant)
            ELSE run = wanted_run END
),

newest AS (
    SELECT effects.*, variant, prompts_run
    FROM effects
    JOIN having_effects USING (model, dataset, run)
    WHERE role = wanted_role AND replacement = wanted_replacement AND "method" = wanted_method
        AND direction = wanted_direction
    QUALIFY row_number() OVER (
        PARTITION BY model, dataset, variant, prompts_run, prompt_id, component, layer, head, expert, neuron
        ORDER BY standing, since DESC NULLS LAST, run DESC
    ) = 1
)

SELECT
    newest.model, newest.dataset, shown.name AS shown_dataset, prompts_run AS run,
    newest.prompt_id, category, component, layer, head, expert, neuron, logp, logit_diff, kl
FROM newest
JOIN (
    SELECT model, dataset, shown_dataset(wanted_pool, model, dataset) AS name
    FROM (SELECT DISTINCT model, dataset FROM having_effects)
) AS shown USING (model, dataset)
JOIN prompts
    ON prompts.model = newest.model AND prompts.dataset = newest.dataset AND prompts.run = prompts_run
    AND prompts.prompt_id = newest.prompt_id
WHERE kept AND among(category, wanted_categories);

-- Mean effects by category and part, ranked: first what costs the answer most, or brings it back most in denoising.
CREATE MACRO mean_effects(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_role, wanted_replacement,
    wanted_method, wanted_direction, wanted_pool := false
) AS TABLE
SELECT
    model, shown_dataset AS dataset, category, component, layer, head, expert, neuron,
    mean_over(sum(logp), count(*)) AS logp, mean_over(sum(logit_diff), count(logit_diff)) AS logit_diff,
    mean_over(sum(kl), count(kl)) AS kl, count(*) AS n_prompts
FROM _effects(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_role, wanted_replacement,
    wanted_method, wanted_direction, wanted_pool := wanted_pool
)
GROUP BY model, shown_dataset, category, component, layer, head, expert, neuron;

-- What an effect is ranked by. A gradient does not see that another answer becomes probable, so estimates of log p are
-- poor: estimates are ranked by the answer's logit minus the rival's, if the prompts have a rival.
CREATE MACRO effect_measure(logit_diff, effect_method) AS
    CASE WHEN effect_method <> 'exact' AND logit_diff IS NOT NULL THEN 'logit_diff' ELSE 'logp' END;

-- Sort key of an effect: what costs the answer most first; in denoising, what brings it back most.
CREATE MACRO effect_order(logp, logit_diff, effect_method, direction) AS
    CASE direction WHEN 'denoising' THEN -1 ELSE 1 END
    * CASE effect_measure(logit_diff, effect_method) WHEN 'logit_diff' THEN logit_diff ELSE logp END;

-- Lens readouts, of one prompt or of all. Every knowledge run stores those of the logit lens at the last position, and
-- each `kdb lens` adds a run, so at each position those of the newest run that has it are shown. Tuned lenses differ in
-- their training, so all are of the newest run with one. run is the one that has the prompts.
CREATE MACRO _readouts(
    wanted_models, wanted_dataset, wanted_variant, wanted_run, wanted_lens, wanted_prompt := NULL
) AS TABLE
WITH having_readouts AS (
    SELECT model, dataset, variant, run, coalesce(source_run, run) AS prompts_run, standing, since
    FROM known_runs
    WHERE list_contains(tables, 'lens_readouts')
        AND among(model, wanted_models) AND (wanted_dataset IS NULL OR dataset = wanted_dataset)
        AND CASE WHEN wanted_run IS NULL
            THEN revision = shown_revision AND (wanted_variant IS NULL OR variant = wanted_variant)
            ELSE run = wanted_run END
)

SELECT
    lens_readouts.model, lens_readouts.dataset, variant, prompts_run AS run, prompt_id, layer, place, position, token,
    target_rank, target_logp, rival_rank, rival_logp, entropy, kl, tokens, logps
FROM lens_readouts
JOIN having_readouts USING (model, dataset, run)
WHERE lens = wanted_lens AND (wanted_prompt IS NULL OR prompt_id = wanted_prompt)
QUALIFY run = first_value(run) OVER (
    PARTITION BY
        model, dataset, variant, prompts_run,
        CASE lens WHEN 'logit' THEN prompt_id END, CASE lens WHEN 'logit' THEN position END
    ORDER BY standing, since DESC NULLS LAST, run DESC
);

-- The answer's rank after each block in the kept prompts, as read at their last position.
CREATE MACRO answer_ranks(
    wanted_models, wanted_categories, wanted_dataset, wanted_variant, wanted_run, wanted_lens, wanted_pool := false
) AS TABLE
WITH found AS MATERIALIZED (
    SELECT
        readouts.model, readouts.dataset, readouts.run, category, readouts.prompt_id, layer, position,
        readouts.target_rank
    FROM _readouts(wanted_models, wanted_dataset, wanted_variant, wanted_run, wanted_lens) AS readouts
    JOIN prompts USING (model, dataset, run, prompt_id)
    WHERE place = 'resid_post' AND kept AND among(category, wanted_categories)
    QUALIFY position = max(position) OVER (PARTITION BY model, dataset, run, prompt_id)
),

named AS (
    SELECT model, dataset, shown_dataset(wanted_pool, model, dataset) AS shown_dataset
    FROM (SELECT DISTINCT model, dataset FROM found)
)

SELECT model, dataset, shown_dataset, run, category, prompt_id, layer, target_rank
FROM found
JOIN named USING (model, dataset);

-- Scores of value neurons in single prompts: listed is that of one position, from a prompt's list of its best neurons;
-- candidate is the sum over all positions, of a neuron that is scored in every prompt of its category.
CREATE MACRO listed_or_candidates() AS TABLE
SELECT
    model, dataset, run, prompt_id, component, layer, head, expert, neuron, score AS listed, NULL::DOUBLE AS candidate,
    rank
FROM neuron_scores
UNION ALL
SELECT
    model, dataset, run, prompt_id, component, layer, head, expert, neuron, NULL AS listed, score AS candidate,
    NULL AS rank
FROM candidate_scores;

-- A neuron's score in one prompt, from all its rows there.
CREATE MACRO known_score(listed, candidate) AS coalesce(max(candidate), sum(listed));

-- All prompts in which a neuron's score is known, with its role.
CREATE MACRO _roles_of_neuron(name) AS TABLE
SELECT model, dataset, run, prompt_id, 'value neuron' AS role, known_score(listed, candidate) AS score, min(rank) AS rank
FROM listed_or_candidates() AS scores
JOIN named_neuron(name) AS named
    ON scores.component = named.component AND scores.layer = named.layer
    AND scores.head IS NOT DISTINCT FROM named.head AND scores.expert IS NOT DISTINCT FROM named.expert
    AND scores.neuron = named.neuron
GROUP BY model, dataset, run, prompt_id
UNION ALL
SELECT model, dataset, run, prompt_id, 'query neuron of ' || activates, score, rank
FROM query_neuron_scores
JOIN named_neuron(name) AS named
    ON query_neuron_scores.layer = named.layer AND query_neuron_scores.neuron = named.neuron
    AND query_neuron_scores.expert IS NOT DISTINCT FROM named.expert
WHERE named.component = 'ffn';
