-- Every stored value neuron's score in every kept prompt
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): what the rankings of neurons take means of
--
-- One row per model, category, prompt, component and neuron; an attention neuron's positions are added up. A neuron
-- that a prompt has no row of counts 0 there.
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
        model, category, dataset, prompt_id, component, neuron_name(component, layer, head, neuron) AS neuron_name,
        steady(sum(score)) AS score
    FROM neuron_scores
    JOIN _kept_prompts(
        'neuron_scores', getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run')
    ) USING (model, dataset, run, prompt_id)
    WHERE getvariable('component') IS NULL OR component = getvariable('component')
    GROUP BY ALL
)
ORDER BY model, category_order(category), dataset, prompt_id, component, score DESC, neuron_name;
