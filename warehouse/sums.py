"""Scores added up when a run is stored, so that questions about all of its prompts read no single one.

    staged.write("neuron_sums", "part", [sum_neurons(staged.parts("neuron_scores"), staged.parts("prompts"))])

Whoever writes a run's scores writes their sums, too: no reader looks whether they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from kdb.warehouse.schema import arrow_schema

_OF_A_PART = """
SELECT category, component, layer, head, neuron, sum(score) AS total, count(DISTINCT prompt_id) AS n_prompts
FROM read_parquet($1) AS scores
JOIN read_parquet($2) AS prompts USING (prompt_id)
WHERE kept
GROUP BY ALL
"""

_OF_A_RUN = """
SELECT category, component, layer, head, neuron, sum(total) AS total, sum(n_prompts) AS n_prompts
FROM parts
GROUP BY ALL
ORDER BY ALL
"""


def sum_neurons(scores: Sequence[Path], prompts: Sequence[Path]) -> pa.Table:
    """The rows of ``neuron_sums`` for the parts of ``neuron_scores``, of which each has prompts of its own.

    Parts are added one by one, for a part is what fits into memory, and rows in their order: the same parts make the
    same sums, to the last bit.
    """
    schema, paths = arrow_schema("neuron_sums"), [str(path) for path in prompts]
    summed = schema.empty_table()
    with duckdb.connect(config={"threads": 1}) as connection:
        for path in scores:
            part = connection.sql(_OF_A_PART, params=[str(path), paths]).to_arrow_table().cast(schema)
            connection.register("parts", pa.concat_tables([summed, part]))
            summed = connection.sql(_OF_A_RUN).to_arrow_table().cast(schema)
    return summed
