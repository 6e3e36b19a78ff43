"""A worked analysis: from a table to a figure in Polars, and the same numbers in SQL.

The question: how much of what a probe reads at each depth is knowledge, and how much could it learn by heart? A probe
that is fitted to shuffled labels shows the second; what is left is the selectivity (Hewitt and Liang, 2019).

    python docs/worked_analysis.py kdb-warehouse        # writes selectivity.html

Needs a warehouse with probe scores: `kdb ingest --model smollm2-135m --dataset world-cities`.
"""

import sys

import altair as alt
import polars as pl

import kdb

wh = kdb.open(sys.argv[1] if len(sys.argv) > 1 else "kdb-warehouse")

# 1. A table as a LazyFrame: the newest plain run of each model and dataset, with the default classifier and split.
# Nothing is read yet, and of the files only what the filters leave.
curves = (
    wh.scan("probe_scores")
    .filter(site="resid_post")
    .select("model", "dataset", "layer", "depth", "accuracy", "control_accuracy", "selectivity")
    .sort("model", "dataset", "layer")
    .collect()
)

# 2. An answer: the first layer at which nine tenths of the best selectivity are reached.
answer = (
    curves.filter(pl.col("selectivity") >= 0.9 * pl.col("selectivity").max().over("model", "dataset"))
    .group_by("model", "dataset")
    .agg(pl.col("layer").min())
    .sort("model", "dataset")
)
print(answer)

# 3. The same in SQL, as one would type it into the DuckDB shell.
in_sql = wh.sql(
    """
    SELECT model, dataset, min(layer) AS layer
    FROM (
        SELECT *, max(selectivity) OVER (PARTITION BY model, dataset) AS best
        FROM current.probe_scores
        WHERE site = 'resid_post'
    )
    WHERE selectivity >= 0.9 * best
    GROUP BY model, dataset
    ORDER BY model, dataset
    """
)
print("the same in SQL:", in_sql.equals(answer))

# 4. A figure. In Jupyter and marimo, `chart` alone at the end of a cell shows it.
chart = (
    alt.Chart(curves.unpivot(["accuracy", "control_accuracy"], index=["model", "dataset", "layer"]))
    .mark_line()
    .encode(
        alt.X("layer:Q", title="layer"),
        alt.Y("value:Q", title="accuracy", scale=alt.Scale(zero=False)),
        alt.Color("dataset:N"),
        alt.StrokeDash("variable:N", title=None),
        tooltip=["dataset", "layer", "variable", "value"],
    )
    .facet("model:N", columns=3)
)
chart.save("selectivity.html", inline=True)  # inline: the page works offline
