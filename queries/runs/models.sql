-- Models that were measured, and their files
-- The warehouse itself
--
-- One row per model and revision: two rows with the same name are two models. Number formats and quantization are those
-- of the file; dtype lists those of the forward pass in all its runs.
--
-- Parameters:
--   model
SELECT
    model, any_value(family) AS family, any_value(source) AS source, revision,
    any_value(architecture) AS architecture, any_value(architecture_kind) AS architecture_kind,
    any_value(n_layers) AS n_layers, any_value(n_heads) AS n_heads, any_value(n_kv_heads) AS n_kv_heads,
    any_value(head_dim) AS head_dim, any_value(value_head_dim) AS value_head_dim, any_value(n_experts) AS n_experts,
    any_value(experts_per_token) AS experts_per_token,
    any_value(hidden_size) AS hidden_size, any_value(intermediate_size) AS intermediate_size,
    any_value(vocab_size) AS vocab_size, any_value(n_params) AS n_params,
    string_agg(DISTINCT dtype, ', ' ORDER BY dtype) AS dtype, any_value(weights_dtype) AS weights_dtype,
    string_agg(DISTINCT quantization, '; ' ORDER BY quantization) AS quantization,
    any_value(base_model) AS base_model, any_value(instruct) AS instruct, count(*) AS n_runs
FROM models
WHERE among(model, getvariable('model'))
GROUP BY model, revision
ORDER BY model, n_runs DESC, revision;
