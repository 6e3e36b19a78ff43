"""Baselines: how well a label can be predicted without the model, from the words of a text or its number of tokens.

    for baseline in fit_baselines(texts, n_tokens, task): ...

A probe that does no better than the words may have found the words. The mathematical core: it takes texts and arrays,
and returns frozen scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from kdb.ingest.concept.logistic import GRID
from kdb.ingest.concept.metrics import below_chance, score_predictions
from kdb.ingest.concept.splits import Split, Task

BASELINES = ("majority", "words", "token-count")

# Scripts without spaces between words: each character is a token. Elsewhere words, numbers, and single marks.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff]|\w+|[^\w\s]")


_RIDGE: dict[str, Any] = {"l1_ratios": (0,), "use_legacy_attributes": False}
"""An L2 penalty, and the attributes of scikit-learn's next version."""


@dataclass(frozen=True)
class Baseline:
    """Scores of one baseline on one split, and the labels (n_test,) that it predicts for the split's test rows.

    ``below_chance_p`` is the p-value of so few correct predictions if they had nothing to do with the labels.
    """

    baseline: str
    split: str
    n_train: int
    n_test: int
    n_groups: int | None
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    auc: float
    auc_low: float
    auc_high: float
    below_chance_p: float
    predicted: NDArray[np.int16]


def tokens_of(text: str) -> list[str]:
    """Return the tokens of a text in lower case: words, and characters of scripts that put no spaces between words."""
    return _TOKEN.findall(text.lower())


def fit_baselines(texts: Sequence[str], n_tokens: Sequence[int], task: Task) -> list[Baseline]:
    """Fit every baseline on every split of the texts (n,), which have ``n_tokens`` (n,) in the model.

    ``words`` is a logistic regression on how often a text has each token, ``token-count`` one on their number; C is
    chosen as for the probe ``logistic``, from the same grid by the same folds.
    """
    words, counts = np.asarray(texts, dtype=object), np.log1p(np.asarray(n_tokens, dtype=np.float64))[:, None]
    return [
        baseline
        for split in task.splits
        for baseline in (
            _scored("majority", split, task, *_majority(split, task)),
            _scored("words", split, task, *_fitted(_words(), words, split, task)),
            _scored("token-count", split, task, *_fitted((StandardScaler(),), counts, split, task)),
        )
    ]


def _majority(split: Split, task: Task) -> tuple[NDArray[Any], NDArray[Any]]:
    predicted = np.full(len(split.test), int(task.labels[split.train].mean() > 0.5))
    return predicted, predicted.astype(np.float64)


def _words() -> tuple[Any, ...]:
    return CountVectorizer(tokenizer=tokens_of, token_pattern=None, lowercase=False), MaxAbsScaler()


def _fitted(features: tuple[Any, ...], X: NDArray[Any], split: Split, task: Task) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return predicted labels and decision values of a logistic regression on features of the rows."""
    folds = task.folds[split.name]
    held_out = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
    model: Pipeline = make_pipeline(
        *features,
        LogisticRegressionCV(Cs=GRID, cv=held_out, scoring=_mean_log_likelihood, max_iter=1000, **_RIDGE),
    )
    model.fit(X[split.train], task.labels[split.train])
    return model.predict(X[split.test]), model.decision_function(X[split.test])


def _mean_log_likelihood(model: LogisticRegression, X: Any, y: NDArray[Any]) -> float:
    """Return the mean log-probability of labels (n,), 0 and 1. scikit-learn's own scorer clips it, and is slower."""
    z = model.decision_function(X)
    return float(-np.logaddexp(0, np.where(y == 1, -z, z)).mean())


def _scored(name: str, split: Split, task: Task, predicted: NDArray[Any], decision: NDArray[Any]) -> Baseline:
    truth = task.labels[split.test]
    groups = None if task.groups is None else task.groups[split.test]
    score = score_predictions(truth, predicted, decision, groups)
    return Baseline(
        baseline=name,
        split=split.name,
        n_train=len(split.train),
        n_test=len(split.test),
        n_groups=None if groups is None else len(np.unique(groups)),
        accuracy=score.accuracy,
        accuracy_low=score.accuracy_low,
        accuracy_high=score.accuracy_high,
        balanced_accuracy=score.balanced_accuracy,
        auc=score.auc,
        auc_low=score.auc_low,
        auc_high=score.auc_high,
        below_chance_p=below_chance(truth, predicted),
        predicted=predicted.astype(np.int16),
    )
