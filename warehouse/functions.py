"""Names of the DuckDB functions that a statement may call: `COMPUTE` for all users, `LOCAL` for the warehouse's owner.

Listed from `duckdb_functions()` of DuckDB 1.5. A function that is not listed is refused: a new one may read files,
reveal facts about the machine, run its argument as SQL, or crash. Excluded on purpose are

- functions that read or write: `read_*`, `glob`, `query`, `query_table`, `write_log`, `enable_*`, `nextval`, `setseed`;
- functions that reveal the machine, the session or the catalog: `getvariable`, `current_setting`, `duckdb_*`, `pg_*`;
- functions that parse or bind a text: `json_serialize_*`, `json_deserialize_sql`, `json_execute_serialized_sql`;
- functions that crash on some arguments: DuckDB's internal ones (`combine`, `finalize`, `create_sort_key`,
  `variant_*`, `st_*`, `__internal_*`), `reservoir_quantile`, and those whose recursion a deep JSON text breaks:
  `json_structure`, `json_group_structure`, `json_contains`, `json_merge_patch`, `json_transform`, `from_json`.
"""

from __future__ import annotations

_OPERATORS = """
    !__postfix !~~ !~~* % & && * ** + - -> ->> / // <-> << <=> <@ >> @ @> ^ ^@ | || ~ ~~ ~~* ~~~
    add subtract multiply divide mod xor like_escape ilike_escape not_like_escape not_ilike_escape
"""
_NUMBERS = """
    abs acos acosh asin asinh atan atan2 atanh bin bit_count cbrt ceil ceiling cos cosh cot degrees even exp factorial
    fdiv floor fmod gamma gcd greatest greatest_common_divisor hash isfinite isinf isnan lcm least
    least_common_multiple lgamma ln log log10 log2 nextafter pi pow power radians random round round_even roundbankers
    sign signbit sin sinh sqrt tan tanh to_base trunc equi_width_bins is_histogram_other_bin
"""
_TEXTS = """
    ascii bar base64 bit_length char_length character_length chr concat concat_ws contains damerau_levenshtein decode
    editdist3 encode ends_with error format formatreadabledecimalsize formatreadablesize format_bytes from_base64
    from_binary from_hex get_bit bit_position bitstring set_bit hamming hex ilike instr jaccard jaro_similarity
    jaro_winkler_similarity lcase left left_grapheme len length length_grapheme levenshtein lower lpad ltrim md5
    md5_number md5_number_lower md5_number_upper mismatches nfc_normalize octet_length ord parse_dirname parse_dirpath
    parse_filename parse_formatted_bytes parse_path pg_size_pretty position prefix printf regexp_escape regexp_extract
    regexp_extract_all regexp_full_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table
    repeat replace reverse right right_grapheme rpad rtrim sha1 sha256 split split_part starts_with str_split
    str_split_regex string_split string_split_regex string_to_array strip_accents strlen strpos substr substring
    substring_grapheme suffix to_base64 to_binary to_hex translate trim ucase unbin unhex unicode upper url_decode
    url_encode
"""
_TIMES = """
    age ago century current_date current_localtime current_localtimestamp current_time current_timestamp date_add
    date_diff date_part date_sub date_trunc datediff datepart datesub datetrunc day dayname dayofmonth dayofweek
    dayofyear days_in_month decade epoch epoch_ms epoch_ns epoch_us era get_current_time get_current_timestamp hour
    isodow isoyear julian last_day localtime localtimestamp make_date make_time make_timestamp make_timestamp_ms
    make_timestamp_ns make_timestamptz microsecond millennium millisecond minute month monthname nanosecond
    normalized_interval now quarter second strftime strptime time_bucket timezone timezone_hour timezone_minute
    to_centuries to_days to_decades to_hours to_microseconds to_millennia to_milliseconds to_minutes to_months
    to_quarters to_seconds to_timestamp to_weeks to_years today transaction_timestamp try_strptime week weekday
    weekofyear year yearweek
"""
_NESTED = """
    aggregate apply array_aggr array_aggregate array_append array_apply array_cat array_concat array_contains
    array_cosine_distance array_cosine_similarity array_cross_product array_distance array_distinct array_dot_product
    array_extract array_filter array_grade_up array_has array_has_all array_has_any array_indexof array_inner_product
    array_intersect array_length array_negative_dot_product array_negative_inner_product array_pop_back
    array_pop_front array_position array_prepend array_push_back array_push_front array_reduce array_resize
    array_reverse array_reverse_sort array_select array_slice array_sort array_to_string array_transform array_unique
    array_value array_where array_zip cardinality element_at filter flatten generate_subscripts grade_up list_aggr
    list_aggregate list_any_value list_append list_apply list_approx_count_distinct list_avg list_bit_and list_bit_or
    list_bit_xor list_bool_and list_bool_or list_cat list_concat list_contains list_cosine_distance
    list_cosine_similarity list_count list_distance list_distinct list_dot_product list_element list_entropy
    list_extract list_filter list_first list_grade_up list_has list_has_all list_has_any list_histogram list_indexof
    list_inner_product list_intersect list_kurtosis list_kurtosis_pop list_last list_mad list_max list_median list_min
    list_mode list_negative_dot_product list_negative_inner_product list_pack list_position list_prepend list_product
    list_reduce list_resize list_reverse list_reverse_sort list_select list_sem list_skewness list_slice list_sort
    list_stddev_pop list_stddev_samp list_string_agg list_sum list_transform list_unique list_value list_var_pop
    list_var_samp list_where list_zip map map_concat map_contains map_contains_entry map_contains_value map_entries
    map_extract map_extract_value map_from_entries map_keys map_values reduce row struct_concat struct_contains
    struct_extract struct_extract_at struct_has struct_indexof struct_insert struct_keys struct_pack struct_position
    struct_update struct_values union_extract union_tag union_value
"""
_JSON = """
    array_to_json json json_array json_array_length json_exists json_extract json_extract_path json_extract_path_text
    json_extract_string json_group_array json_group_object json_keys json_object json_pretty json_quote json_type
    json_valid json_value row_to_json to_json
"""
_OTHERS = """
    alias coalesce enum_code enum_first enum_last enum_range enum_range_boundary gen_random_uuid
    ifnull nullif pg_typeof typeof uuid uuid_extract_timestamp uuid_extract_version uuidv4 uuidv7
"""
_AGGREGATES = """
    any_value approx_count_distinct approx_quantile approx_top_k arbitrary arg_max arg_max_null arg_max_nulls_last
    arg_min arg_min_null arg_min_nulls_last argmax argmin array_agg avg bit_and bit_or bit_xor bitstring_agg bool_and
    bool_or corr count count_if count_star countif covar_pop covar_samp cume_dist dense_rank entropy favg fill first
    first_value fsum geomean geometric_mean group_concat grouping grouping_id histogram histogram_exact kahan_sum
    kurtosis kurtosis_pop lag last last_value lead list listagg mad max max_by mean median min min_by mode nth_value
    ntile percent_rank product quantile quantile_cont quantile_disc rank rank_dense regr_avgx regr_avgy regr_count
    regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy row_number sem skewness stddev
    stddev_pop stddev_samp string_agg sum sum_no_overflow sumkahan var_pop var_samp variance wavg weighted_avg
"""
_ROWS = "generate_series json_each json_tree range repeat repeat_row unnest"

COMPUTE = frozenset(
    " ".join((_OPERATORS, _NUMBERS, _TEXTS, _TIMES, _NESTED, _JSON, _OTHERS, _AGGREGATES, _ROWS)).split()
)
"""Functions whose result depends only on their arguments."""

_FILES = """
    parquet_file_metadata parquet_full_metadata parquet_kv_metadata parquet_metadata parquet_scan parquet_schema
    read_parquet
"""
"""Functions that read files; they can read only the lake's, because the connection is locked."""
_CATALOG = """
    duckdb_columns duckdb_constraints duckdb_databases duckdb_functions duckdb_indexes duckdb_keywords duckdb_memory
    duckdb_schemas duckdb_sequences duckdb_settings duckdb_tables duckdb_types duckdb_variables duckdb_views
    pragma_show pragma_table_info pragma_version
    col_description current_catalog current_database current_role current_schema current_schemas current_setting
    current_user format_pg_type format_type getvariable has_schema_privilege has_table_privilege map_to_pg_oid
    obj_description pg_get_constraintdef pg_get_expr pg_get_viewdef pg_my_temp_schema pg_table_is_visible
    pg_type_is_visible session_user shobj_description user version
"""
LOCAL = COMPUTE | frozenset(f"{_FILES} {_CATALOG}".split())
"""All of `COMPUTE`, and functions that read the lake's files or DuckDB's settings and catalog, as SQLAlchemy does."""
