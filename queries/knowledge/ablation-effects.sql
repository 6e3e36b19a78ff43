-- What zeroing a method's neurons does to every kept prompt
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): what table 2 takes means of
--
-- One row per model, category, prompt, method and k: reciprocal rank, probability in percent and log-probability of the
-- right token after zeroing. The untouched model is the method none, with k = 0.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   positions
--   k
SELECT model, category, dataset, prompt_id, method, k, mrr, prob_percent, logp
FROM ablation_effects(
    wanted_model := getvariable('model'), wanted_category := getvariable('category'),
    wanted_dataset := getvariable('dataset'), wanted_variant := getvariable('variant'),
    wanted_run := getvariable('run'), wanted_positions := getvariable('positions'), wanted_k := getvariable('k')
)
ORDER BY model, category_order(category), dataset, prompt_id, method, k;
