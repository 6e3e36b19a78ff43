"""Count texts that a dataset has more than once, and test texts that are also in the training part.

repeats = count_repeats([example.text for example in dataset.examples], splits)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdb.ingest.concept.splits import Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repeats:
    """Numbers of prompts, of ``n_prompts``.

    ``repeated`` prompts have the text of a prompt before them. By split, ``both_sides`` test prompts have a text that
    the training part has, too.
    """

    n_prompts: int
    repeated: int
    both_sides: Mapping[str, int]

    def warn(self, dataset: str) -> None:
        """Warn of repeated texts, which a probe may know by heart."""
        if not self.repeated:
            return
        splits = ", ".join(f"{count} of the split {split}" for split, count in self.both_sides.items())
        log.warning(
            "%d of %d prompts of %s repeat a text that stands before. Test prompts whose text is also in the training "
            "part: %s. Remove repeated texts, or give equal texts one group (--group-by).",
            *(self.repeated, self.n_prompts, dataset, splits),
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``checks``: counts, which have no tolerance, so no run fails by them."""
        note = f"; a count, of {self.n_prompts} prompts, that fails no run"
        counts = {"repeated_texts": (self.repeated, "prompts with the text of a prompt before them")} | {
            f"texts_on_both_sides_{split}": (count, f"test prompts of the split {split} whose text is also trained on")
            for split, count in self.both_sides.items()
        }
        return [{"check": name, "value": float(n), "detail": detail + note} for name, (n, detail) in counts.items()]


def count_repeats(texts: Sequence[str], splits: Sequence[Split]) -> Repeats:
    """Count the texts that stand more than once; white space at both ends does not tell texts apart."""
    bare = [text.strip() for text in texts]
    both_sides = {}
    for split in splits:
        trained = {bare[row] for row in split.train}
        both_sides[split.name] = sum(bare[row] in trained for row in split.test)
    return Repeats(len(bare), sum(count - 1 for count in Counter(bare).values()), both_sides)
