-- Attention and FFN layers whose replacement changes the answer most, with their scores beside
-- Exact: Zhang and Nanda 2023 (arXiv 2309.16042); atp: Syed et al. 2023 (2310.10348); relp: Jafari et al. 2025 (2508.21258)
--
-- One row per model, dataset, category and rank, as in head-effects; r5 is the residual stream after block 5, which has
-- no score. Every knowledge run has an estimate (atp) of all attention and FFN layers; `kdb patch --component attn
-- --component ffn` measures them, for `--effect-method exact`.
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
--   effect_method text = atp   how the effect was found: exact, atp or relp
--   direction
--   k         integer = 10    number of layers per category and dataset
SELECT
    effect.model, effect.dataset, effect.category,
    row_number() OVER (
        PARTITION BY effect.model, effect.dataset, effect.category
        ORDER BY effect_order(logp, logit_diff, getvariable('effect_method'), getvariable('direction')),
            effect.layer, effect.component
    ) AS rank,
    CASE component WHEN 'resid' THEN 'r' || effect.layer ELSE layer_name(component, effect.layer) END AS layer_name,
    component, effect.layer, logp, logit_diff, kl,
    getvariable('effect_method') AS method, effect_measure(logit_diff, getvariable('effect_method')) AS ranked_by,
    effect.n_prompts, score
FROM mean_effects(
    getvariable('model'), getvariable('category'), getvariable('dataset'),
    getvariable('variant'), getvariable('run'), getvariable('role'), getvariable('replacement'),
    getvariable('effect_method'), getvariable('direction'), wanted_pool := getvariable('pool')
) AS effect
LEFT JOIN (
    SELECT model, dataset, category, component, layer, score
    FROM mean_layer_scores(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
) AS scored USING (model, dataset, category, component, layer)
WHERE component IN ('attn', 'ffn', 'resid')
QUALIFY rank <= getvariable('k')
ORDER BY effect.model, effect.dataset, category_order(effect.category), rank;
