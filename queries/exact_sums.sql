-- The rows of neuron_sums with the sums of candidates over all kept prompts: summed holds those over the prompts' lists,
-- $candidates are the files of candidate_scores, $prompts those of the run's prompts. Among the
-- candidates are the $n_proved best neurons of each category and component, so these have a rank.
SELECT
    category, component, layer, head, neuron, coalesce(max(exact_total), max(total)) AS total,
    max(n_prompts)::INTEGER AS n_prompts, max(exact_total) IS NOT NULL AS exact,
    CASE WHEN max(exact_total) IS NOT NULL THEN nullif(least(row_number() OVER by_total, $n_proved + 1), $n_proved + 1) END AS rank,
    expert
FROM (
    SELECT category, component, layer, head, expert, neuron, total, NULL AS exact_total, n_prompts FROM summed
    UNION ALL
    SELECT
        category, component, layer, head, expert, neuron, NULL AS total, sum(score) AS exact_total,
        count(*) AS n_prompts
    FROM read_parquet($candidates) AS candidates
    JOIN read_parquet($prompts) AS prompts USING (prompt_id)
    WHERE kept
    GROUP BY ALL
)
GROUP BY category, component, layer, head, expert, neuron
WINDOW by_total AS (
    PARTITION BY category, component ORDER BY max(exact_total) DESC NULLS LAST, layer, head, expert, neuron
)
ORDER BY category, component, layer, head, expert, neuron;
