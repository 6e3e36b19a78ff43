-- Experts with the largest direct contribution to each kind of knowledge
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the score of heads, for experts
--
-- One row per model, dataset, category and rank, for models with experts: those with the largest mean log-probability
-- increase of the right token over the n_prompts kept prompts. An expert counts as 0 in a prompt in which the router does
-- not choose it; n_used is the number of the others. f29.3 is expert 3 of FFN layer 29, both numbered from 0; shared
-- experts follow those that the router chooses.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   k         integer = 10    number of experts per category and dataset
SELECT
    model, dataset, category, rank, expert_name(layer, expert) AS expert_name, layer, expert, score, n_used, n_prompts
FROM ranked_experts(
    getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
)
WHERE rank <= getvariable('k')
ORDER BY model, dataset, category_order(category), rank;
