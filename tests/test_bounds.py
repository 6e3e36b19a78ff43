"""Scores, bounds and intervals hold against float64 over the whole vocabulary, and a proved top k is the top k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdb.ingest.attribution import bounds
from kdb.ingest.attribution.bounds import Distributions, certified_top, distributions

pytestmark = pytest.mark.usefixtures("one_thread")
few_examples = settings(max_examples=25, deadline=None, derandomize=True)

N_RESIDUALS, N_VECTORS, N_PROMPTS = 6, 20, 3
PRECISE = 2e-5
"""By how much float32 probabilities, which a score takes as given, may be off on top of the slack."""


@dataclass
class Case:
    """Random vectors that join random residuals, under a random readout."""

    table: torch.Tensor
    constant: torch.Tensor
    residuals: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor
    prompt: torch.Tensor
    cap: torch.Tensor | None
    vectors: torch.Tensor
    base: torch.Tensor
    which: torch.Tensor
    coefficient: torch.Tensor

    @property
    def at(self) -> Distributions:
        return distributions(self.table, self.constant, self.residuals, self.scale, self.target, self.prompt, self.cap)

    @property
    def slack(self) -> torch.Tensor:
        """Slack of the upper bounds. A score has its own slack."""
        return self._length * self.at.reach[self.base].double()

    @property
    def upper(self) -> torch.Tensor:
        gain = (self.vectors[self.which] * self.at.slope[self.base]).sum(1)
        return (gain * self.coefficient).double()

    @property
    def _length(self) -> torch.Tensor:
        return (self.coefficient.abs() * self.vectors.norm(dim=1)[self.which]).double()

    def truth(self) -> torch.Tensor:
        """Every score by its definition, a difference of two log-probabilities, in float64."""
        x, v = self.residuals.double()[self.base], self.vectors.double()[self.which]
        scale, target = self.scale.double()[self.base, None], self.target[self.base, None]
        cap = 1 if self.cap is None else self.cap.double()[self.prompt][self.base]
        table = self.table.double()
        before = ((x * scale) @ table.T + self.constant.double()) * cap
        joined = before + v * self.coefficient.double()[:, None] * scale @ table.T * cap
        gain = joined.log_softmax(1).gather(1, target) - before.log_softmax(1).gather(1, target)
        return gain[:, 0]


def case(seed: int, vocab: int, hidden: int, size: float, capped: bool, dtype: torch.dtype) -> Case:
    """Vectors of this ``size``: their logits spread about as far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        # Weights and states of half precision are what a model of half precision gives, as float32.
        return torch.randn(*shape, generator=generator).to(dtype).float()

    def number(below: int, n: int) -> torch.Tensor:
        return torch.randint(below, (n,), generator=generator)

    n = N_RESIDUALS * N_VECTORS
    return Case(
        table=normal(vocab, hidden),
        constant=normal(vocab),
        residuals=normal(N_RESIDUALS, hidden) * 3,
        scale=hidden**-0.5 * (0.5 + torch.rand(N_RESIDUALS, generator=generator)),
        target=number(vocab, N_RESIDUALS),
        prompt=torch.arange(N_RESIDUALS) % N_PROMPTS,
        cap=torch.rand(N_PROMPTS, vocab, generator=generator) if capped else None,
        vectors=normal(N_VECTORS, hidden),
        base=torch.arange(N_RESIDUALS).repeat_interleave(N_VECTORS),
        which=number(N_VECTORS, n),
        coefficient=normal(n) * size,
    )


cases = st.builds(
    case,
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(50, 300),
    hidden=st.integers(8, 32),
    size=st.sampled_from([1e-4, 1e-2, 0.3, 1.0, 3.0]),
    capped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Vocabularies of hundreds are cut up as real ones of hundreds of thousands."""
    with mock.patch.multiple(bounds, _TILE=16, _BLOCK=7, _EXPLICIT=20):
        yield


# Scores and bounds -----------------------------------------------------------------------------------------------


@few_examples
@given(cases)
def test_distributions_are_the_softmax_of_the_readout(drawn: Case) -> None:
    at, cap = drawn.at, 1 if drawn.cap is None else drawn.cap.double()[drawn.prompt]
    linear = (drawn.residuals * drawn.scale[:, None]).double() @ drawn.table.double().T + drawn.constant.double()
    expected = (linear * cap).log_softmax(1)
    assert torch.allclose(at.p.double(), expected.exp(), atol=1e-6)
    assert torch.allclose(at.log_p.double(), expected.gather(1, drawn.target[:, None])[:, 0], atol=PRECISE)


@few_examples
@given(cases)
def test_a_score_is_the_log_probability_increase_within_its_slack(drawn: Case) -> None:
    with small_tiles():
        score, slack = drawn.at.scores_and_slack(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)
        assert ((score - drawn.truth()).abs() <= slack + PRECISE).all()
        assert slack.max() < 1e-3 * max(1, drawn.coefficient.abs().max())


@few_examples
@given(cases)
def test_no_score_is_above_its_bound(drawn: Case) -> None:
    with small_tiles():
        assert (drawn.truth() <= drawn.upper + drawn.slack + PRECISE).all()


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3])
def test_a_small_score_keeps_its_digits(size: float) -> None:
    """A difference of two logarithms would leave none of them."""
    drawn = case(0, 200, 16, size, capped=False, dtype=torch.float32)
    score = drawn.at.scores(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)
    assert ((score - drawn.truth()).abs() < 1e-4 * size).all()


@pytest.mark.parametrize("size", [1.0, 4.0, 16.0, 64.0])
@pytest.mark.parametrize("towards", [1, -1])
def test_a_large_score_is_as_precise_as_any(size: float, towards: int) -> None:
    """A whole layer may raise or lower a token's log-probability by tens of nats."""
    drawn = case(0, 200, 16, size, capped=False, dtype=torch.float32)
    drawn.vectors, drawn.which = drawn.table[drawn.target], drawn.base
    drawn.coefficient = towards * drawn.coefficient.abs()
    score, slack = drawn.at.scores_and_slack(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)
    assert ((score - drawn.truth()).abs() <= slack + PRECISE).all()
    assert (drawn.truth() <= drawn.upper + drawn.slack + PRECISE).all()


@pytest.mark.parametrize("length", [200.0, 2_000.0, 20_000.0, 100_000.0])
def test_a_token_with_a_long_row_that_a_vector_makes_likely_is_in_the_slack(length: float) -> None:
    """Its tiny probability before says nothing of its weight in the score, or in the score's rounding."""
    random = torch.Generator().manual_seed(3)
    vocab, hidden, n = 400, 64, 300
    table = torch.randn(vocab, hidden, generator=random)
    vectors = torch.randn(n, hidden, generator=random) / 10
    table[7] *= length / table[7].norm()
    towards = table[7] / length
    # Along the long row each vector has just what lifts its token from e⁻³⁰ to about the target's probability.
    vectors += (torch.linspace(28, 44, n) / length)[:, None] * towards - (vectors @ towards)[:, None] * towards
    constant = torch.zeros(vocab)
    constant[7] = -30
    at = distributions(table, constant, torch.zeros(1, hidden), torch.ones(1), torch.tensor([0]), torch.tensor([0]))
    score, slack = at.scores_and_slack(torch.zeros(n, dtype=torch.long), vectors, torch.arange(n), torch.ones(n))
    p = at.p[0].double()
    z = vectors.double() @ table.double().T
    truth = z[:, 0] - (p.log() + z).logsumexp(1) + p.sum().log()
    assert z[:, 7].max() > 42
    assert ((score - truth).abs() <= slack).all()
    lower, upper = at.intervals(torch.zeros(n, dtype=torch.long), vectors, torch.arange(n), torch.ones(n))
    assert ((lower <= truth) & (truth <= upper)).all()


def test_the_slack_of_a_bound_covers_rows_that_have_a_long_part_in_common() -> None:
    """The common part changes no score, but the rounding of float32 leaves a part of it in the bound."""
    random = torch.Generator().manual_seed(0)
    common = torch.randn(64, generator=random)
    table = 1e4 * common / common.norm() + torch.randn(400, 64, generator=random) / 1000
    vectors = torch.randn(200, 64, generator=random)
    at = distributions(table, torch.zeros(400), torch.zeros(1, 64), torch.ones(1), torch.tensor([0]), torch.tensor([0]))
    upper = (vectors @ at.slope[0]).double()
    p, z = at.p[0].double(), vectors.double() @ table.double().T
    truth = z[:, 0] - (p.log() + z).logsumexp(1) + p.sum().log()
    assert (truth > upper).any()
    assert (truth <= upper + vectors.norm(dim=1) * at.reach[0]).all()


@pytest.mark.parametrize("shift", [-10_000.0, -100.0, 0.0, 10_000.0])
def test_probabilities_add_up_to_one_wherever_the_logits_lie(shift: float) -> None:
    random = torch.Generator().manual_seed(0)
    table, residual = torch.randn(5_000, 32, generator=random), torch.randn(1, 32, generator=random)
    constant = torch.full((5_000,), shift)
    at = distributions(table, constant, residual, torch.ones(1), torch.tensor([3]), torch.tensor([0]))
    assert abs(at.p.double().sum().item() - 1) < 1e-6
    assert abs(at.log_p.item() - at.p[0, 3].log().item()) < 1e-5


@few_examples
@given(cases)
def test_nearly_exact_scores_are_off_by_no_more_than_they_say(drawn: Case) -> None:
    with small_tiles():
        score, error = drawn.at.nearly(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)
        off = (score - drawn.truth()).abs()
        assert (off <= error + PRECISE).all()
        exact, slack = drawn.at.scores_and_slack(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)
        assert ((score - exact).abs() <= bounds._NARROW / 2 + slack + drawn.slack).all()


def test_vectors_that_change_little_are_scored_without_a_pass_over_the_tokens() -> None:
    drawn = case(0, 300, 16, 1e-4, False, torch.float32)
    with mock.patch.object(Distributions, "scores_and_slack", side_effect=AssertionError):
        drawn.at.nearly(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)


@few_examples
@given(cases)
def test_intervals_hold_the_score(drawn: Case) -> None:
    with small_tiles():
        lower, upper = drawn.at.intervals(drawn.base, drawn.vectors, drawn.which, drawn.coefficient)
        truth = drawn.truth()
        assert (lower - PRECISE <= truth).all() and (truth <= upper + PRECISE).all()


# The proved top k ------------------------------------------------------------------------------------------------


@st.composite
def candidates(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """True scores, some of them equal, bounds above them and the rounding of both; −inf where there is no candidate."""
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    true = torch.randint(draw(st.integers(1, 100)), (rows, n), generator=generator).double()
    slack = torch.rand(rows, n, generator=generator).double() * draw(st.sampled_from([0, 1e-6, 2.0]))
    gap = torch.rand(rows, n, generator=generator).double() * draw(st.sampled_from([0, 1e-3, 5, 1000]))
    true[torch.rand(rows, n, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))] = -torch.inf
    return true, slack, gap, draw(st.integers(1, 80))


def exactly(true: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Scores without rounding errors."""
    return lambda rows, columns: (true[rows, columns], torch.zeros_like(true[rows, columns]))


def noise(slack: torch.Tensor) -> torch.Tensor:
    """Rounding of either sign, as large as it may be."""
    return slack * (2 * torch.randint(2, slack.shape, generator=torch.Generator().manual_seed(1)) - 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(candidates(), st.sampled_from([(), (0.5,), (0.9, 0.1)]), st.integers(1, 64))
@example((torch.zeros(1, 1).double(), torch.zeros(1, 1).double(), torch.zeros(1, 1).double(), 5), (), 64)
def test_the_top_k_is_complete_whatever_the_bounds_and_their_rounding(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], closeness: tuple[float, ...], step: int
) -> None:
    true, slack, gap, k = drawn
    measured = true + noise(slack)
    asked: list[tuple[int, int]] = []

    def score(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(zip(rows.tolist(), columns.tolist(), strict=True))
        return measured[rows, columns], slack[rows, columns]

    off = noise(slack).roll(1, 0).clamp(-slack, slack)
    tighter = [lambda rows, columns, c=c: (true + c * gap + off)[rows, columns] for c in closeness]
    best = certified_top(true + gap - off, slack, k, score, tighter, step)
    assert len(set(asked)) == len(asked)  # nothing is scored twice
    assert (best.most >= true - 1e-9).all()  # also of what was not scored
    assert best.index.shape == (len(true), min(k, true.shape[1]))
    for row, (index, found) in enumerate(zip(best.index, best.score, strict=True)):
        real = (true[row] > -torch.inf).nonzero()[:, 0]
        taken = index[index >= 0]
        assert len(set(taken.tolist())) == len(taken) == min(k, len(real))
        assert best.n_scored[row] == sum(r == row for r, _ in asked)
        assert torch.equal(found[: len(taken)], measured[row, taken])
        assert (found[: len(taken)].diff() <= 0).all()
        left = torch.tensor([i for i in real.tolist() if i not in set(taken.tolist())], dtype=torch.long)
        if len(left):
            # Better than the worst taken beyond what rounding explains: none that was left out.
            assert ((true[row, left] - slack[row, left]) <= (true[row, taken] + slack[row, taken]).min()).all()


@pytest.mark.parametrize("tightened", [False, True])
@pytest.mark.parametrize("step", [1, 3])
def test_no_candidate_left_unscored_is_truly_above_the_kth_best(step: int, tightened: bool) -> None:
    """Errors are as large as the slack allows: scores are too low or too high by it, upper bounds too low by it."""
    random = torch.Generator().manual_seed(0)
    n_rows, n, k = 3000, 12, 3
    true = torch.randint(0, 12, (n_rows, n), generator=random).double() / 4
    slack = torch.rand(n_rows, n, generator=random).double()
    off = (2 * torch.rand(n_rows, n, generator=random).double() - 1).sign() * slack
    gap = torch.rand(n_rows, n, generator=random).double() * (2 if tightened else 0.2)
    scored = torch.zeros(n_rows, n, dtype=torch.bool)

    def score(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scored[rows, columns] = True
        return true[rows, columns] + off[rows, columns], slack[rows, columns]

    def closer(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return true[rows, columns] - slack[rows, columns]

    best = certified_top(true + gap - slack, slack, k, score, [closer] if tightened else [], step)
    assert (best.most >= true - 1e-9).all()
    kth = true.topk(k, dim=1).values[:, -1:]
    assert not (~scored & (true > kth)).any()
    assert not scored.all()


def test_without_rounding_the_top_k_is_exactly_the_sorted_top_k() -> None:
    true = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 10, 400, 1000):
        gap = torch.rand(5, 400, generator=torch.Generator().manual_seed(1)).double()
        best = certified_top(true + gap, torch.zeros_like(true), k, exactly(true))
        assert torch.equal(best.index, true.argsort(dim=1, descending=True)[:, :k])


def test_equal_scores_at_the_edge_fill_the_top_k() -> None:
    true = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).double()
    best = certified_top(true, torch.zeros_like(true), 2, exactly(true))
    assert best.score.tolist() == [[2, 2]]


def test_tight_bounds_spare_nearly_all_scores() -> None:
    true = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0)).double()
    best = certified_top(true + 1e-4, torch.full_like(true, 1e-6), 10, exactly(true))
    assert best.n_scored.max() < 100


def test_tighter_bounds_spare_scores() -> None:
    true = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0)).double()
    arguments = true + 1.0, torch.full_like(true, 1e-6), 10, exactly(true)
    loose = certified_top(*arguments)
    tight = certified_top(*arguments, [lambda rows, columns: true[rows, columns] + 1e-4])
    assert torch.equal(tight.index, loose.index)
    assert tight.n_scored.max() < loose.n_scored.min() / 3
