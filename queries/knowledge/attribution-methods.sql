-- Comparison of sets of neurons or heads, and of methods that rank FFN neurons, by their effect on the answer
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 2
--
-- One row per model, dataset, set (method) and mode: rank and probability of the right token when the set, such as a
-- method's k best FFN neurons, is replaced by 0 (zero), by its mean over the category's other kept prompts (mean) or by its
-- values in the next of them (resample). mrr is the mean of 1 / rank; prob_percent and logp are means; all are over
-- n_prompts kept prompts of all categories, and lower is better. Letters are those of the paper; o with k = 0 is the
-- unmodified model. Methods that are not in the paper are last. For a set of `kdb ablate`, logp_controls is the mean logp of
-- its n_controls control sets, control_ratio the median of its size over theirs, and p the p-value of its rank by logp
-- among them. n_independent is their number after allowing for controls that share units, so p is at least
-- 1 / (1 + n_independent). held_out says whether the query that chose it saw other prompts only.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   positions
--   mode
--   k
WITH methods AS (
    SELECT
        [
            'none', 'log_prob_increase', 'log_prob', 'prob_increase', 'norm', 'coefficient', 'rank',
            'coefficient_norm', 'coefficient_rank'
        ] AS names
),

means AS (
    SELECT
        model, shown_dataset AS dataset, method, k, mode, control_of,
        mean_over(sum(1 / rank), count(*)) AS mrr,
        mean_over(100 * sum(prob), count(*)) AS prob_percent,
        mean_over(sum(logp), count(*)) AS logp,
        count(*) AS n_prompts, bool_and(held_out) AS held_out, any_value(control_ratio) AS control_ratio,
        min(n_independent) AS n_independent
    FROM _ablated(
        getvariable('model'), getvariable('category'), getvariable('dataset'), getvariable('variant'),
        getvariable('run'), getvariable('positions'), getvariable('k'), getvariable('mode'),
        wanted_pool := getvariable('pool')
    )
    LEFT JOIN independent_controls() AS drawn USING (model, dataset, run)
    GROUP BY model, shown_dataset, method, k, mode, control_of
),

ranked AS (
    SELECT
        model, dataset, of.method, mode, avg(control.logp) AS logp_controls, count(*) AS n_controls,
        median(control.control_ratio) AS control_ratio,
        min(control.n_independent) AS n_independent,
        rank_p(count(*) FILTER (control.logp <= of.logp), count(*), min(control.n_independent)) AS p
    FROM means AS of
    JOIN means AS control USING (model, dataset, mode)
    WHERE control.control_of = of.method AND control.k = of.k
    GROUP BY model, dataset, of.method, mode
)

SELECT
    model, dataset, substr('oabcdefgh', list_position(names, method), 1) AS letter, method, k, mode, mrr, prob_percent,
    logp, n_prompts, logp_controls, n_controls, ranked.n_independent,
    ranked.control_ratio, p, held_out
FROM methods, means
LEFT JOIN ranked USING (model, dataset, method, mode)
WHERE control_of IS NULL
ORDER BY model, dataset, list_position(names, method) NULLS LAST, method, k, mode DESC;
