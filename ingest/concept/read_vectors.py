"""Lens readouts of the stored vectors of texts, without running the model on them (`kdb lens`).

Only the vectors of the residual stream after each block are read: the other site, the FFN's input, has been through a
norm of its own, and the unembedding does not read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdb.ingest.concept.zero_shot import first_tokens
from kdb.ingest.forward.readouts import log_probabilities, positions_at_once, read, readouts, texts_of
from kdb.warehouse.schema import arrow_schema
from kdb.warehouse.vectors import read_states

if TYPE_CHECKING:
    import torch

    from kdb.ingest.forward.lens_training import Translators
    from kdb.ingest.models.find import LoadedModel
    from kdb.ingest.models.structure import ModelStructure

SITE = "resid_post"
"""The site whose vectors are read."""


@dataclass(frozen=True)
class Text:
    """A text whose vectors are stored: its number, last position, and last token; −1 if that is not stored.

    ``right`` and ``wrong`` are the tokens that may begin the right and the wrong answer; empty if nothing is asked.
    """

    number: int
    last: int
    token: int
    right: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()


def stored_texts(
    prompts: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], tokenizer: Any
) -> list[Text]:
    """Build the texts of a run from its rows of ``prompts`` and ``zero_shot``; the latter are empty without answers."""
    words = (answers[0]["negative"], answers[0]["positive"]) if answers else None
    tokens = first_tokens(tokenizer, words) if words else ((), ())
    return [_text(row, tokens) for row in prompts]


def _text(row: Mapping[str, Any], tokens: tuple[tuple[int, ...], tuple[int, ...]]) -> Text:
    ids, label = row.get("token_ids"), row["label"]
    return Text(row["prompt_id"], row["n_tokens"] - 1, ids[-1] if ids else -1, tokens[label], tokens[1 - label])


def vector_rows(
    loaded: LoadedModel,
    structure: ModelStructure,
    parts: Sequence[Path],
    texts: Sequence[Text],
    translators: Translators | None = None,
) -> Iterator[pa.Table]:
    """Yield rows of ``lens_readouts`` for some texts, from the files of their vectors."""
    import torch

    states = torch.from_numpy(read_states(parts, [text.number for text in texts], SITE))
    size = positions_at_once(loaded)
    for start in range(0, len(texts), size):
        some = slice(start, start + size)
        yield _table(loaded, structure, states[some].to(loaded.device), texts[some], translators)


def _table(
    loaded: LoadedModel,
    structure: ModelStructure,
    states: torch.Tensor,
    texts: Sequence[Text],
    translators: Translators | None,
) -> pa.Table:
    """Rows of the states (text, layer, hidden)."""
    import torch

    text, lens, rows = texts_of(loaded.tokenizer), "logit" if translators is None else "tuned", list[dict[str, Any]]()
    named = [
        {"prompt_id": t.number, "position": t.last, "token": text(t.token) if t.token >= 0 else None} for t in texts
    ]
    with torch.inference_mode():
        final = log_probabilities(read(loaded, structure, states[:, -1]))
        target = [_likeliest(one, t.right) for one, t in zip(final, texts, strict=True)]
        rival = [_likeliest(one, t.wrong) for one, t in zip(final, texts, strict=True)]
        for layer in range(states.shape[1]):
            place = (layer, SITE)
            if translators is not None and place not in translators:
                continue
            resid = states[:, layer] if translators is None else translators[place](states[:, layer])
            found = readouts(read(loaded, structure, resid), final, target, rival, text)
            rows += [
                one | {"layer": layer, "place": SITE, "lens": lens} | row for one, row in zip(named, found, strict=True)
            ]
    return pa.Table.from_pylist(rows, arrow_schema("lens_readouts"))


def _likeliest(log_p: torch.Tensor, tokens: Sequence[int]) -> int:
    """The spelling of an answer that the model finds likeliest; −1 if there is none. ``log_p`` (vocab)."""
    return tokens[int(log_p[list(tokens)].argmax())] if tokens else -1
