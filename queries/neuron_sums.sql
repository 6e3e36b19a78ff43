-- The rows of neuron_sums after adding one part of neuron_scores: $scores is its file, $prompts are the files of the
-- run's prompts, and summed holds the previous rows. No prompt is in two parts, so prompts are counted within the part.
SELECT
    category, component, layer, head, neuron, sum(total) AS total, sum(n_prompts)::INTEGER AS n_prompts,
    false AS exact, NULL::INTEGER AS rank, expert
FROM (
    SELECT category, component, layer, head, expert, neuron, total, n_prompts FROM summed
    UNION ALL
    SELECT
        category, component, layer, head, expert, neuron, sum(score) AS total, count(DISTINCT prompt_id) AS n_prompts
    FROM read_parquet($scores) AS scores
    JOIN read_parquet($prompts) AS prompts USING (prompt_id)
    WHERE kept
    GROUP BY ALL
)
GROUP BY ALL
ORDER BY ALL;
