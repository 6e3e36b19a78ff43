"""Splits of the prompts into a part to fit on and a part to score, and what all probes of a run share.

    splits = make_splits(labels, n_splits=3, groups=cities)
    task = make_task(labels, splits, groups=cities)

The mathematical core: it takes arrays and returns frozen results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold, train_test_split

from kdb.errors import DatasetError

Ints = NDArray[np.int64]

PAPER_SEED = 42
TEST_SHARE = 0.4
MANY, N_FOLDS_OF_MANY = 2000, 3
"""From so many training prompts on there are fewer folds, or choosing the penalty would take most of the time."""

N_FOLDS = 5
"""Folds of the training part, by which ``logistic`` chooses its penalty.

Each class needs as many prompts there and, in a grouped split, as many groups.
"""

N_CONTROLS = 5
"""Draws of the control task's labels, of which the mean accuracy is stored."""


# Splits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One division of the prompts: row numbers to fit on, and row numbers to score, each in the order of use."""

    name: str
    train: Ints
    test: Ints


def make_splits(
    labels: ArrayLike,
    *,
    n_splits: int = 1,
    groups: Sequence[str] | None = None,
    seed: int = PAPER_SEED,
    first_label: int = 1,
) -> list[Split]:
    """Divide prompts 60/40: as published, by ``n_splits - 1`` stratified splits, and by group.

    ``labels`` (n,) are 0 or 1; ``groups`` (n,), if given, adds a split in which no group is on both sides.
    The split ``paper`` takes the prompts of ``first_label`` first, then the others, and ignores ``seed``.
    ``stratified-S`` and ``grouped`` depend on ``seed``, and not on ``first_label``.
    Raises DatasetError if a label is neither 0 nor 1, or if a part of a split has too few prompts of a class.
    """
    y = np.asarray(labels)
    _check_labels(y)
    # The published code has two lists, one of each class. It puts the second behind the first, and then splits.
    splits = [_random_split("paper", np.argsort(y != first_label, kind="stable"), PAPER_SEED)]
    order = np.argsort(y, kind="stable")
    splits += [_random_split(f"stratified-{s}", order, s, stratify=y[order]) for s in range(seed + 1, seed + n_splits)]
    if groups is not None:
        splits.append(_grouped_split(groups, seed))
    for split in splits:
        _check_split(split, y, groups if split.name == "grouped" else None)
    return splits


def _random_split(name: str, order: Ints, seed: int, stratify: NDArray[Any] | None = None) -> Split:
    train, test = train_test_split(order, test_size=TEST_SHARE, random_state=seed, stratify=stratify)
    return Split(name, train, test)


def _grouped_split(groups: Sequence[str], seed: int) -> Split:
    names = np.asarray(groups, dtype=object)
    if len(set(names)) < 2:
        raise DatasetError("The grouped split needs at least two groups; every prompt is in one: use another column.")
    splitter = GroupShuffleSplit(n_splits=1, test_size=TEST_SHARE, random_state=seed)
    train, test = next(splitter.split(names, groups=names))
    return Split("grouped", train, test)


def _check_labels(y: NDArray[Any]) -> None:
    if not np.isin(y, (0, 1)).all():
        raise DatasetError("Probing needs labels 0 and 1 only.")
    for label in (0, 1):
        if (count := int(np.sum(y == label))) <= N_FOLDS:
            raise DatasetError(
                f"Probing needs at least {N_FOLDS + 1} prompts of each label, {N_FOLDS} to train on and one to test "
                f"on; label {label} has {count}. Add prompts of this label: 20 of each are enough for most splits."
            )


def _check_split(split: Split, y: NDArray[Any], groups: Sequence[str] | None) -> None:
    for label in (0, 1):
        train, test = (rows[y[rows] == label] for rows in (split.train, split.test))
        more = "prompts" if groups is None else _OTHER_GROUPS
        _check_count(split.name, f"prompts of label {label} in its training part", N_FOLDS, len(train), more)
        _check_count(split.name, f"prompt of label {label} in its test part", 1, len(test), more)
        if groups is not None:
            seen = len({groups[row] for row in train})
            _check_count(split.name, f"groups with label {label} in its training part", N_FOLDS, seen, _OTHER_GROUPS)


_OTHER_GROUPS = "prompts of other groups, or group by another column"


def _check_count(split: str, counted: str, needed: int, count: int, add: str) -> None:
    if count < needed:
        raise DatasetError(f"Split {split!r} needs at least {needed} {counted}, and has {count}: add {add}.")


# What the probes of a run share ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Labels (n,) to predict, the splits, the group of each prompt (n,) or None, and labels of the control task.

    ``control`` (draws, n) is None without groups. ``first_label`` is the label that the paper's split puts first.
    """

    labels: Ints
    splits: tuple[Split, ...]
    groups: NDArray[Any] | None = None
    control: Ints | None = None
    first_label: int = 1

    @property
    def default_split(self) -> str:
        """Name of the split that ``current`` shows: by group where there are groups."""
        names = [split.name for split in self.splits]
        return "grouped" if "grouped" in names else names[0]

    @cached_property
    def folds(self) -> dict[str, Ints]:
        """The fold of each training row of each split; groups are kept together where the split keeps them together."""
        return {split.name: self._folds(split) for split in self.splits}

    def _folds(self, split: Split) -> Ints:
        labels = self.labels[split.train]
        groups = np.arange(len(labels)) if self.groups is None or self.is_crossed(split) else self.groups[split.train]
        fold_of = np.empty(len(labels), dtype=np.int64)
        n_folds = N_FOLDS if len(labels) < MANY else N_FOLDS_OF_MANY
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=PAPER_SEED)
        for fold, (_train, held_out) in enumerate(splitter.split(labels, labels, groups)):
            fold_of[held_out] = fold
        return fold_of

    def tested_rows(self, split: str) -> Ints:
        """Return the row numbers of a split's test part."""
        return next(one.test for one in self.splits if one.name == split)

    def is_crossed(self, split: Split) -> bool:
        """Whether a group has prompts on both sides of a split."""
        return self.groups is not None and bool(np.isin(self.groups[split.test], self.groups[split.train]).any())

    def controls(self, split: Split) -> Ints:
        """The draws (draws, n) of the control task for a split; none unless it is crossed by groups."""
        none: Ints = np.empty((0, len(self.labels)), dtype=np.int64)
        return self.control if self.control is not None and self.is_crossed(split) else none


def make_task(
    labels: ArrayLike,
    splits: Sequence[Split],
    *,
    groups: Sequence[str] | None = None,
    first_label: int = 1,
    seed: int = PAPER_SEED,
) -> Task:
    """Build the task of a run, and draw the labels of its control task if there are ``groups`` (n,)."""
    y = np.asarray(labels, dtype=np.int64)
    task = Task(y, tuple(splits), None if groups is None else np.asarray(groups, dtype=object), None, first_label)
    if any(map(task.is_crossed, splits)):
        task = replace(task, control=control_labels(task, seed))
    return task


def control_labels(task: Task, seed: int = PAPER_SEED) -> Ints:
    """Draw the labels (draws, n) of the control task: one label for each group, half of the groups each.

    A probe can learn them from what the prompts of a group share, and only so: on unseen groups it guesses. Drawn again
    until both sides of every split that groups cross have both labels.
    """
    assert task.groups is not None
    names, group_of = np.unique(task.groups, return_inverse=True)
    sides = [rows for split in task.splits if task.is_crossed(split) for rows in (split.train, split.test)]
    rng, drawn = np.random.default_rng(seed), list[Ints]()
    while len(drawn) < N_CONTROLS:
        labels = rng.permutation(np.arange(len(names)) % 2)[group_of]
        if all(0 < labels[rows].mean() < 1 for rows in sides):
            drawn.append(labels)
    return np.stack(drawn)
