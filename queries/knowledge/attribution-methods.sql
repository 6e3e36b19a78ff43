-- Comparison of methods that rank FFN neurons by their effect on the answer
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): table 2
--
-- One row per model, dataset and method: rank and probability of the right token when the method's k best FFN neurons
-- are set to 0. mrr is the mean of 1 / rank; prob_percent and logp are means; all are over the n_prompts kept prompts
-- of all categories, and lower is better. Letters are those of the paper; o with k = 0 is the unmodified model. Methods
-- that are not in the paper are last.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   positions
--   k
WITH methods AS (
    SELECT
        [
            'none', 'log_prob_increase', 'log_prob', 'prob_increase', 'norm', 'coefficient', 'rank',
            'coefficient_norm', 'coefficient_rank'
        ] AS names
)

SELECT
    model, shown_dataset AS dataset, substr('oabcdefgh', list_position(names, method), 1) AS letter, method, k,
    mean_over(sum(1 / rank), count(*)) AS mrr,
    mean_over(100 * sum(prob), count(*)) AS prob_percent,
    mean_over(sum(logp), count(*)) AS logp,
    count(*) AS n_prompts
FROM _ablated(
    getvariable('model'), getvariable('category'), getvariable('dataset'), getvariable('variant'),
    getvariable('run'), getvariable('positions'), getvariable('k'), wanted_pool := getvariable('pool')
), methods
GROUP BY model, shown_dataset, method, k, names
ORDER BY model, dataset, list_position(names, method) NULLS LAST, method, k;
