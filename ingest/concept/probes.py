"""Linear probes: measure how well a classifier predicts a label from the hidden states of one layer.

The mathematical core: it takes arrays and returns frozen scores, independent of models, runner and database.

    splits = make_splits(labels, n_splits=3, groups=cities)
    control = control_labels(labels, splits)
    for score in score_probes(X, labels, control, splits, ["logistic", "logistic-paper"]): ...

``logistic`` is the L2 logistic regression of the concept-depth paper (arXiv 2404.07066, section 3), solved to its
optimum; ``logistic-paper`` is the fit of the published code, which stops before the optimum. Every classifier is also
fitted to shuffled labels, the control task of Hewitt and Liang (2019, arXiv 1909.03368).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from sklearn.preprocessing import StandardScaler

from kdb.errors import DatasetError, ModelError, UnknownNameError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Key = TypeVar("Key")

PAPER_SEED = 42
TEST_SHARE = 0.4
N_FOLDS = 5
"""Folds of the training part. Each class needs as many prompts there and, in a grouped split, as many groups."""


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


def control_labels(labels: ArrayLike, splits: Sequence[Split], seed: int = PAPER_SEED) -> NDArray[Any]:
    """Shuffle the labels (n,) for the control task, so that they are independent of the prompts.

    Shuffles again until both sides of every split have both classes; ``labels`` must have them, too.
    """
    rng = np.random.default_rng(seed)
    while True:
        drawn = rng.permutation(np.asarray(labels))
        if all(0 < drawn[rows].mean() < 1 for split in splits for rows in (split.train, split.test)):
            return drawn


# Scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScore:
    """Scores of one classifier on one split; accuracy with its 95 % Wilson interval.

    ``converged`` is proved for ``logistic`` and ``logistic-standardised`` (see ``LogisticFit``); for
    ``logistic-paper`` it is scikit-learn's report that lbfgs stopped before its 100th step. ``n_iter`` is 0 for the
    random forest. ``control_accuracy`` is the accuracy on the control task, and ``predicted`` (n_test,) are the labels
    predicted for the rows of the split's ``test``.
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
    f1: float
    auc: float
    control_accuracy: float
    selectivity: float
    predicted: NDArray[np.int16] = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Reading:
    """Predictions of a fitted classifier for the test rows: class, and a value that grows with the odds of label 1."""

    predicted: NDArray[Any]
    decision: NDArray[Any]
    converged: bool
    n_iter: int


def score_probes(
    X: NDArray[Any], labels: ArrayLike, control: ArrayLike, splits: Sequence[Split], classifiers: Sequence[str]
) -> list[ProbeScore]:
    """Fit every classifier on every split of one layer's hidden states ``X`` (n, hidden), float16 or float32.

    ``control`` (n,) are the labels of the control task. Scores are ordered by split, then by classifier, as given.
    ``CLASSIFIERS`` has the names of classifiers.
    Raises UnknownNameError for another name, ModelError for a state that is not finite.
    """
    for name in classifiers:
        if name not in _READERS:
            raise UnknownNameError("classifier", name, CLASSIFIERS, f"Use one of {', '.join(CLASSIFIERS)}.")
    if not np.isfinite(X).all():
        raise ModelError("The hidden states contain infinite values or NaN: run the model with --dtype float32.")
    X, y, y_control = np.asarray(X, dtype=np.float32), np.asarray(labels), np.asarray(control)
    return [_score(name, split, X, y, y_control) for split in splits for name in classifiers]


def _score(name: str, split: Split, X: NDArray[np.float32], y: NDArray[Any], y_control: NDArray[Any]) -> ProbeScore:
    read = _READERS[name](X[split.train], X[split.test])
    reading, control = read(y[split.train]), read(y_control[split.train])
    truth = y[split.test]
    right = int(np.sum(reading.predicted == truth))
    accuracy, control_accuracy = right / len(truth), float(np.mean(control.predicted == y_control[split.test]))
    low, high = wilson_interval(right, len(truth))
    return ProbeScore(
        classifier=name,
        split=split.name,
        converged=reading.converged,
        n_iter=reading.n_iter,
        n_train=len(split.train),
        n_test=len(truth),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        f1=float(f1_score(truth, reading.predicted, zero_division=0.0)),
        auc=float(roc_auc_score(truth, reading.decision)),
        control_accuracy=control_accuracy,
        selectivity=accuracy - control_accuracy,
        predicted=reading.predicted.astype(np.int16),
    )


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the ends of the 95 % Wilson interval of a proportion."""
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


# Classifiers ---------------------------------------------------------------------------------------------------
#
# A classifier takes the rows to fit on and the rows to score. It returns a function that takes labels of the former and
# predicts labels of the latter. That is called with the task's labels and with the control task's, so that work which
# both need is done once.

_Read = Callable[[NDArray[Any]], _Reading]


def _logistic(X: NDArray[Any], X_test: NDArray[Any]) -> _Read:
    design, rows = Design(X), X_test.astype(np.float64)

    def read(y: NDArray[Any]) -> _Reading:
        fit = fit_logistic(design, y)
        decision = rows @ fit.coef + fit.intercept
        return _Reading(decision > 0, decision, fit.converged, fit.n_iter)

    return read


def _logistic_standardised(X: NDArray[np.float32], X_test: NDArray[np.float32]) -> _Read:
    scaler = StandardScaler().fit(X.astype(np.float64))
    return _logistic(scaler.transform(X.astype(np.float64)), scaler.transform(X_test.astype(np.float64)))


def _logistic_paper(X: NDArray[np.float32], X_test: NDArray[np.float32]) -> _Read:
    def read(y: NDArray[Any]) -> _Reading:
        model = LogisticRegression()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # expected here, and stored as ``converged``
            model.fit(X, y)
        n_iter = int(model.n_iter_[0])
        # Not predict_proba: in float32 its values saturate at 0 and 1 and tie, which costs up to 0.03 of AUC.
        return _Reading(model.predict(X_test), model.decision_function(X_test), n_iter < model.max_iter, n_iter)

    return read


def _random_forest(X: NDArray[np.float32], X_test: NDArray[np.float32]) -> _Read:
    def read(y: NDArray[Any]) -> _Reading:
        model = RandomForestClassifier(random_state=PAPER_SEED).fit(X, y)
        return _Reading(model.predict(X_test), model.predict_proba(X_test)[:, 1], converged=True, n_iter=0)

    return read


_READERS = {
    "logistic": _logistic,
    "logistic-paper": _logistic_paper,
    "logistic-standardised": _logistic_standardised,
    "random-forest": _random_forest,
}
CLASSIFIERS = tuple(_READERS)


# Logistic regression, solved -----------------------------------------------------------------------------------
#
# Hidden states have a few dimensions a thousand times larger than the rest, and are separable if there are fewer
# prompts than dimensions. So first-order methods, and Newton's method with plain or diagonally scaled conjugate
# gradients, need thousands of passes. A Cholesky factor of the Hessian needs none but is expensive, and it stays
# nearly right while the weights change. So we take Newton steps by conjugate gradients, preconditioned with an old
# factor until it is too far off.

TOLERANCE = 1e-3  # in logits: largest distance of a converged decision value from the optimum's
_CG_STEPS = 8  # these cost about half a factorisation; if a system needs as many, the factor is made again
_CG_REDUCTION = 0.03  # of the residual, in the preconditioner's norm; a smaller value only makes steps more expensive


@dataclass(frozen=True)
class LogisticFit:
    """A fitted logistic regression: ``coef`` (hidden,), ``intercept``, and its largest distance from the optimum.

    ``slack`` bounds the distance, in logits, of any decision value from the exact optimum's (see ``_slack``).
    """

    coef: Floats
    intercept: float
    slack: float
    n_iter: int

    @property
    def converged(self) -> bool:
        """Whether the last iterate is proved to be within ``TOLERANCE`` of the optimum."""
        return self.slack <= TOLERANCE


class Design:
    """The rows to fit on, prepared for Newton's method and shared by fits to different labels.

    ``A`` (n, hidden + 1) are the centred rows with a constant feature appended, whose weight is the intercept. The
    feature is as large as the longest row (``radius``): the preconditioner penalises it, the objective does not, and at
    this size the penalty is negligible. ``gram`` is AAᵀ (n, n) if n is small enough to make it worthwhile, else None.
    """

    def __init__(self, X: NDArray[Any]) -> None:
        n, m = X.shape[0], X.shape[1] + 1
        self.mean = X.mean(axis=0, dtype=np.float64)  # subtracted against cancellation; the intercept absorbs it
        self.A = np.empty((n, m))
        rows = np.subtract(X, self.mean, out=self.A[:, :-1])
        self.radius = float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max())) or 1.0
        self.A[:, -1] = self.radius
        self.gram = self.A @ self.A.T if n < 1.5 * m else None  # at n = 1.5 m a few factorisations repay it


def fit_logistic(design: Design, labels: ArrayLike, max_iter: int = 100) -> LogisticFit:
    """Minimise ½‖w‖² + Σᵢ log(1 + exp(−sᵢ (xᵢ·w + b))), s = ±1: scikit-learn's objective at C = 1.

    The rows xᵢ may have any scale and any float type; all arithmetic is float64. ``labels`` (n,) are 0 or 1.
    Newton's method with exact line search; ``n_iter`` counts the steps.
    """
    y, A = np.asarray(labels, dtype=np.float64), design.A
    penalty = np.ones(A.shape[1])
    penalty[-1] = 0.0
    hessian = _FactoredHessian(design)
    w, stale = np.zeros(A.shape[1]), True
    for n_iter in range(max_iter + 1):
        logits = A @ w
        p = expit(logits)
        gradient = penalty * w + A.T @ (p - y)
        slack = _slack(gradient, design.radius)
        if slack <= TOLERANCE or n_iter == max_iter:
            slack, shift = _proved_slack(design, w, logits, y)
            if slack <= TOLERANCE or n_iter == max_iter:
                break
            w[-1] += shift / design.radius  # short rows: the gradient is small although the intercept is far off
            stale = True
            continue
        curvature = p * (1 - p)
        if stale:
            hessian.refresh(curvature)
        step, stale = _newton_step(A, penalty, curvature, gradient, hessian)
        length = _line_minimum(w, step, penalty, logits, A @ step, y)
        if length == 0.0:
            break  # rounding prevents further descent; slack decides whether the fit is close enough
        w += length * step
    coef = w[:-1]
    return LogisticFit(coef, float(w[-1] * design.radius - design.mean @ coef), slack, n_iter)


def _slack(gradient: Floats, radius: float) -> float:
    """Return the largest distance, in logits, of a decision value from the optimum's.

    With the best intercept for w, the objective is 1-strongly convex in w, hence ‖w − w*‖ ≤ ‖gradient‖
    (½‖gradient‖² is then the duality gap). The decision value of a row within ``radius`` of the mean changes by at most
    radius·‖w − w*‖ through w, and by the same again through the intercept, which changes with w at that rate.
    """
    return 2 * radius * float(np.linalg.norm(gradient))


def _proved_slack(design: Design, w: Floats, logits: Floats, y: Floats) -> tuple[float, float]:
    """Return ``_slack`` at the best intercept for w plus the distance to this intercept; and the signed distance.

    ``_slack`` alone does not bound the error of the intercept, which has no penalty: with rows of length 0.001, its
    gradient times their length is small even if it is far off.
    """
    shift = _best_shift(logits, y)
    gradient = w[:-1] + design.A[:, :-1].T @ (expit(logits + shift) - y)
    return _slack(gradient, design.radius) + abs(shift), shift


def _best_shift(logits: Floats, y: Floats) -> float:
    """Return the correction t that makes the intercept best: the root of Σ expit(logits + t) − y."""

    def slope(t: float) -> float:
        return float((expit(logits + t) - y).sum())

    if not 0 < y.sum() < len(y):
        return 0.0  # with only one class there is no root
    reach = 1.0
    while slope(-reach) > 0 or slope(reach) < 0:
        reach *= 2
    return float(brentq(slope, -reach, reach))


class _FactoredHessian:
    """Solver of (I + AᵀDA) x = g for A (n, m) and the diagonal D of the last ``refresh``.

    With few rows it works in their space: with S = D^½ and K = AAᵀ, the design's ``gram``, Woodbury's identity gives
    x = g − AᵀS (I + SKS)⁻¹ SA g (Rasmussen & Williams 2006, section 3.4.3), so a refresh costs n³/3 operations
    instead of nm² + m³/3.
    """

    def __init__(self, design: Design) -> None:
        self._A, self._gram = design.A, design.gram

    def refresh(self, curvature: Floats) -> None:
        self._root = np.sqrt(curvature)
        if self._gram is None:
            scaled = self._A * self._root[:, None]
            M = scaled.T @ scaled
        else:
            M = self._gram * self._root
            M *= self._root[:, None]
        # Keeps the matrix positive definite despite rounding; a preconditioner may be slightly inexact.
        M[np.diag_indices_from(M)] += 1 + np.finfo(np.float64).eps * np.trace(M)
        # M is symmetric: its transpose is the column-major matrix that LAPACK overwrites without a copy.
        self._factor = cho_factor(M.T, lower=True, overwrite_a=True, check_finite=False)

    def solve(self, g: Floats) -> Floats:
        if self._gram is None:
            x: Floats = cho_solve(self._factor, g, check_finite=False)
            return x
        inner = cho_solve(self._factor, self._root * (self._A @ g), check_finite=False)
        rows: Floats = self._A.T @ (self._root * inner)
        return g - rows


def _newton_step(
    A: Floats, penalty: Floats, curvature: Floats, gradient: Floats, preconditioner: _FactoredHessian
) -> tuple[Floats, bool]:
    """Solve (diag(penalty) + Aᵀ diag(curvature) A) x = −gradient roughly; also return whether the factor is stale.

    Preconditioned conjugate gradients (Nocedal & Wright 2006, algorithm 5.3). Every iterate is a direction of descent.
    """
    x, residual = np.zeros_like(gradient), -gradient
    z = preconditioner.solve(residual)
    direction, rz = z, residual @ z
    target = _CG_REDUCTION**2 * rz
    for _ in range(_CG_STEPS):
        product = penalty * direction + A.T @ (curvature * (A @ direction))
        alpha = rz / (direction @ product)
        x = x + alpha * direction
        residual = residual - alpha * product
        z = preconditioner.solve(residual)
        rz, rz_before = residual @ z, rz
        if rz <= target:
            return x, False
        direction = z + (rz / rz_before) * direction
    return x, True


def _line_minimum(w: Floats, step: Floats, penalty: Floats, logits: Floats, change: Floats, y: Floats) -> float:
    """Return the t ≥ 0 that minimises the objective at w + t·step; ``change`` is the change of the logits at t = 1.

    The search is exact, which is cheap: it works on vectors only. On separable data, t = 1 is far too short at first.
    """
    tilt, bend = (penalty * w) @ step, (penalty * step) @ step

    def slope(t: float) -> float:
        return float((expit(logits + t * change) - y) @ change + tilt + t * bend)

    if slope(0.0) >= 0:
        return 0.0
    high = 1.0
    while slope(high) < 0:
        high *= 2
    t: float = brentq(slope, 0.0, high, xtol=1e-9)
    return t
