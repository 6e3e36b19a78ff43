"""Read nine published collections of facts from their original files, as prompts with one answer and a category.

Only the categories language, color, number, capital, country and month are read. A prompt to which the source gives
two answers is dropped, and so are repeats. Each dataset is declared once, below, with the names of its files in a data
folder; `data/published.csv` says where each is published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdb.ingest.datasets import fetch
from kdb.ingest.datasets.answers import with_one_answer
from kdb.ingest.datasets.base import Dataset, DatasetInfo, Example
from kdb.ingest.datasets.cloze import (
    RELATIONS,
    WIKIDATA,
    read_independence_days,
    read_known,
    read_memory_colors,
    read_numersense,
    read_pararel,
    read_relations,
    read_wikidata,
)
from kdb.ingest.datasets.questions import read_opentriviaqa, read_triviaqa
from kdb.ingest.datasets.rows import complaint
from kdb.ingest.datasets.world import frozen
from kdb.queries.domains import CATEGORIES

_QUESTION = "Question: {text}\nAnswer:"


@dataclass(frozen=True)
class Published:
    """Declaration of one published dataset.

    `counts` are the numbers of prompts by category.
    """

    name: str
    files: tuple[str, ...]
    origin: str
    counts: Mapping[str, int]
    read: Callable[[Sequence[Path]], Iterator[Example]]
    template: str = "{text}"

    @property
    def size(self) -> str:
        """The counts by category as text, such as "162 number + 162 month"."""
        return in_words(self.counts)

    @property
    def published(self) -> tuple[fetch.File, ...]:
        """The files, as they are published."""
        rows = {row["file"]: row for row in frozen("published.csv")}
        return tuple(fetch.File(**_named(rows[name]), origin=self.origin) for name in self.files)


def _named(row: Mapping[str, str]) -> dict[str, str]:
    return {"name": row["file"], "url_path": row["url_path"], "sha256": row["sha256"]}


def in_words(counts: Mapping[str, int]) -> str:
    """Build the counts of prompts by category, in the order of the six categories."""
    return " + ".join(f"{counts[category]:,} {category}" for category in CATEGORIES if counts.get(category))


_ALL = (
    Published(
        name="relations",
        files=tuple(f"relations/{relation}.json" for relation in RELATIONS),
        origin="evandez/relations (Hernandez et al. 2023)",
        counts={"language": 1906, "color": 66, "number": 37, "capital": 48, "country": 1778},
        read=read_relations,
    ),
    Published(
        name="pararel",
        files=tuple(f"pararel/{part}/{relation}.jsonl" for relation in WIKIDATA for part in ("trex", "patterns")),
        origin="yanaiela/pararel (Elazar et al. 2021)",
        counts={"language": 10474, "capital": 4688, "country": 24787},
        read=read_pararel,
    ),
    Published(
        name="known-1000",
        files=("known_1000.json",),
        origin="lab-paper-code/dual_path_attribution (Meng et al. 2022)",
        counts={"language": 191, "capital": 49, "country": 130},
        read=read_known,
    ),
    Published(
        name="bigbench-wikidata",
        files=("bigbench_qa_wikidata.jsonl",),
        origin="mosaicml/llm-foundry (BIG-bench, QA Wikidata)",
        counts={"language": 3904, "color": 740, "number": 155, "capital": 367, "country": 7294, "month": 10},
        read=read_wikidata,
    ),
    Published(
        name="memory-colors",
        files=("memory_colors.csv",),
        origin="allenai/understanding_mcqa (Norlund et al. 2021)",
        counts={"color": 108},
        read=read_memory_colors,
        template=_QUESTION,
    ),
    Published(
        name="independence-days",
        files=("independence_days.csv",),
        origin="cheredia19/independence-days",
        counts={"number": 161, "month": 162},
        read=read_independence_days,
    ),
    Published(
        name="numersense",
        files=("numersense/train.masked.tsv", "numersense/validation.masked.tsv"),
        origin="INK-USC/NumerSense (Lin et al. 2020)",
        counts={"number": 9669},
        read=read_numersense,
    ),
    Published(
        name="triviaqa",
        files=(
            "triviaqa/topics.dpr.trivia.dev.txt",
            "triviaqa/topics.dpr.trivia.test.txt",
            "triviaqa/triviaqa_sm_sub.jsonl",
        ),
        origin="castorini/anserini-tools and mosaicml/llm-foundry (Joshi et al. 2017)",
        counts={"language": 35, "color": 112, "number": 697, "capital": 94, "country": 1051, "month": 42},
        read=read_triviaqa,
        template=_QUESTION,
    ),
    Published(
        name="opentriviaqa",
        files=tuple(
            f"opentriviaqa/{topic}"
            for topic in ("animals", "for-kids", "general", "geography", "history", "people", "rated", "world")
        ),
        origin="uberspot/OpenTriviaQA (CC BY-SA 4.0)",
        counts={"language": 66, "color": 79, "number": 727, "capital": 126, "country": 663, "month": 38},
        read=read_opentriviaqa,
        template=_QUESTION,
    ),
)

PUBLISHED = {dataset.name: dataset for dataset in _ALL}


def load_published(published: Published, data_dir: Path | None, download: bool) -> Dataset:
    """Read a complete published dataset; raise DatasetError if one of its files is missing or damaged."""
    files = [fetch.locate(published.name, file, data_dir, may_download=download) for file in published.published]
    examples, dropped = with_one_answer(published.read(files))
    # Reading a file that was truncated at the end of a line raises no error; only the counts show it.
    counts = Counter(example.category or "" for example in examples)
    if counts != Counter(published.counts):
        raise complaint(_shown(published), published.size, in_words(counts) or "no prompts")
    source = f"{_source(published)}; prompts with more than one answer, left out: {dropped:,}"
    return Dataset(published.name, source, published.template, tuple(examples), study="knowledge")


def published_info(published: Published, data_dir: Path | None) -> DatasetInfo:
    """Describe a dataset, and whether all its files are available."""
    paths = [fetch.find_file(file, data_dir) for file in published.files]
    status, where = "downloadable", ""
    if paths[0] is not None and None not in paths:
        status, where = "available", str(paths[0].parents[published.files[0].count("/")])
    return DatasetInfo(
        *(published.name, published.size, _source(published), published.template, status, where), study="knowledge"
    )


def _source(published: Published) -> str:
    return f"{_shown(published)}, from {published.origin}"


def _shown(published: Published) -> str:
    """Return the name of a dataset's file, or of the folder with its files."""
    return published.files[0] if len(published.files) == 1 else f"{Path(published.files[0]).parts[0]}/"
