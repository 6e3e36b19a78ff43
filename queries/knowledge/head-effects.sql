-- Heads whose replacement changes the answer most, with their scores beside
-- Exact: Zhang and Nanda 2023 (arXiv 2309.16042); atp: Syed et al. 2023 (2310.10348); relp: Jafari et al. 2025 (2508.21258)
--
-- One row per model, dataset, category and rank: the mean change of the answer's log-probability (logp), of its logit
-- minus the rival's (logit_diff), and the KL divergence of the output, when the head is replaced; n_prompts are those
-- that could be patched. ranked_by says which of them ranks: logp if it was measured (exact), logit_diff if it was estimated,
-- for estimates of log p are poor (docs/effects.md). score is the head's mean attribution score, score_rank its rank by it. Every knowledge run has the
-- exact effect of the ten heads of each category with the largest scores, and an estimate (atp) of all; `kdb patch`
-- measures more.
--
-- Parameters:
--   model
--   category
--   dataset
--   variant
--   run
--   pool
--   role
--   replacement
--   effect_method text = exact   how the effect was found: exact, atp or relp
--   direction
--   k         integer = 10    number of heads per category and dataset
SELECT
    effect.model, effect.dataset, effect.category,
    row_number() OVER (
        PARTITION BY effect.model, effect.dataset, effect.category
        ORDER BY effect_order(logp, logit_diff, getvariable('effect_method'), getvariable('direction')),
            effect.layer, effect.head
    ) AS rank,
    head_name(effect.layer, effect.head) AS head_name, effect.layer, effect.head, logp, logit_diff, kl,
    getvariable('effect_method') AS method, effect_measure(logit_diff, getvariable('effect_method')) AS ranked_by,
    effect.n_prompts, score, score_rank
FROM mean_effects(
    getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), getvariable('role'), getvariable('replacement'),
    getvariable('effect_method'), getvariable('direction'), wanted_pool := getvariable('pool')
) AS effect
LEFT JOIN (
    SELECT model, dataset, category, layer, head, score, rank AS score_rank
    FROM ranked_heads(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
) AS scored USING (model, dataset, category, layer, head)
WHERE component = 'head'
QUALIFY rank <= getvariable('k')
ORDER BY effect.model, effect.dataset, category_order(effect.category), rank;
