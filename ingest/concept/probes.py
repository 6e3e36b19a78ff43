"""Linear probes: measure how well a classifier predicts a label from the hidden states of one layer.

The mathematical core: it takes arrays and returns frozen scores, independent of models, runner and database.

    splits = make_splits(labels, n_splits=3, groups=cities)
    task = make_task(labels, splits, groups=cities)
    for score in score_probes(X, task, ["logistic", "logistic-raw"]): ...

``logistic`` divides vectors by their root mean square distance from the mean and chooses its penalty by validation
within the training part, so that no unit of measure decides. ``logistic-raw`` is the L2 logistic regression of the
concept-depth paper (arXiv 2404.07066, section 3), solved to its optimum; ``logistic-paper`` is the fit of the published
code, which stops before the optimum. ``mean-difference`` is the direction from the mean of label 0 to that of label 1
(Marks and Tegmark 2023, arXiv 2310.06824). Where groups are on both sides of a split, every classifier is also fitted
to the control task of Hewitt and Liang (2019, arXiv 1909.03368): one random label for each group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold, train_test_split
from sklearn.preprocessing import StandardScaler

from kdb.errors import DatasetError, ModelError, UnknownNameError
from kdb.ingest.concept.logistic import (
    Design,
    Scaled,
    choose_penalty,
    fit_logistic,
    fit_penalised,
    in_raw_coordinates,
)
from kdb.ingest.concept.metrics import score_predictions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Key = TypeVar("Key")

PAPER_SEED = 42
TEST_SHARE = 0.4
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
                f"on; label {label} has {count}. Add prompts of this label."
            )


def _check_split(split: Split, y: NDArray[Any], groups: Sequence[str] | None) -> None:
    for label in (0, 1):
        train, test = (rows[y[rows] == label] for rows in (split.train, split.test))
        _check_count(split.name, f"prompts of label {label} in its training part", N_FOLDS, len(train), "prompts")
        _check_count(split.name, f"prompt of label {label} in its test part", 1, len(test), "prompts")
        if groups is not None:
            seen, add = len({groups[row] for row in train}), "prompts of other groups, or group by another column"
            _check_count(split.name, f"groups with label {label} in its training part", N_FOLDS, seen, add)


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

    @cached_property
    def folds(self) -> dict[str, Ints]:
        """The fold of each training row of each split; groups are kept together where the split keeps them together."""
        return {split.name: self._folds(split) for split in self.splits}

    def _folds(self, split: Split) -> Ints:
        labels = self.labels[split.train]
        groups = np.arange(len(labels)) if self.groups is None or self.is_crossed(split) else self.groups[split.train]
        fold_of = np.empty(len(labels), dtype=np.int64)
        splitter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=PAPER_SEED)
        for fold, (_train, held_out) in enumerate(splitter.split(labels, labels, groups)):
            fold_of[held_out] = fold
        return fold_of

    def test_rows(self, split: str) -> Ints:
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


# Scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScore:
    """Scores of one classifier on one split, as in the table ``probe_scores``; intervals as in ``metrics``.

    ``converged`` is proved for the classifiers ``logistic``, ``logistic-raw`` and ``logistic-standardised`` (see
    ``LogisticFit``); for ``logistic-paper`` it is scikit-learn's report that lbfgs stopped before its 100th step.
    ``n_iter`` is 0 for the others. ``control_accuracy`` is the mean accuracy on the control task, None where there is
    none. ``c``, ``scale`` and ``c_at_end`` are those of ``logistic``.
    """

    classifier: str
    split: str
    converged: bool
    n_iter: int
    n_train: int
    n_test: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    f1: float
    f1_paper: float
    auc: float
    auc_low: float
    auc_high: float
    control_accuracy: float | None
    control_sd: float | None
    selectivity: float | None
    c: float | None
    scale: float | None
    c_at_end: bool | None


@dataclass(frozen=True)
class Probe:
    """A fitted probe: its score, the labels (n_test,) that it predicts for the split's test rows, and its direction.

    A state x is classified as label 1 where ``weights`` (hidden,) · x + ``intercept`` > 0; None if it is not linear.
    """

    score: ProbeScore
    predicted: NDArray[np.int16]
    weights: NDArray[np.float32] | None
    intercept: float | None


@dataclass(frozen=True)
class _Reading:
    """Predictions of a fitted classifier for the test rows: class, and a value that grows with the odds of label 1."""

    predicted: NDArray[Any]
    decision: NDArray[Any]
    converged: bool = True
    n_iter: int = 0
    weights: Floats | None = None
    intercept: float | None = None
    c: float | None = None
    scale: float | None = None
    c_at_end: bool | None = None


def fit_probes(X: NDArray[Any], task: Task, classifiers: Sequence[str]) -> list[Probe]:
    """Fit every classifier on every split of one layer's hidden states ``X`` (n, hidden), float16 or float32.

    Probes are ordered by split, then by classifier, as given. ``CLASSIFIERS`` has the names of classifiers.
    Raises UnknownNameError for another name, ModelError for a state that is not finite.
    """
    for name in classifiers:
        if name not in _READERS:
            raise UnknownNameError("classifier", name, CLASSIFIERS, f"Use one of {', '.join(CLASSIFIERS)}.")
    if not np.isfinite(X).all():
        raise ModelError("The hidden states contain infinite values or NaN: run the model with --dtype float32.")
    X = np.asarray(X, dtype=np.float32)
    return [_probe(name, split, X, task) for split in task.splits for name in classifiers]


def score_probes(X: NDArray[Any], task: Task, classifiers: Sequence[str]) -> list[ProbeScore]:
    """Return the scores of ``fit_probes``."""
    return [probe.score for probe in fit_probes(X, task, classifiers)]


def _probe(name: str, split: Split, X: NDArray[np.float32], task: Task) -> Probe:
    read = _READERS[name](X[split.train], X[split.test], task.folds[split.name])
    reading, truth = read(task.labels[split.train], None), task.labels[split.test]
    groups = None if task.groups is None else task.groups[split.test]
    score = score_predictions(truth, reading.predicted, reading.decision, groups)
    controls = [
        float(np.mean(read(labels[split.train], reading.c).predicted == labels[split.test]))
        for labels in task.controls(split)
    ]
    control = float(np.mean(controls)) if controls else None
    return Probe(
        ProbeScore(
            classifier=name,
            split=split.name,
            converged=reading.converged,
            n_iter=reading.n_iter,
            n_train=len(split.train),
            n_test=len(truth),
            accuracy=score.accuracy,
            accuracy_low=score.accuracy_low,
            accuracy_high=score.accuracy_high,
            balanced_accuracy=score.balanced_accuracy,
            f1=score.f1,
            f1_paper=score.f1_of_0 if task.first_label == 1 else score.f1,
            auc=score.auc,
            auc_low=score.auc_low,
            auc_high=score.auc_high,
            control_accuracy=control,
            control_sd=float(np.std(controls, ddof=1)) if controls else None,
            selectivity=None if control is None else score.accuracy - control,
            c=reading.c,
            scale=reading.scale,
            c_at_end=reading.c_at_end,
        ),
        reading.predicted.astype(np.int16),
        None if reading.weights is None else reading.weights.astype(np.float32),
        reading.intercept,
    )


# Classifiers ---------------------------------------------------------------------------------------------------
#
# A classifier takes the rows to fit on, the rows to score, and the folds of the former. It returns a function that
# takes labels of the rows to fit on, and predicts labels of the others. That is called with the task's labels and with
# the control task's, so that work which both need is done once; the control task is given the task's penalty.

_Read = Callable[[NDArray[Any], float | None], _Reading]


def _logistic(X: NDArray[np.float32], X_test: NDArray[np.float32], folds: Ints) -> _Read:
    scaled = Scaled(X)
    rows = scaled.of(X_test)

    def read(y: NDArray[Any], c: float | None) -> _Reading:
        if scaled.scale == 0.0:
            return _majority(y, len(rows))
        at_end = None
        if c is None:
            choice = choose_penalty(scaled, y, folds)
            c, at_end = choice.c, choice.at_end
        fit = fit_penalised(scaled, y, c)
        # In scaled coordinates: a power of two by which the states are multiplied changes no bit of a prediction.
        decision = rows @ fit.coef + fit.intercept
        direction = in_raw_coordinates(scaled, fit)
        return _Reading(decision > 0, decision, fit.converged, fit.n_iter, *direction, c, scaled.scale, at_end)

    return read


def _majority(y: NDArray[Any], n_test: int) -> _Reading:
    """Predict the more frequent label: nothing else can be read from states that are all equal."""
    decision = np.full(n_test, 1.0 if y.mean() > 0.5 else -1.0)
    return _Reading(decision > 0, decision, scale=0.0)


def _logistic_raw(X: NDArray[Any], X_test: NDArray[Any], _folds: Ints) -> _Read:
    design, rows = Design(X), X_test.astype(np.float64)

    def read(y: NDArray[Any], _c: float | None) -> _Reading:
        fit = fit_logistic(design, y)
        decision = rows @ fit.coef + fit.intercept
        return _Reading(decision > 0, decision, fit.converged, fit.n_iter, fit.coef, fit.intercept)

    return read


def _logistic_standardised(X: NDArray[np.float32], X_test: NDArray[np.float32], folds: Ints) -> _Read:
    scaler = StandardScaler().fit(X.astype(np.float64))
    standard = _logistic_raw(scaler.transform(X.astype(np.float64)), scaler.transform(X_test.astype(np.float64)), folds)

    def read(y: NDArray[Any], c: float | None) -> _Reading:
        reading = standard(y, c)
        assert reading.weights is not None
        assert reading.intercept is not None
        weights = reading.weights / scaler.scale_
        return replace(reading, weights=weights, intercept=float(reading.intercept - scaler.mean_ @ weights))

    return read


def _logistic_paper(X: NDArray[np.float32], X_test: NDArray[np.float32], _folds: Ints) -> _Read:
    def read(y: NDArray[Any], _c: float | None) -> _Reading:
        model = LogisticRegression()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # expected here, and stored as ``converged``
            model.fit(X, y)
        n_iter = int(model.n_iter_[0])
        # Not predict_proba: in float32 its values saturate at 0 and 1 and tie, which costs up to 0.03 of AUC.
        decision, converged = model.decision_function(X_test), n_iter < model.max_iter
        return _Reading(model.predict(X_test), decision, converged, n_iter, model.coef_[0], float(model.intercept_[0]))

    return read


def _mean_difference(X: NDArray[np.float32], X_test: NDArray[np.float32], _folds: Ints) -> _Read:
    rows, tested = X.astype(np.float64), X_test.astype(np.float64)

    def read(y: NDArray[Any], _c: float | None) -> _Reading:
        zero, one = rows[y == 0].mean(axis=0), rows[y == 1].mean(axis=0)
        weights, middle = one - zero, (one + zero) / 2
        decision = (tested - middle) @ weights
        return _Reading(decision > 0, decision, weights=weights, intercept=float(-middle @ weights))

    return read


def _random_forest(X: NDArray[np.float32], X_test: NDArray[np.float32], _folds: Ints) -> _Read:
    def read(y: NDArray[Any], _c: float | None) -> _Reading:
        model = RandomForestClassifier(random_state=PAPER_SEED).fit(X, y)
        return _Reading(model.predict(X_test), model.predict_proba(X_test)[:, 1])

    return read


_READERS = {
    "logistic": _logistic,
    "logistic-raw": _logistic_raw,
    "logistic-paper": _logistic_paper,
    "mean-difference": _mean_difference,
    "logistic-standardised": _logistic_standardised,
    "random-forest": _random_forest,
}
CLASSIFIERS = tuple(_READERS)
