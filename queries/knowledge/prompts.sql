-- Prompts, and the model's next token
-- Yu and Ananiadou, Neuron-Level Knowledge Attribution (arXiv 2312.12141): its prompts
--
-- One row per model and prompt: the right next token, its probability and rank in the model, and whether the prompt is
-- kept. The prompts with the most probable answers come first in each category. `kdb query prompt-story` shows one in
-- detail.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   k         integer = 10    number of prompts per category
SELECT model, dataset, category, prompt_id, text, answer, target_token, target_prob, target_rank, kept
FROM prompts
JOIN chosen_runs('prompts', getvariable('variant'), getvariable('run')) USING (model, dataset, run)
WHERE kept IS NOT NULL
    AND among(model, getvariable('model'))
    AND among(category, getvariable('category'))
    AND (getvariable('dataset') IS NULL OR dataset = getvariable('dataset'))
QUALIFY row_number() OVER (
    PARTITION BY model, dataset, category ORDER BY kept DESC, target_prob DESC, prompt_id
) <= getvariable('k')
ORDER BY model, dataset, category_order(category), kept DESC, target_prob DESC, prompt_id;
