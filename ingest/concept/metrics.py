"""Scores of a binary classifier on test prompts: accuracy, F1 and AUC, with 95 % intervals that respect groups.

    score = score_predictions(labels, predicted, decision, groups)

The mathematical core: it takes arrays and returns frozen results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom, norm, rankdata

_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Score:
    """Shares of test prompts that are classified correctly, F1 of label 1 and of label 0, and the area under the ROC.

    The intervals are of 95 %. Where prompts come in groups, which share a subject and so err together, their widths are
    those of as many independent prompts as the groups are worth.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    f1: float
    f1_of_0: float
    auc: float
    auc_low: float
    auc_high: float


def score_predictions(
    labels: ArrayLike, predicted: ArrayLike, decision: ArrayLike, groups: ArrayLike | None = None
) -> Score:
    """Score predictions (n,) and decision values (n,), which grow with the belief in label 1, against labels (n,).

    ``labels`` must hold both 0 and 1; ``groups`` (n,) names the group of each prompt.
    """
    y, z = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    _, group_of = np.unique(np.arange(len(y)) if groups is None else np.asarray(groups), return_inverse=True)
    low, high = accuracy_interval(y == z, group_of)
    auc, auc_low, auc_high = auc_interval(y, decision, group_of)
    # scikit-learn's functions of the same names would take most of a probe's time.
    right = np.bincount(y[y == z], minlength=2)
    real, claimed = np.bincount(y, minlength=2), np.bincount(z, minlength=2)
    f1_of_0, f1 = (2 * right / (real + claimed)).tolist()
    return Score(
        accuracy=float(np.mean(y == z)),
        accuracy_low=low,
        accuracy_high=high,
        balanced_accuracy=float(np.mean(right / real)),
        f1=f1,
        f1_of_0=f1_of_0,
        auc=auc,
        auc_low=auc_low,
        auc_high=auc_high,
    )


def accuracy_interval(correct: NDArray[np.bool_], group_of: NDArray[Any]) -> tuple[float, float]:
    """Return the ends of the Wilson interval of a share, for as many prompts as the groups are worth.

    The variance between groups, over that of independent prompts, is the design effect (Kish 1965); prompts of groups
    that err in opposite ways do not count more than once.
    """
    n, share = len(correct), float(np.mean(correct))
    sums = np.bincount(group_of, weights=correct - share)
    independent = share * (1 - share) / n
    effect = len(sums) / max(len(sums) - 1, 1) * float(sums @ sums) / n**2 / independent if independent else 1.0
    return wilson_interval(share, n / max(effect, 1.0))


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return the ends of the 95 % Wilson interval of a share of ``n`` independent prompts."""
    centre, half = share + _Z**2 / (2 * n), _Z * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (centre - half) / (1 + _Z**2 / n)), min(1.0, (centre + half) / (1 + _Z**2 / n))


def auc_interval(labels: ArrayLike, decision: ArrayLike, group_of: NDArray[Any]) -> tuple[float, float, float]:
    """Return the area under the ROC curve and the ends of its 95 % interval, on the scale of logits.

    The variance is that of DeLong et al. (1988), and of Obuchowski (1997) with groups. An area of 0 or 1 has none: its
    interval is Wilson's, for as many prompts as the rarer label has.
    """
    y, values = np.asarray(labels) == 1, np.asarray(decision, dtype=np.float64)
    n_one, n_zero = int(y.sum()), int((~y).sum())
    ranks = rankdata(values)
    placed = np.empty(len(y))  # of each prompt, the share of the other label that it is placed right against
    placed[y] = (ranks[y] - rankdata(values[y])) / n_zero
    placed[~y] = 1 - (ranks[~y] - rankdata(values[~y])) / n_one
    auc = float(placed[y].mean())
    if auc in (0.0, 1.0):
        return auc, *wilson_interval(auc, min(n_one, n_zero))
    sums = np.bincount(group_of, weights=(placed - auc) / np.where(y, n_one, n_zero))
    error = (len(sums) / max(len(sums) - 1, 1) * float(sums @ sums)) ** 0.5
    logit, half = np.log(auc / (1 - auc)), _Z * error / (auc * (1 - auc))
    low, high = (float(1 / (1 + np.exp(-end))) for end in (logit - half, logit + half))
    return auc, low, high


def below_chance(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the p-value of so few correct predictions, if the predictions had nothing to do with the labels.

    The one-sided hypergeometric test (Fisher 1922), given how many prompts have each label and are predicted each.
    """
    y, z = np.asarray(labels) == 1, np.asarray(predicted) == 1
    return float(hypergeom.cdf(int((y & z).sum()), len(y), int(y.sum()), int(z.sum())))
