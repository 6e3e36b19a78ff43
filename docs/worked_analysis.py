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

# 1. The newest run of each model and dataset: the view current_runs, as a frame.
newest = wh.sql(
    "SELECT model, dataset, run FROM current_runs WHERE table_name = 'probe_scores' AND variant = 'default'"
).lazy()

# 2. A table as a LazyFrame: nothing is read yet, and of the files only what the filters leave.
curves = (
    wh.scan("probe_scores")
    .filter(site="resid_post", classifier="logistic", split="paper")
    .join(newest, on=["model", "dataset", "run"], how="semi")
    .select("model", "dataset", "layer", "depth", "accuracy", "control_accuracy", "selectivity")
    .sort("model", "dataset", "layer")
    .collect()
)

# 3. An answer: the first layer at which nine tenths of the best selectivity are reached.
answer = (
    curves.filter(pl.col("selectivity") >= 0.9 * pl.col("selectivity").max().over("model", "dataset"))
    .group_by("model", "dataset")
    .agg(pl.col("layer").min())
    .sort("model", "dataset")
)
print(answer)

# 4. The same in SQL, as one would type it into the DuckDB shell.
in_sql = wh.sql(
    """
    SELECT model, dataset, min(layer) AS layer
    FROM (
        SELECT *, max(selectivity) OVER (PARTITION BY model, dataset) AS best
        FROM probe_scores
        JOIN current_runs USING (model, dataset, run)
        WHERE table_name = 'probe_scores' AND variant = 'default'
            AND site = 'resid_post' AND classifier = 'logistic' AND split = 'paper'
    )
    WHERE selectivity >= 0.9 * best
    GROUP BY model, dataset
    ORDER BY model, dataset
    """
)
print("the same in SQL:", in_sql.equals(answer))

# 5. A figure. In Jupyter and marimo, `chart` alone at the end of a cell shows it.
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
