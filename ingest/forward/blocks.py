"""Find the parts of one block among the calls of its modules in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdb.errors import ModelError
from kdb.ingest.forward.additions import Added, Additions, find_added, find_order
from kdb.ingest.forward.attention import Attention
from kdb.ingest.forward.experts import is_experts
from kdb.ingest.forward.ffn import Ffn, find_ffn
from kdb.ingest.forward.linear import Call, Linear, Norm, is_linear, is_norm, read_norm, same
from kdb.ingest.models.parts import mixer_of

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Block:
    """The parts of one block. A part is None if the block has none.

    ``heads`` describes the attention, ``attn_out`` is the linear map that reads the heads. ``mixer`` is the module that
    writes what the block adds beside attention and FFN: a state-space model, linear attention, a convolution.
    ``ffn_norm`` is the norm before the FFN's first module, ``ffn_post`` the one behind the whole FFN. ``additions`` are
    the multipliers and the order of what is added. ``begins`` is the norm that the block first applies to the residual
    stream itself (RWKV's first block): what it writes is the block's input.
    """

    module: nn.Module
    begins: nn.Module | None
    heads: Attention | None
    attn_out: nn.Module | None
    mixer: nn.Module | None
    ffn: Ffn
    attn_norm: Norm | None
    ffn_norm: Norm | None
    attn_post: Norm | None
    ffn_post: Norm | None
    additions: Additions

    def has(self, component: str) -> bool:
        """Whether the block adds something of this component (attn, ffn, mixer) to the residual stream."""
        return component in self.additions.multipliers

    def before(self, component: str) -> tuple[str, ...]:
        """The components that the residual contains already when this one is added to it."""
        return self.additions.before.get(component, ())

    @property
    def parallel(self) -> bool:
        """Whether two components are added to one residual, rather than one after the other."""
        return sorted(len(self.before(c)) for c in self.additions.multipliers) != list(
            range(len(self.additions.multipliers))
        )

    @property
    def middle(self) -> tuple[str, ...]:
        """The components that are added before the FFN; if there are any, the block has a place ``resid_mid``."""
        return self.before("ffn") if self.has("ffn") else ()


def find_block(
    where: str,
    module: nn.Module,
    ffn: nn.Module | None,
    calls: Sequence[Call],
    attention: Attention | None,
    multiplier: float,
) -> Block:
    """Find the parts of a block among its calls, given in the order in which they ended.

    ``multiplier`` is the config's, for what is added to the residual stream. Raises ModelError, with ``where``, if a
    part is not found, and for a part of an unknown kind: it may be attention, whose heads would be missing.
    """
    return _Finder(where, module, ffn, calls, attention, multiplier).block()


class _Finder:
    """The calls of one block, and what is known of it."""

    def __init__(
        self,
        where: str,
        module: nn.Module,
        ffn: nn.Module | None,
        calls: Sequence[Call],
        attention: Attention | None,
        multiplier: float,
    ) -> None:
        self.where, self.module, self.attention, self.multiplier = where, module, attention, multiplier
        self.calls = calls
        self.by_module = {call.module: call for call in calls}
        self.whole, self.size = self.by_module[module], self.by_module[module].read.shape[-1]
        of_attention = set(attention.module.modules()) if attention is not None else set()
        self.outside = [c for c in calls if c.module not in of_attention and c.module is not module]
        self.ffn = self.by_module.get(ffn) if ffn is not None else None
        self.attn_out = self.by_module[attention.out] if attention is not None else None
        self.experts = any(is_experts(c.module) for c in self.outside)

    def _normed(self, **wanted: torch.Tensor) -> Call | None:
        norms = (call for call in self.calls if is_norm(call.module))
        return next((c for c in norms if all(same(getattr(c, k), v) for k, v in wanted.items())), None)

    def _norm(self, **wanted: torch.Tensor) -> Norm | None:
        found = self._normed(**wanted)
        return None if found is None else read_norm(found.module, self.size)

    def _source(self, read: torch.Tensor) -> torch.Tensor:
        """Input of a component, before the norm in front of it."""
        before = self._normed(written=read)
        return read if before is None else before.read

    def block(self) -> Block:
        """The parts of the block, whose stream may begin behind a norm."""
        if self.attn_out is not None and self.attn_out.written.shape != self.whole.written.shape:
            raise ModelError(f"{self.where} adds to several residual streams, or to a stream of another width.")
        found, is_exact = self._block(None)
        for norm in self._first_norms() if not is_exact else ():
            self.whole = replace(self.whole, read=norm.written)
            other, is_exact = self._block(norm.module)
            if is_exact:
                return self._known(other)
        return self._known(found) if is_exact else found  # of parts that do not add up, a check says so

    def _known(self, found: Block) -> Block:
        # A norm that is added after all parts gives what Gemma 4 adds for the token itself.
        if found.mixer is not None and not is_norm(found.mixer) and mixer_of(self.module) is None:
            raise ModelError(
                f"{self.where} adds the output of a {type(found.mixer).__name__}, which kdb does not know."
            )
        return found

    def _first_norms(self) -> list[Call]:
        return [c for c in self.outside if is_norm(c.module) and same(c.read, self.whole.read)]

    def _block(self, begins: nn.Module | None) -> tuple[Block, bool]:
        """The parts, and whether they add up."""
        written: dict[str, torch.Tensor] = {}
        sources: dict[str, torch.Tensor] = {}
        post = None
        if self.attention is not None and self.attn_out is not None:
            post = self._normed(read=self.attn_out.written)
            written["attn"] = (post or self.attn_out).written
            sources["attn"] = self._source(self.by_module[self.attention.module].read)
        added = self._added(written)
        if added.mixer is not None:
            written["mixer"], sources["mixer"] = added.mixer.written, self._source(added.mixer.read)
        parts, total = (Ffn((), None), None)
        if self.ffn is not None and added.ffn is not None:
            written["ffn"], sources["ffn"] = added.ffn.written, self._source(self.ffn.read)
            parts, total = self._ffn(added)
        present = {c: written[c] * a for c, a in added.multipliers.items()}
        order = find_order(self.whole.read, {c: sources[c] for c in present}, present)
        attention = self.attention if "attn" in present else None
        block = Block(
            module=self.module,
            begins=begins,
            heads=attention,
            attn_out=None if attention is None else attention.out,
            mixer=None if added.mixer is None else added.mixer.module,
            ffn=parts,
            attn_norm=None if attention is None else self._norm(written=self.by_module[attention.module].read),
            ffn_norm=None if total is None or self.ffn is None else self._norm(written=self.ffn.read),
            attn_post=None if post is None or attention is None else read_norm(post.module, self.size),
            ffn_post=None if total is None else self._norm(read=total),
            additions=Additions(added.multipliers, order),
        )
        return block, added.is_exact

    def _added(self, known: Mapping[str, torch.Tensor]) -> Added:
        """Contributions of the block. The residual that the norm before the FFN reads tells what is added before it."""
        whole = self.whole
        if self.ffn is None:
            return find_added(whole, known, (), self.outside, self.multiplier)
        middle = self._source(self.ffn.read)
        if middle.shape != whole.read.shape or same(middle, whole.read):
            return self._with_ffn(whole, known, self.outside)
        begun = next(i for i, c in enumerate(self.outside) if c is self.ffn or same(c.written, self.ffn.read))
        first = find_added(replace(whole, written=middle), known, (), self.outside[:begun], self.multiplier)
        late = self.outside[begun:] if first.mixer is None else ()
        second = self._with_ffn(replace(whole, read=middle), {}, late)
        is_exact = first.is_exact and second.is_exact
        both = {**first.multipliers, **second.multipliers}
        return Added(both, first.mixer or second.mixer, second.ffn, is_exact)

    def _with_ffn(self, sum_: Call, known: Mapping[str, torch.Tensor], others: Sequence[Call]) -> Added:
        """Contributions in a part of the block that has the FFN. With experts, it is all that attention leaves."""
        assert self.ffn is not None
        options = self._outputs()
        if self.experts or not options:
            rest = (sum_.written - sum_.read) / self.multiplier
            for own in known.values():
                rest = rest - own
            added = replace(self.ffn, written=rest)
            return Added(dict.fromkeys((*known, "ffn"), self.multiplier), None, added, is_exact=self.experts)
        return find_added(sum_, known, options, others, self.multiplier)

    def _outputs(self) -> list[Call]:
        """The calls that may write what the FFN adds: its last linear map, its module, or a norm behind one of them."""
        linear = [c for c in self._of_ffn(None) if is_linear(c.module)]
        ends = [*linear[-1:], *([self.ffn] if self.ffn is not None else [])]
        return [
            c
            for end in ends
            for c in (self._normed(read=end.written), end)
            if c and c.written.shape == self.whole.written.shape
        ]

    def _of_ffn(self, mixer: Call | None) -> list[Call]:
        """The calls of the FFN: within its module, or all that are left, if the module is only the first of several."""
        assert self.ffn is not None
        inside = set(self.ffn.module.modules())
        if not self.experts and sum(is_linear(m) for m in inside) > 1:
            return [c for c in self.outside if c.module in inside]
        of_mixer = set() if mixer is None else set(mixer.module.modules())
        return [c for c in self.outside if c.module not in of_mixer]

    def _ffn(self, added: Added) -> tuple[Ffn, torch.Tensor]:
        """The parts of the FFN, and its output before a norm behind it.

        An FFN whose neurons are not found is one contribution, without neurons.
        """
        assert self.ffn is not None and added.ffn is not None
        calls = self._of_ffn(added.mixer)
        try:
            parts, total = find_ffn(self.where, self.module, calls, self.ffn.read, self._before, added.ffn.written)
        except ModelError:
            if self.experts:
                raise
            return Ffn((), added.ffn.module), added.ffn.written
        post = self._normed(read=total)
        if (
            added.is_exact
            and not self.experts
            and not same((total if post is None else post.written), added.ffn.written)
        ):
            return Ffn((), added.ffn.module), added.ffn.written
        return parts, total

    def _before(self, read: torch.Tensor) -> tuple[Norm | Linear, ...]:
        """The maps between the residual and a state that a projection reads."""
        norm = self._norm(written=read)
        linear = (c for c in self.outside if is_linear(c.module))
        projection = next((c for c in linear if same(c.written, read)), None)
        if norm is not None or projection is None:
            return () if norm is None else (norm,)
        return (*self._before(projection.read), Linear(projection.module))
