"""A worked analysis: from a table to a figure in Polars, and the same numbers in SQL.

The question: at what depth does a probe read more than the words of the text tell? The best baseline is fitted to the
text, without the model. The margin is the probe's accuracy minus the baseline's.

    python docs/worked_analysis.py kdb-warehouse        # writes margin.html

Needs a warehouse with probe scores: `kdb ingest --model smollm2-135m --dataset world-cities`.
"""

import sys

import altair as alt
import polars as pl

import kdb

wh = kdb.open(sys.argv[1] if len(sys.argv) > 1 else "kdb-warehouse")

# 1. Tables as LazyFrames: the newest plain run of each model and dataset, with the default classifier and split.
# Nothing is read yet, and of the files only what the filters leave.
best = wh.scan("baselines").group_by("model", "dataset", "run").agg(baseline=pl.col("accuracy").max())
curves = (
    wh.scan("probe_scores")
    .filter(site="resid_post")
    .join(best, on=["model", "dataset", "run"])
    .select(
        "model", "dataset", "layer", "depth", "accuracy", "baseline", margin=pl.col("accuracy") - pl.col("baseline")
    )
    .sort("model", "dataset", "layer")
    .collect()
)

# 2. An answer: the first layer at which nine tenths of the largest margin are reached.
answer = (
    curves.filter(pl.col("margin") >= 0.9 * pl.col("margin").max().over("model", "dataset"))
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
        SELECT *, accuracy - baseline AS margin, max(accuracy - baseline) OVER (PARTITION BY model, dataset) AS best
        FROM current.probe_scores
        JOIN (
            SELECT model, dataset, run, max(accuracy) AS baseline FROM current.baselines GROUP BY ALL
        ) USING (model, dataset, run)
        WHERE site = 'resid_post'
    )
    WHERE margin >= 0.9 * best
    GROUP BY model, dataset
    ORDER BY model, dataset
    """
)
print("the same in SQL:", in_sql.equals(answer))

# 4. A figure. In Jupyter and marimo, `chart` alone at the end of a cell shows it.
chart = (
    alt.Chart(curves.unpivot(["accuracy", "baseline"], index=["model", "dataset", "layer"]))
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
chart.save("margin.html", inline=True)  # inline: the page works offline
