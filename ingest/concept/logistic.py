"""L2 logistic regression, solved to its optimum with a proof, and the choice of its penalty by validation.

    fit = fit_logistic(Design(X), labels)          # C = 1
    rows = Scaled(X)
    choice = choose_penalty(rows, labels, folds)   # the C with the least loss on held-out folds
    fit = fit_penalised(rows, labels, choice.c)
    weights, intercept = in_raw_coordinates(rows, fit)

The mathematical core: it takes arrays and returns frozen results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq
from scipy.special import expit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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
        self.gram = self.A @ self.A.T if _is_short(n, m) else None

    @classmethod
    def of_some(cls, rows: Floats, gram: Floats | None, chosen: Ints, factor: float) -> Design:
        """Prepare the ``chosen`` ones of centred rows (n, hidden), multiplied by ``factor``; ``gram`` is rows·rowsᵀ."""
        design = cls.__new__(cls)
        design.mean = np.zeros(rows.shape[1])
        design.A = np.empty((len(chosen), rows.shape[1] + 1))
        some = np.multiply(rows[chosen], factor, out=design.A[:, :-1])
        design.radius = float(np.sqrt(np.einsum("ij,ij->i", some, some).max())) or 1.0
        design.A[:, -1] = design.radius
        design.gram = None if gram is None else gram[np.ix_(chosen, chosen)] * factor**2 + design.radius**2
        return design


def _is_short(n: int, m: int) -> bool:
    """Whether the space of n rows is the better one to solve in; at n = 1.5 m a few factorisations repay the Gram."""
    return n < 1.5 * m


def fit_logistic(design: Design, labels: ArrayLike, max_iter: int = 100) -> LogisticFit:
    """Minimise ½‖w‖² + Σᵢ log(1 + exp(−sᵢ (xᵢ·w + b))), s = ±1: scikit-learn's objective at C = 1.

    The rows xᵢ may have any scale and any float type; all arithmetic is float64. ``labels`` (n,) are 0 or 1.
    Newton's method with exact line search; ``n_iter`` counts the steps.
    """
    w, slack, n_iter = _minimise(design, labels, np.zeros(design.A.shape[1]), max_iter)
    coef = w[:-1]
    return LogisticFit(coef, float(w[-1] * design.radius - design.mean @ coef), slack, n_iter)


def _minimise(design: Design, labels: ArrayLike, start: Floats, max_iter: int) -> tuple[Floats, float, int]:
    """Return the weights (hidden + 1,) of a design's columns, their slack, and the number of Newton steps."""
    y, A = np.asarray(labels, dtype=np.float64), design.A
    penalty = np.ones(A.shape[1])
    penalty[-1] = 0.0
    hessian = _FactoredHessian(design)
    w, stale = start.copy(), True
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
    return w, slack, n_iter


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


# The penalty, chosen by validation ------------------------------------------------------------------------------
#
# At C = 1 on raw vectors, the strength of the penalty depends on the unit of the vectors, and the residual stream grows
# with depth. Divided by their root mean square distance from the mean, vectors have no unit; and which C predicts best
# is measured on training prompts that were held out.

GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 9))
"""The values of C that are tried: 0.001 to 10,000 in half decades."""

_EQUAL = 1e-6
"""Distance of rows from their mean, over the mean's length, up to which they differ by rounding alone."""

_PATIENCE = 2  # decades
_RISE = 0.01  # in nats
_TOLD_APART = 0.1  # in nats


class Scaled:
    """Training rows (n, hidden), centred and divided by ``scale``, their root mean square distance from ``mean``.

    ``scale`` is 0 if all rows are equal, but for the rounding of float32. A power of two by which all rows are
    multiplied changes no bit of ``rows``.
    """

    def __init__(self, X: NDArray[Any]) -> None:
        self.mean = X.mean(axis=0, dtype=np.float64)
        self.rows = X - self.mean
        self.scale = float(np.sqrt(np.einsum("ij,ij->", self.rows, self.rows) / len(X)))
        if self.scale <= _EQUAL * np.linalg.norm(self.mean):
            self.scale = 0.0
        self.rows /= self.scale or 1.0

    def of(self, X: NDArray[Any]) -> Floats:
        """Return other rows in the same coordinates."""
        rows: Floats = (X - self.mean) / (self.scale or 1.0)
        return rows


@dataclass(frozen=True)
class Choice:
    """The chosen ``c``, and the mean log-loss (nats) on held-out rows at each value of ``GRID`` that was tried."""

    c: float
    losses: dict[float, float]

    @property
    def at_end(self) -> bool:
        """Whether the chosen value is the smallest or the largest of the grid."""
        return self.c in (GRID[0], GRID[-1])


def choose_penalty(scaled: Scaled, labels: ArrayLike, folds: ArrayLike) -> Choice:
    """Choose C by the least mean log-loss over held-out folds; the smaller of equals.

    ``folds`` (n,) number the fold in which each row is held out; each other fold must have both labels. The decades of
    the grid are walked upwards, each fit from the one before, then the half decades beside the best one are tried. The
    walk stops early if the fitted rows have a loss below ``_TOLD_APART`` and the held-out loss has been above its least
    value for ``_PATIENCE`` decades and by more than ``_RISE``. What follows overfits more, and is the most expensive.
    While the fitted rows are not told apart, a loss that rises may fall again: a label that stands in directions of
    small variance is found last.
    """
    y, fold_of, rows = np.asarray(labels, dtype=np.float64), np.asarray(folds), scaled.rows
    gram = rows @ rows.T if _is_short(len(rows), rows.shape[1] + 1) else None
    paths = [_FoldPath(rows, gram, y, fold_of == fold) for fold in np.unique(fold_of)]
    losses: dict[float, float] = {}
    for c in GRID[::2]:
        losses[c] = sum(path.loss(c) for path in paths) / len(y)
        walked = list(losses.values())
        least = int(np.argmin(walked))
        overfits = len(walked) - 1 - least >= _PATIENCE and walked[-1] > walked[least] + _RISE
        if overfits and np.mean([path.fitted_loss for path in paths]) < _TOLD_APART:
            break
    for c in (GRID[k] for k in (2 * least + 1, 2 * least - 1) if 0 <= k < len(GRID)):
        losses[c] = sum(path.loss(c) for path in paths) / len(y)
    return Choice(min(sorted(losses), key=losses.__getitem__), losses)


class _FoldPath:
    """The fits of one fold, each begun at that of the nearest C. ``fitted_loss`` is that of the rows fitted last."""

    def __init__(self, rows: Floats, gram: Floats | None, y: Floats, held_out: NDArray[np.bool_]) -> None:
        self._rows, self._gram, self._y = rows, gram, y
        self._train, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._fits: dict[float, tuple[Floats, float]] = {}
        self.fitted_loss = float("inf")

    def loss(self, c: float) -> float:
        """Return the summed log-loss of the fold's rows under the fit to the others."""
        factor = c**0.5
        design = Design.of_some(self._rows, self._gram, self._train, factor)
        nearest = min(self._fits, key=lambda fitted: abs(math.log(fitted / c)), default=None)
        coef, intercept = (np.zeros(self._rows.shape[1]), 0.0) if nearest is None else self._fits[nearest]
        start = np.append(coef / factor, intercept / design.radius)
        w, _slack, _n_iter = _minimise(design, self._y[self._train], start, max_iter=100)
        fit = self._fits[c] = w[:-1] * factor, float(w[-1] * design.radius)
        self.fitted_loss = self._summed(self._train, *fit) / len(self._train)
        return self._summed(self._held_out, *fit)

    def _summed(self, rows: NDArray[np.intp], coef: Floats, intercept: float) -> float:
        logits = self._rows[rows] @ coef + intercept
        return float(np.logaddexp(0.0, np.where(self._y[rows] == 1, -logits, logits)).sum())


def fit_penalised(scaled: Scaled, labels: ArrayLike, c: float) -> LogisticFit:
    """Fit at this C to the scaled rows, and in their coordinates."""
    factor = c**0.5
    fit = fit_logistic(Design(scaled.rows * factor), labels)
    return LogisticFit(fit.coef * factor, fit.intercept, fit.slack, fit.n_iter)


def in_raw_coordinates(scaled: Scaled, fit: LogisticFit) -> tuple[Floats, float]:
    """Return weights (hidden,) and intercept of a fit to scaled rows for rows as they were before scaling."""
    weights = fit.coef / (scaled.scale or 1.0)
    return weights, float(fit.intercept - scaled.mean @ weights)
