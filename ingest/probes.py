"""Linear probes: how well a label can be read off the hidden states of one layer.

A mathematical core. It takes arrays and returns frozen scores; it knows no model, no runner and no database.

    splits = make_splits(labels, n_splits=3, groups=cities)
    for score in score_probes(X, labels, splits, ["logistic", "logistic-paper"]): ...

``logistic`` is the L2 logistic regression of the concept-depth paper (arXiv 2404.07066, section 3), taken to its
optimum; ``logistic-paper`` is what the published code computes, which stops before it gets there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import joblib
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

from kdb.errors import DatasetError, ModelError, UnknownNameError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Key = TypeVar("Key")

PAPER_SEED = 42
TEST_SHARE = 0.4


# Splits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One division of the prompts: row numbers to fit on and row numbers to score, in the order of use."""

    name: str
    train: Ints
    test: Ints


def make_splits(
    labels: ArrayLike, *, n_splits: int = 1, groups: Sequence[str] | None = None, seed: int = PAPER_SEED
) -> list[Split]:
    """Divide prompts 60/40: as published, in ``n_splits - 1`` further stratified ways, and by group.

    ``labels`` (n,) are 0 or 1; ``groups`` (n,), if given, adds a split in which no group is on both sides.
    The split ``paper`` ignores ``seed``; ``stratified-S`` and ``grouped`` follow from it.
    Raises DatasetError where a label is neither 0 nor 1, or a side of a split has no prompt of a class.
    """
    y = np.asarray(labels)
    _check_labels(y)
    order = np.argsort(y, kind="stable")  # the published code reads one class after the other, 0 first
    splits = [_random_split("paper", order, PAPER_SEED)]
    splits += [_random_split(f"stratified-{s}", order, s, stratify=y[order]) for s in range(seed + 1, seed + n_splits)]
    if groups is not None:
        splits.append(_grouped_split(groups, seed))
    for split in splits:
        _check_split(split, y)
    return splits


def _random_split(name: str, order: Ints, seed: int, stratify: NDArray[Any] | None = None) -> Split:
    train, test = train_test_split(order, test_size=TEST_SHARE, random_state=seed, stratify=stratify)
    return Split(name, train, test)


def _grouped_split(groups: Sequence[str], seed: int) -> Split:
    names = np.asarray(groups, dtype=object)
    if len(set(names)) < 2:
        raise DatasetError("The grouped split needs at least two groups; every prompt is in the same one.")
    splitter = GroupShuffleSplit(n_splits=1, test_size=TEST_SHARE, random_state=seed)
    train, test = next(splitter.split(names, groups=names))
    return Split("grouped", train, test)


def _check_labels(y: NDArray[Any]) -> None:
    if not np.isin(y, (0, 1)).all():
        raise DatasetError("Probing needs labels 0 and 1 only.")
    for label in (0, 1):
        if (count := int(np.sum(y == label))) < 2:
            raise DatasetError(f"Probing needs at least two prompts of each label; label {label} has {count}.")


def _check_split(split: Split, y: NDArray[Any]) -> None:
    for side, rows in (("training", split.train), ("test", split.test)):
        for label in (0, 1):
            if not (y[rows] == label).any():
                raise DatasetError(
                    f"Split {split.name!r} leaves no prompt of label {label} in its {side} part; add prompts."
                )


# Scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScore:
    """What one classifier reaches on one split; accuracy with its 95 % Wilson interval.

    ``converged`` is proved for ``logistic`` (see ``LogisticFit``); for ``logistic-paper`` it is scikit-learn's
    word, that lbfgs stopped by itself before its 100th step. ``n_iter`` is 0 for the random forest.
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


@dataclass(frozen=True)
class _Reading:
    """A fitted classifier's word on the test rows: class and a value that grows with its belief in label 1."""

    predicted: NDArray[Any]
    decision: NDArray[Any]
    converged: bool
    n_iter: int


def score_probes(
    X: NDArray[Any], labels: ArrayLike, splits: Sequence[Split], classifiers: Sequence[str]
) -> list[ProbeScore]:
    """Fit every classifier on every split of one layer's hidden states ``X`` (n, hidden), float16 or float32.

    Ordered by split, then classifier, as given. The classifiers are named in ``CLASSIFIERS``.
    Raises UnknownNameError for another name, ModelError where a state is not finite.
    """
    for name in classifiers:
        if name not in _READERS:
            raise UnknownNameError("classifier", name, CLASSIFIERS, f"Take one of {', '.join(CLASSIFIERS)}.")
    if not np.isfinite(X).all():
        raise ModelError("The hidden states hold infinite values or NaN; run the model with --dtype float32.")
    X, y = np.asarray(X, dtype=np.float32), np.asarray(labels)
    return [_score(name, split, X, y) for split in splits for name in classifiers]


def map_layers(
    load: Callable[[Key], NDArray[Any]],
    keys: Sequence[Key],
    labels: ArrayLike,
    splits: Sequence[Split],
    classifiers: Sequence[str],
    n_jobs: int,
) -> Iterator[tuple[Key, list[ProbeScore]]]:
    """Yield each key with the scores of its matrix ``load(key)``, in the order of ``keys``, as they are ready.

    ``load`` runs inside the ``n_jobs`` worker processes, so that no more than ``n_jobs`` matrices are in memory;
    it must be picklable. The workers share the cores evenly: a fit took 12 s of CPU on two threads, 8 on one.
    """
    threads = max(1, joblib.cpu_count() // n_jobs)
    with joblib.parallel_config(backend="loky", inner_max_num_threads=threads):
        parallel = joblib.Parallel(n_jobs, return_as="generator", pre_dispatch="n_jobs", batch_size=1)
    task = joblib.delayed(_load_and_score)
    results = parallel(task(load, key, labels, splits, classifiers) for key in keys)
    try:
        yield from zip(keys, results, strict=True)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # joblib's, of layers that are given up when a caller stops
            results.close()


def _load_and_score(
    load: Callable[[Key], NDArray[Any]], key: Key, labels: ArrayLike, splits: Sequence[Split], names: Sequence[str]
) -> list[ProbeScore]:
    return score_probes(load(key), labels, splits, names)


def _score(name: str, split: Split, X: NDArray[np.float32], y: NDArray[Any]) -> ProbeScore:
    reading = _READERS[name](X[split.train], y[split.train], X[split.test])
    truth = y[split.test]
    right = int(np.sum(reading.predicted == truth))
    low, high = wilson_interval(right, len(truth))
    return ProbeScore(
        classifier=name,
        split=split.name,
        converged=reading.converged,
        n_iter=reading.n_iter,
        n_train=len(split.train),
        n_test=len(truth),
        accuracy=right / len(truth),
        accuracy_low=low,
        accuracy_high=high,
        f1=float(f1_score(truth, reading.predicted, zero_division=0.0)),
        auc=float(roc_auc_score(truth, reading.decision)),
    )


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the ends of the 95 % Wilson interval of a proportion."""
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


# Classifiers ---------------------------------------------------------------------------------------------------


def _read_logistic(X: NDArray[np.float32], y: NDArray[Any], X_test: NDArray[np.float32]) -> _Reading:
    fit = fit_logistic(X, y)
    decision = X_test.astype(np.float64) @ fit.coef + fit.intercept
    return _Reading(decision > 0, decision, fit.converged, fit.n_iter)


def _read_logistic_paper(X: NDArray[np.float32], y: NDArray[Any], X_test: NDArray[np.float32]) -> _Reading:
    model = LogisticRegression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is the point, and ``converged`` says it
        model.fit(X, y)
    n_iter = int(model.n_iter_[0])
    # Not predict_proba: in float32 its values run into 0 and 1 and tie, which costs up to 0.03 of AUC.
    return _Reading(model.predict(X_test), model.decision_function(X_test), n_iter < model.max_iter, n_iter)


def _read_random_forest(X: NDArray[np.float32], y: NDArray[Any], X_test: NDArray[np.float32]) -> _Reading:
    model = RandomForestClassifier(random_state=PAPER_SEED).fit(X, y)
    return _Reading(model.predict(X_test), model.predict_proba(X_test)[:, 1], converged=True, n_iter=0)


_READERS = {
    "logistic": _read_logistic,
    "logistic-paper": _read_logistic_paper,
    "random-forest": _read_random_forest,
}
CLASSIFIERS = tuple(_READERS)


# Logistic regression, solved -----------------------------------------------------------------------------------
#
# Hidden states have a few dimensions a thousand times larger than the rest, and fewer prompts than dimensions
# are separable: first-order methods, and Newton with plain or diagonally scaled conjugate gradients, need
# thousands of passes. A Cholesky factor of the Hessian needs none but is dear, and it stays nearly right while
# the weights change. So: Newton steps by conjugate gradients, preconditioned with an old factor until it is stale.

TOLERANCE = 1e-3  # logits: how far a converged decision value may be from the optimum's
_CG_STEPS = 8  # cost about half a factorisation; a system that needs as many calls for a fresh factor
_CG_REDUCTION = 0.03  # of the residual, in the preconditioner's norm; smaller only makes the steps dearer


@dataclass(frozen=True)
class LogisticFit:
    """A logistic regression: ``coef`` (hidden,), ``intercept``, and how far it can be from the optimum.

    ``slack`` bounds, in logits, the distance of any decision value from the exact optimum's (see ``_slack``).
    """

    coef: Floats
    intercept: float
    slack: float
    n_iter: int

    @property
    def converged(self) -> bool:
        """Whether the last iterate is proved to be within ``TOLERANCE`` of the optimum."""
        return self.slack <= TOLERANCE


def fit_logistic(X: NDArray[Any], labels: ArrayLike, max_iter: int = 100) -> LogisticFit:
    """Minimise ½‖w‖² + Σᵢ log(1 + exp(−sᵢ (xᵢ·w + b))), s = ±1: scikit-learn's objective at C = 1.

    ``X`` (n, hidden) in any scale and any float type; all arithmetic is float64. ``labels`` (n,) are 0 or 1.
    Newton's method, each step to the exact minimum of its line; ``n_iter`` counts the steps.
    """
    y = np.asarray(labels, dtype=np.float64)
    mean = X.mean(axis=0, dtype=np.float64)  # the free intercept absorbs it, and cancellation goes with it
    A, radius = _design(X, mean)
    penalty = np.ones(A.shape[1])
    penalty[-1] = 0.0
    hessian = _FactoredHessian(A)
    w, stale = np.zeros(A.shape[1]), True
    for n_iter in range(max_iter + 1):
        logits = A @ w
        p = expit(logits)
        gradient = penalty * w + A.T @ (p - y)
        slack = _slack(gradient, radius)
        if slack <= TOLERANCE or n_iter == max_iter:
            break
        curvature = p * (1 - p)
        if stale:
            hessian.refresh(curvature)
        step, stale = _newton_step(A, penalty, curvature, gradient, hessian)
        length = _line_minimum(w, step, penalty, logits, A @ step, y)
        if length == 0.0:
            break  # rounding hides the way down; slack tells whether that is near enough
        w += length * step
    coef = w[:-1]
    return LogisticFit(coef, float(w[-1] * A[0, -1] - mean @ coef), slack, n_iter)


def _design(X: NDArray[Any], mean: Floats) -> tuple[Floats, float]:
    """Return the centred rows with a constant feature appended (n, hidden + 1), and the longest row's norm.

    The intercept is the weight of that feature. It is as long as the longest row, so that the preconditioner's
    penalty on it, which the objective doesn't have, hardly counts.
    """
    A = np.empty((X.shape[0], X.shape[1] + 1))
    np.subtract(X, mean, out=A[:, :-1])
    radius = float(np.sqrt(np.einsum("ij,ij->i", A[:, :-1], A[:, :-1]).max())) or 1.0
    A[:, -1] = radius
    return A, radius


def _slack(gradient: Floats, radius: float) -> float:
    """Return how far, in logits, a decision value can be from the optimum's.

    With the intercept at its best for w, the objective is 1-strongly convex in w, hence ‖w − w*‖ ≤ ‖gradient‖
    (½‖gradient‖² is then the duality gap). A row within ``radius`` of the mean moves by at most
    radius·‖w − w*‖ through w, and as much again through the intercept, which follows w at that rate.
    """
    return 2 * radius * float(np.linalg.norm(gradient))


class _FactoredHessian:
    """Solves (I + AᵀDA) x = g for A (n, m) and the diagonal D of the last ``refresh``.

    With few rows it works in their space: with S = D^½ and K = AAᵀ, computed once, Woodbury's identity gives
    x = g − AᵀS (I + SKS)⁻¹ SA g (Rasmussen & Williams 2006, section 3.4.3), so a refresh costs n³/3 operations
    instead of nm² + m³/3.
    """

    def __init__(self, A: Floats) -> None:
        n, m = A.shape
        self._A = A
        self._gram = A @ A.T if n < 1.5 * m else None  # even at n = 1.5 m a few refreshes repay it

    def refresh(self, curvature: Floats) -> None:
        self._root = np.sqrt(curvature)
        if self._gram is None:
            scaled = self._A * self._root[:, None]
            M = scaled.T @ scaled
        else:
            M = self._gram * self._root
            M *= self._root[:, None]
        # Rounding must not cost positive definiteness; a preconditioner may be a little off.
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
    """Solve (diag(penalty) + Aᵀ diag(curvature) A) x = −gradient roughly; also say if the factor is stale.

    Preconditioned conjugate gradients (Nocedal & Wright 2006, algorithm 5.3). Every iterate, the last one
    included, is a direction of descent.
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
    """Return the t ≥ 0 that minimises the objective at w + t·step; ``change`` is what t = 1 adds to the logits.

    Exact, since it costs vectors only: on separable data the first step is many times too short otherwise.
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
