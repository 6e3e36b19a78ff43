"""Intervals of means over prompts, and of ranks by such means, for the rows of a ranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kdb.analysis.uncertainty import MIN_PROMPTS, mean_intervals, rank_intervals, resampled_means

_ADDED = {"low": pl.Float64, "high": pl.Float64, "rank_low": pl.Int64, "rank_high": pl.Int64}


def with_intervals(
    ranking: pl.DataFrame, scores: pl.DataFrame, by: Sequence[str], item: str, *, ranks: bool = True
) -> pl.DataFrame:
    """Add the columns low, high, rank_low and rank_high to a ranking, from the prompts behind its means.

    ``scores`` has one row per prompt and item, with the columns ``by`` (which define separate rankings), dataset,
    prompt_id, ``item`` and score; an item missing in a prompt counts as 0 there, as in the ranking itself. All four
    are NULL below MIN_PROMPTS prompts; low and high also where nearly all prompts have the same score. Without
    ``ranks``, only low and high are added: ranks of many items take time.
    """
    added = dict(list(_ADDED.items())[: 4 if ranks else 2])
    of_key = dict(groups_of(scores, by))
    parts = [
        listed.with_columns(*_ends(*_matrix(of_key[key], item), listed[item].to_list(), added))
        for key, listed in groups_of(ranking, by)
    ]
    none = ranking.clear().with_columns(pl.lit(None, dtype=kind).alias(name) for name, kind in added.items())
    return pl.concat([none, *parts], how="vertical_relaxed")


def groups_of(frame: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pl.DataFrame]]:
    """Yield the rows of each combination of the columns ``by``, in order of appearance."""
    return iter(frame.partition_by(*by, as_dict=True, maintain_order=True).items())


def _ends(
    names: list[str], values: NDArray[np.float32], listed: list[str], added: Mapping[str, Any]
) -> Iterator[pl.Series]:
    """Yield the columns of ends for the listed items, from the scores (prompt, item) of all."""
    place = {name: index for index, name in enumerate(names)}
    rows = [place[name] for name in listed]
    ends = (*mean_intervals(values[:, rows]), *(_rank_ends(values, rows) if len(added) > 2 else ()))
    for (name, kind), end in zip(added.items(), ends, strict=True):
        yield pl.Series(name, end, dtype=pl.Float64).fill_nan(None).cast(kind)


def _rank_ends(values: NDArray[np.float32], rows: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(values) < MIN_PROMPTS:
        return np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    return rank_intervals(resampled_means(values), rows)


def _matrix(scores: pl.DataFrame, item: str) -> tuple[list[str], NDArray[np.float32]]:
    """Return the names of the items, and their scores (prompt, item)."""
    prompts = scores.select(pl.struct("dataset", "prompt_id").rank("dense") - 1).to_series().to_numpy()
    names = scores[item].unique(maintain_order=True)
    indices = scores[item].replace_strict(names, pl.int_range(len(names), eager=True)).to_numpy()
    values = np.zeros((int(prompts.max()) + 1, len(names)), dtype=np.float32)
    np.add.at(values, (prompts, indices), scores["score"].to_numpy())
    return names.to_list(), values
