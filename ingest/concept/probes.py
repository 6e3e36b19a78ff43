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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from kdb.errors import ModelError, UnknownNameError
from kdb.ingest.concept.logistic import (
    Design,
    Scaled,
    choose_penalty,
    fit_logistic,
    fit_penalised,
    in_raw_coordinates,
)
from kdb.ingest.concept.metrics import score_predictions
from kdb.ingest.concept.splits import PAPER_SEED, Split, Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
