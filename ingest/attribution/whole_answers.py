"""Compare whole answers of several tokens: the model reads each answer after its prompt (teacher forcing).

logp, ahead = whole_answers(functools.partial(run_trials, decomposition), targets, effects, among=[0, 2])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdb.ingest.attribution.targets import Ids, Target

if TYPE_CHECKING:
    from kdb.ingest.forward.ablation import Effects, Trial

    Run = Callable[[Sequence[Trial]], Effects]


def whole_answers(
    run: Run, targets: Sequence[Target], effects: Effects, among: Iterable[int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the log-probability (m) of each whole answer, and whether it is above that of every other answer, (m).

    ``effects`` are those of the first tokens. Only the prompts ``among`` are compared; others are not ahead. A whole
    answer is at most as probable as its first token, so other answers are read in falling order of that, until the
    next first token is less probable than the whole answer.
    """
    logp = np.array(_totals(run, [(target.token_ids, target.answer) for target in targets]))
    ahead = np.zeros(len(targets), dtype=np.bool_)
    first = {i: targets[i].first for i in among}
    left = {i: set(targets[i].rivals) for i in first}
    best: Mapping[int, tuple[int, float]] = {i: (int(effects.rival[i]), effects.rival_logp[i]) for i in first}
    while first:
        left = {i: left[i] for i in left if i not in _beaten(run, targets, first, logp)}
        first = {i: rival for i, (rival, most) in best.items() if i in left and rival >= 0 and most >= logp[i]}
        ahead[[i for i in left if i not in first]] = True
        left = {i: left[i] - {token} for i, token in first.items()}
        best = _best(run, targets, left)
    return logp, ahead


def _beaten(run: Run, targets: Sequence[Target], first: Mapping[int, int], logp: NDArray[np.float64]) -> set[int]:
    """Prompts whose answer is not above every other answer that begins with their token in ``first``."""
    asked = [(i, ids) for i, token in first.items() for ids in targets[i].others if ids[0] == token]
    totals = _totals(run, [(targets[i].token_ids, ids) for i, ids in asked])
    return {i for (i, _ids), total in zip(asked, totals, strict=True) if total >= logp[i]}


def _best(run: Run, targets: Sequence[Target], left: Mapping[int, set[int]]) -> dict[int, tuple[int, float]]:
    """The most probable of the tokens that are left for each prompt, −1 for none, and its log-probability."""
    effects = run([_trial(targets[i].token_ids, targets[i].first, sorted(tokens)) for i, tokens in left.items()])
    return dict(zip(left, zip(effects.rival.tolist(), effects.rival_logp.tolist(), strict=True), strict=True))


def _totals(run: Run, answers: Sequence[tuple[Sequence[int], Ids]]) -> list[float]:
    """Log-probability of each answer after its prompt: the sum of its tokens', each read after those before it."""
    tokens = [_trial([*ids, *answer[:n]], answer[n]) for ids, answer in answers for n in range(len(answer))]
    logp = iter(run(tokens).logp.tolist())
    return [sum(next(logp) for _token in answer) for _ids, answer in answers]


def _trial(token_ids: Sequence[int], target: int, rivals: Sequence[int] = ()) -> Trial:
    from kdb.ingest.forward.ablation import Silenced, Trial

    return Trial(token_ids, target, Silenced(), everywhere=False, rivals=rivals)
