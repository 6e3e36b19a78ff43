"""Causal effects: what changes in the answer when one part of the model is replaced (table ``effects``).

    rows = effect_rows(decomposition, category, [0, 1], Patching(components=("head",)), parts)

A part is replaced by zero, by its mean over the category's other kept prompts, by its value in the next kept prompt of
the category, or by its value in a prompt with another answer (a pair): the dataset's corrupt prompt, if it has one. See
docs/effects.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.ingest.forward.gradients import gradients
from kdb.ingest.forward.layout import named_slot
from kdb.ingest.forward.patching import Part, Pass, Patch, entries, patched, recorded
from kdb.ingest.settings import Patching
from kdb.warehouse.schema import arrow_schema

if TYPE_CHECKING:
    import torch

    from kdb.ingest.forward.decomposition import Decomposition

Parts = Mapping[str, Sequence[Part]]
"""The parts to replace, by component."""


@dataclass(frozen=True)
class Known:
    """A kept prompt. ``subject_end`` is the position of its subject's last token; rival and subject may be absent.

    ``corrupt`` are the token ids of the prompt that the dataset gives as its pair, if it does.
    """

    number: int
    token_ids: tuple[int, ...]
    target: int
    category: str
    rival: int = -1
    relation: str | None = None
    subject_end: int | None = None
    corrupt: tuple[int, ...] | None = None

    def positions(self, role: str) -> tuple[int, ...] | None:
        """Return the token positions of a role (last, subject, all); None if the prompt has no subject to find."""
        if role == "all":
            return tuple(range(len(self.token_ids)))
        if role == "subject":
            return None if self.subject_end is None else (self.subject_end,)
        return (len(self.token_ids) - 1,)


def pairs(prompts: Sequence[Known]) -> dict[int, int]:
    """Return the pair of each prompt, by index.

    It is the next prompt, in the dataset's order and wrapping, that has the same relation and number of tokens, and
    another target. Prompts without a relation have none.
    """
    found = {}
    for i, one in enumerate(prompts):
        for j in [*range(i + 1, len(prompts)), *range(i)]:
            other = prompts[j]
            alike = one.relation is not None and other.relation == one.relation
            if alike and len(other.token_ids) == len(one.token_ids) and other.target != one.target:
                found[i] = j
                break
    return found


class Category:
    """The kept prompts of one category in one model, and what each part of the model writes in them."""

    def __init__(self, decomposition: Decomposition, prompts: Sequence[Known]) -> None:
        self.decomposition, self.prompts = decomposition, prompts
        self._values: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
        self._totals: dict[tuple[str, str], torch.Tensor] = {}
        self._corrupt: dict[tuple[str, str], dict[int, torch.Tensor]] = {}

    @cached_property
    def pairs(self) -> dict[int, int]:
        """The pair of each prompt among the others, by index."""
        return pairs(self.prompts)

    def pair(self, i: int) -> Known | None:
        """The prompt that prompt ``i`` is compared with: its corrupt prompt, or its pair among the others."""
        prompt = self.prompts[i]
        if prompt.corrupt is not None:
            return replace(prompt, token_ids=prompt.corrupt)
        return self.prompts[self.pairs[i]] if i in self.pairs else None

    def values(self, role: str, component: str) -> dict[int, torch.Tensor]:
        """Return the values (layer, position, width) that a component writes at a role's positions, by prompt index."""
        if (role, component) not in self._values:
            at = {i: p for i, prompt in enumerate(self.prompts) if (p := prompt.positions(role)) is not None}
            ids = [self.prompts[i].token_ids for i in at]
            every = recorded(self.decomposition, ids, list(at.values()), [component])
            self._values[role, component] = {i: one[component] for i, one in zip(at, every, strict=True)}
        return self._values[role, component]

    def replacement(self, i: int, role: str, component: str, by: str) -> torch.Tensor | None:
        """Return the values that replace a component's own in prompt ``i``; None if there are none."""
        import torch

        values = self.values(role, component)
        if i not in values:
            return None
        others = sorted(set(values) - {i})
        if by == "zero":
            return torch.zeros_like(values[i])
        if by == "pair" and self.prompts[i].corrupt:
            return self._of_corrupt(role, component)[i]
        if by == "pair":
            return values.get(self.pairs.get(i, -1))
        if not others:
            return None
        if by == "mean":
            return self._mean(role, component, i)
        return values[next((j for j in others if j > i), others[0])]

    def _of_corrupt(self, role: str, component: str) -> dict[int, torch.Tensor]:
        """The values that a component writes in the corrupt prompts, at the positions of the prompts' own roles."""
        if (role, component) not in self._corrupt:
            at = {i: p for i, prompt in enumerate(self.prompts) if (p := prompt.positions(role)) and prompt.corrupt}
            ids = [self.prompts[i].corrupt or () for i in at]
            every = recorded(self.decomposition, ids, list(at.values()), [component])
            self._corrupt[role, component] = {i: one[component] for i, one in zip(at, every, strict=True)}
        return self._corrupt[role, component]

    def _mean(self, role: str, component: str, i: int) -> torch.Tensor:
        import torch

        values = self.values(role, component)
        if (role, component) not in self._totals:
            self._totals[role, component] = torch.stack([v.double() for v in values.values()]).sum(0)
        return ((self._totals[role, component] - values[i].double()) / (len(values) - 1)).float()


@dataclass(frozen=True)
class _Case:
    """One prompt with one role and direction: the pass to change, and the prompt whose values take their place."""

    index: int
    role: str
    direction: str
    run: Pass

    @property
    def is_denoising(self) -> bool:
        return self.direction == "denoising"


def effect_rows(
    category: Category,
    indices: Sequence[int],
    wanted: Patching,
    parts: Parts,
) -> pa.Table:
    """Rows of ``effects`` for some prompts of a category, given by index.

    ``parts`` are the parts of each component of ``wanted``. A prompt has no row for a replacement that it lacks: a mean
    or a resample if it is the only one of its category, a pair, a subject.
    """
    cases = list(_cases(category, indices, wanted)) if wanted.components else []
    rows = [
        row
        for method in wanted.methods
        for row in (_exact if method == "exact" else _estimated)(category, cases, wanted, parts, method)
    ]
    return pa.Table.from_pylist(rows, arrow_schema("effects"))


def _cases(category: Category, indices: Sequence[int], wanted: Patching) -> Iterator[_Case]:
    for direction in wanted.directions:
        for role in wanted.roles:
            for i in indices:
                prompt = category.prompts[i]
                changed = category.pair(i) if direction == "denoising" else prompt
                at = None if changed is None else changed.positions(role)
                if changed is not None and at is not None:
                    yield _Case(i, role, direction, Pass(changed.token_ids, at, prompt.target, prompt.rival))


def _difference(category: Category, case: _Case, component: str, by: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The replacement's values, and its difference from what it replaces; None if there is none."""
    new = category.replacement(case.index, case.role, component, by)
    own = category.values(case.role, component).get(case.index)
    if new is None or own is None or (case.is_denoising and by != "pair"):
        return None
    return (own, own - new) if case.is_denoising else (new, new - own)


def _exact(
    category: Category, cases: Sequence[_Case], wanted: Patching, parts: Parts, method: str
) -> Iterator[dict[str, Any]]:
    patches, keys = [], []
    for of, case in enumerate(cases):
        for component in wanted.components:
            for by in wanted.replacements:
                values = _difference(category, case, component, by)
                if values is None:
                    continue
                for part in parts[component]:
                    here = values[0][part.layer][:, entries(category.decomposition, part)]
                    patches.append(Patch(of, part, here))
                    keys.append(_key(category, case, part, by, method))
    changes = patched(category.decomposition, [case.run for case in cases], patches)
    for key, logp, diff, kl in zip(keys, changes.logp, changes.logit_diff, changes.kl, strict=True):
        yield key | {"logp": logp, "logit_diff": _or_none(diff), "kl": kl}


def _estimated(
    category: Category, cases: Sequence[_Case], wanted: Patching, parts: Parts, method: str
) -> Iterator[dict[str, Any]]:
    slopes = gradients(category.decomposition, [case.run for case in cases], wanted.components, method)
    for case, slope in zip(cases, slopes, strict=True):
        for component in wanted.components:
            for by in wanted.replacements:
                values = _difference(category, case, component, by)
                if values is None:
                    continue
                product = (slope[component].double() * values[1].double()).sum(2)  # measure, layer, width
                for part in parts[component]:
                    logp, diff = product[:, part.layer, entries(category.decomposition, part)].sum(1).tolist()
                    yield _key(category, case, part, by, method) | {"logp": logp, "logit_diff": _or_none(diff)}


def _key(category: Category, case: _Case, part: Part, by: str, method: str) -> dict[str, Any]:
    return {
        "prompt_id": category.prompts[case.index].number,
        "component": part.component,
        "layer": part.layer,
        "head": None if part.head < 0 else part.head,
        **({} if part.neuron < 0 else named_slot(category.decomposition.ffn_layout(part.layer), part.neuron)),
        "role": case.role,
        "replacement": by,
        "method": method,
        "direction": case.direction,
    }


def _or_none(value: float) -> float | None:
    return None if value != value else value


def every_part(decomposition: Decomposition, component: str) -> list[Part]:
    """All parts of a component but FFN neurons, of which there are too many to replace each."""
    layers = range(len(decomposition.blocks))
    if component == "head":
        return [Part("head", layer, head) for layer in layers for head in range(decomposition.heads_in(layer))]
    return [Part(component, i) for i in layers if component == "resid" or decomposition.blocks[i].has(component)]
