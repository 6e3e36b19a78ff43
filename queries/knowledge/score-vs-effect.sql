-- Whether scores rank heads and layers as their effects do
-- Spearman 1904; the scores are those of Yu and Ananiadou (arXiv 2312.12141), the effects those of head-effects
--
-- One row per model, dataset, category and component (head, attn, ffn): spearman is the rank correlation, over all n_parts
-- parts with an effect, of the mean score and the mean loss when the part is replaced: of the answer's log-probability
-- (measured, logp) or of its logit minus the rival's (estimates, logit_diff), as ranked_by says. shared of the ten best by
-- score are among the ten best by effect; shared_by_chance would be without any relation. Both are NULL unless there are
-- more than ten parts. An effect is what the model needs the part for; a score is what the part adds directly. With
-- `--effect-method exact`, only parts that were measured count: after `kdb patch --component head`, all heads.
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
WITH scored AS (
    SELECT model, dataset, category, 'head' AS component, layer, head, score
    FROM ranked_heads(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
    UNION ALL
    SELECT model, dataset, category, component, layer, NULL, score
    FROM mean_layer_scores(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), wanted_pool := getvariable('pool')
    )
),

ranked AS (
    SELECT
        effect.model, effect.dataset, effect.category, effect.component, effect.n_prompts,
        effect_measure(logit_diff, getvariable('effect_method')) AS ranked_by,
        rank() OVER by_score + (count(*) OVER (PARTITION BY effect.model, effect.dataset, effect.category, effect.component, score) - 1) / 2
            AS score_rank,
        rank() OVER by_effect + (count(*) OVER (
            PARTITION BY effect.model, effect.dataset, effect.category, effect.component,
                effect_order(logp, logit_diff, getvariable('effect_method'), getvariable('direction'))
        ) - 1) / 2 AS effect_rank
    FROM mean_effects(
        getvariable('model'), getvariable('category'), getvariable('dataset'),
        getvariable('variant'), getvariable('run'), getvariable('role'), getvariable('replacement'),
        getvariable('effect_method'), getvariable('direction'), wanted_pool := getvariable('pool')
    ) AS effect
    JOIN scored
        ON scored.model = effect.model AND scored.dataset = effect.dataset AND scored.category = effect.category
        AND scored.component = effect.component AND scored.layer = effect.layer
        AND scored.head IS NOT DISTINCT FROM effect.head
    WINDOW
        by_score AS (PARTITION BY effect.model, effect.dataset, effect.category, effect.component ORDER BY score DESC),
        by_effect AS (
            PARTITION BY effect.model, effect.dataset, effect.category, effect.component
            ORDER BY effect_order(logp, logit_diff, getvariable('effect_method'), getvariable('direction'))
        )
)

SELECT
    model, dataset, category, component, nullif(steady(corr(score_rank, effect_rank)), 'nan'::DOUBLE) AS spearman,
    CASE WHEN count(*) > 10 THEN count(*) FILTER (score_rank <= 10 AND effect_rank <= 10) END AS shared,
    CASE WHEN count(*) > 10 THEN shared_by_chance(10, 10, count(*)) END AS shared_by_chance,
    getvariable('effect_method') AS method, any_value(ranked_by) AS ranked_by,
    count(*) AS n_parts, max(n_prompts) AS n_prompts
FROM ranked
GROUP BY model, dataset, category, component
ORDER BY model, dataset, category_order(category), component DESC;
