-- Effect on every kept prompt of replacing a set of neurons or heads
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): the values averaged in table 2
--
-- One row per model, category, prompt, set (method), k and mode: reciprocal rank, probability in percent and
-- log-probability of the right token with the set replaced by 0 (zero), by its mean over the category's other kept prompts
-- (mean), or by its values in the next of them (resample). The unmodified model is the method none, with k = 0. control_of
-- names the set of which a row is a control; held_out says whether the set was chosen without this prompt.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   positions
--   mode
--   k
SELECT
    model, category, dataset, prompt_id, method, k, mode, mrr, prob_percent, logp, control_of, control_ratio, held_out
FROM ablation_effects(
    wanted_model := getvariable('model'), wanted_category := getvariable('category'),
    wanted_dataset := getvariable('dataset'), wanted_variant := getvariable('variant'),
    wanted_run := getvariable('run'), wanted_positions := getvariable('positions'), wanted_k := getvariable('k'),
    wanted_mode := getvariable('mode')
)
ORDER BY model, category_order(category), dataset, prompt_id, method, k, mode;
