-- Score of every stored value neuron in every kept prompt
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the values behind the rankings of neurons
--
-- One row per model, category, prompt, component and neuron; scores of an attention neuron are summed over positions. The
-- candidates of a category have a row for each of its prompts. Other neurons have one only where they are among the
-- prompt's best, and count as 0 elsewhere.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   component
SELECT *
FROM (
    SELECT
        model, category, dataset, prompt_id, component,
        neuron_name(component, layer, head, expert, neuron) AS neuron_name,
        steady(known_score(listed, candidate)) AS score
    FROM listed_or_candidates()
    JOIN _kept_prompts(
        'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run')
    ) USING (model, dataset, run, prompt_id)
    WHERE getvariable('component') IS NULL OR component = getvariable('component')
    GROUP BY ALL
)
ORDER BY model, category_order(category), dataset, prompt_id, component, score DESC, neuron_name;
