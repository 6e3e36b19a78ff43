"""The plain text that a tuned lens is trained on: the one that comes with kdb, or a file.

corpus = read_corpus(None)
train, held_out = passages(load_tokenizer(source), corpus)
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdb.errors import DatasetError
from kdb.ingest.models.tokens import bare, read_texts

OWN = Path(__file__).parent / "datasets" / "data" / "prose.txt"
"""Prose that was written for kdb; it has no sentence of a built-in dataset."""

MOST_BYTES = 8 * 2**20
"""Bytes of a file that are read, from its beginning."""

LENGTH = 64
"""Tokens of a passage, beside those that the tokenizer puts before a text."""

EVERY = 8
"""One of so many passages is held out."""

RUN = 8
"""Tokens in a row that two texts share only if one was copied from the other, or both from a third."""

MOST_SEEN = 0.5
"""Largest share of a held-out passage's runs that may occur in passages to train on."""

FEWEST = 64
"""Passages that training needs, with those held out."""


@dataclass(frozen=True)
class Corpus:
    """A text, the name of its file, and the SHA-256 of the text."""

    name: str
    text: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_corpus(path: Path | None) -> Corpus:
    """Read a text file, or kdb's own corpus without one. Raises DatasetError for a file that is no UTF-8 text."""
    try:
        with (path or OWN).open("rb") as file:
            content = file.read(MOST_BYTES)
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=len(content) < MOST_BYTES)
    except OSError as error:
        raise DatasetError(f"Cannot read the corpus {str(path)!r} ({error.strerror}). Name a text file.") from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The corpus {str(path)!r} is not UTF-8 text (byte {error.start:,}). Convert it to UTF-8."
        ) from error
    if not text.strip():
        raise DatasetError(f"The corpus {str(path)!r} is empty. Name a file with some pages of text.")
    return Corpus("kdb" if path is None else path.name, text)


def passages(tokenizer: Any, corpus: Corpus) -> tuple[list[list[int]], list[list[int]]]:
    """Divide a corpus into passages of equal length, as token ids: those to train on, and those that are held out.

    A held-out passage that is for the most part a copy of text to train on is left out, since it says nothing of new
    text. Raises DatasetError if there are too few.
    """
    ids = bare(tokenizer, corpus.text)
    before = _before(tokenizer)
    found = [[*before, *ids[i : i + LENGTH]] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    if len(found) < FEWEST:
        raise DatasetError(
            f"The corpus {corpus.name!r} is too small for a tuned lens: it has {len(ids):,} tokens of this model, and "
            f"at least {FEWEST * LENGTH:,} are needed. Name a longer text with --corpus."
        )
    train, held_out = [p for i, p in enumerate(found) if i % EVERY], found[::EVERY]
    seen = {run for passage in train for run in _runs(passage)}
    new = [p for p in held_out if sum(run in seen for run in _runs(p)) <= MOST_SEEN * len(_runs(p))]
    if len(new) < FEWEST // EVERY:
        raise DatasetError(
            f"The corpus {corpus.name!r} repeats itself: only {len(new)} of {len(held_out)} held-out passages have few "
            f"words in common with those to train on, and {FEWEST // EVERY} are needed to judge a tuned lens. Name a "
            "text without repetitions with --corpus."
        )
    return train, new


def _runs(passage: Sequence[int]) -> list[tuple[int, ...]]:
    """The runs of RUN tokens in a passage."""
    return [tuple(passage[i : i + RUN]) for i in range(len(passage) - RUN + 1)]


def _before(tokenizer: Any) -> Sequence[int]:
    """The tokens that a tokenizer puts before each text."""
    text = "a"
    ids, own = read_texts(tokenizer, [text])[0], bare(tokenizer, text)
    return ids[: len(ids) - len(own)] if own and ids[-len(own) :] == own else []
