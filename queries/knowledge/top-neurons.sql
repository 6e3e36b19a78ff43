-- Value neurons with the largest direct contribution to each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): value neurons and their tokens
--
-- One row per model, dataset, category, component and rank: the neurons with the largest mean log-probability increase
-- of the right token over the n_kept kept prompts. Ranks 1 to 50 of a run are proved: no other neuron has a larger mean.
-- Beyond them, and in pooled runs, exact says whether the mean counts all prompts; if not, the neuron counts as 0 in the
-- prompts that do not list it among their best, and n_prompts is the number of the others. f29_1234 is neuron 1234 of FFN
-- layer 29, f29.3_45 is neuron 45 of its expert 3; a23.12_45 is dimension 45 of head 12 in layer 23, summed over
-- positions. The tokens are the ten that the neuron raises most, and least.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   component
--   k          integer = 10    number of neurons per category, dataset and component
WITH best AS MATERIALIZED (
    SELECT *
    FROM ranked_neurons(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), getvariable('k'), wanted_pool := getvariable('pool')
    )
    WHERE getvariable('component') IS NULL OR component = getvariable('component')
)

SELECT
    best.model, best.dataset, category, component, rank, best.neuron_name, layer, head, expert, neuron,
    score, exact, n_prompts, n_kept, top_tokens, bottom_tokens
FROM best
LEFT JOIN tokens_of_neurons(
    (
        SELECT list({
            model: model, dataset: dataset_of_run, run: run, component: component, layer: layer, head: head,
            expert: expert, neuron: neuron
        })
        FROM best
    )
) AS named
    ON named.model = best.model AND named.dataset = best.dataset_of_run AND named.run = best.run
    AND named.neuron_name = best.neuron_name
ORDER BY best.model, best.dataset, category_order(category), component, rank;
