"""Read the nine datasets of the concept-depth paper (arXiv 2404.07066) from their original files.

The paper uses the first rows of each class in file order. Each dataset is declared once, below.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kdb.ingest.datasets import fetch
from kdb.ingest.datasets.base import Dataset, DatasetInfo, Example, first_of_each_class
from kdb.ingest.datasets.layout import YES_NO, Layout, text_of, to_examples
from kdb.ingest.datasets.rows import (
    Reader,
    Row,
    complaint,
    excerpt,
    read_csv,
    read_json_examples,
    read_jsonl,
    read_label_first,
    read_tsv,
)


def read_strategyqa(path: Path, needed: Collection[str]) -> Iterator[Row]:
    """Read questions with their facts as columns `text` and `label`.

    A `target` is "Yes." or "No." and then the facts; the answer is removed, since it is the label of the text.
    """
    derived = {"text", "label"}
    for row in read_json_examples(path, {"input", "target"} | set(needed) - derived):
        target = text_of(row, "target")
        answer = re.match(r"(Yes|No)\.", target)
        if answer is None:
            raise complaint(row.location, "a target that begins Yes. or No.", excerpt(target))
        text = f"{text_of(row, 'input')} {target[answer.end() :].strip()}"
        yield Row(row.location, {**row.fields, "text": text, "label": answer[1]})


@dataclass(frozen=True)
class PaperDataset:
    """Declaration of one of the paper's datasets.

    `counts` are the paper's numbers of examples, and `classes` our names, of label 0 and label 1, in this order;
    `answers` are the words that the template asks for. `first_label` is the label of the first of the two lists that
    the published code makes of the file.
    `url_path` is the file in its public repository, or None if no repository has it as one file.
    """

    name: str
    file: str
    origin: str
    url_path: str | None
    sha256: str
    counts: tuple[int, int]
    classes: tuple[str, str]
    read: Reader
    layout: Layout
    template: str
    answers: tuple[str, str]
    first_label: int = 1

    @property
    def size(self) -> str:
        """The paper's counts as text, such as "748 true + 748 false"."""
        (n_negative, n_positive), (negative, positive) = self.counts, self.classes
        return f"{n_positive:,} {positive} + {n_negative:,} {negative}"

    @property
    def published(self) -> tuple[fetch.File, ...]:
        """The file, as it is published."""
        return (fetch.File(self.file, self.url_path, self.sha256, self.origin),)

    @property
    def source(self) -> str:
        """The file and its origin."""
        return f"{self.file}, from {self.origin}"


_ALL = (
    PaperDataset(
        name="cities",
        file="cities.csv",
        origin="Luckfort/CD (Marks and Tegmark 2023)",
        url_path="Luckfort/CD/HEAD/dataset/cities.csv",
        sha256="f2560a0c1758c69935b50125111b574b71896bb75930dd87b1d8c973c1fa086e",
        counts=(748, 748),
        classes=("false", "true"),
        read=read_csv,
        layout=Layout(text="statement", group="city", subject="city"),
        template="Say whether this statement is true or false. {text}",
        answers=("false", "true"),
    ),
    PaperDataset(
        name="common_claim",
        file="common_claim.csv",
        origin="Luckfort/CD (Casper et al. 2023)",
        url_path="Luckfort/CD/HEAD/dataset/common_claim.csv",
        sha256="acc78556774ed0b5c3501bb4c254adebc692bab52cb5c6f39d91aad09cdf554f",
        counts=(3000, 3000),
        classes=("false", "true"),
        read=read_csv,
        layout=Layout(text="examples", labels={"true": 1, "false": 0, "neither": None}),
        template="Say whether this claim is true or false. {text}",
        answers=("false", "true"),
    ),
    PaperDataset(
        name="counterfact",
        file="counterfact.csv",
        origin="Luckfort/CD (Meng et al. 2022)",
        url_path="Luckfort/CD/HEAD/dataset/counterfact.csv",
        sha256="5af51456d6dbd3a53d8e2ee6e4aadaca7eb02ff9136ad825866458e7283b5273",
        counts=(2000, 2000),
        classes=("false", "true"),
        read=read_csv,
        layout=Layout(text="statement", group="subject", relation="relation", subject="subject"),
        template="Fact check: say whether this is true or false. {text}",
        answers=("false", "true"),
    ),
    PaperDataset(
        name="hateeval",
        file="hateeval.tsv",
        origin="Luckfort/CD (SemEval-2019 task 5)",
        url_path="Luckfort/CD/HEAD/dataset/hateeval.tsv",
        sha256="fdd34bf56f0afa744ee7484774d259d83a756033cd8049ded81bd55d2fcb1272",
        counts=(3000, 3000),
        classes=("not hateful", "hateful"),
        read=read_tsv,
        layout=Layout(label="HS"),
        template="Tweet: {text}\nDoes this tweet spread hate, yes or no? Answer:",
        answers=("no", "yes"),
    ),
    PaperDataset(
        name="stsa",
        file="stsa.binary.train",
        origin="Luckfort/CD (Stanford Sentiment Treebank, Socher et al. 2013)",
        url_path="Luckfort/CD/HEAD/dataset/stsa.binary.train",
        sha256="71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
        counts=(3310, 3610),
        classes=("negative", "positive"),
        read=read_label_first,
        layout=Layout(),
        template="A critic wrote: {text}\nWas the critic positive or negative? Answer:",
        answers=("negative", "positive"),
        first_label=0,
    ),
    PaperDataset(
        name="imdb",
        file="imdb_test_2048.jsonl",
        origin="dax44/AMLM, data/aclImdb/test (Maas et al. 2011)",
        url_path=None,
        sha256="276499f0d6f8f542045bdc43dc5c0028b986324a6495a1deff8efc14ed421d96",
        counts=(1000, 1000),
        classes=("negative", "positive"),
        read=read_jsonl,
        layout=Layout(),
        template="Film review: {text}\nDid the reviewer like the film, yes or no? Answer:",
        answers=("no", "yes"),
        first_label=0,
    ),
    PaperDataset(
        name="sarcasm",
        file="sarcasm.json",
        origin="hansonchan001/tf, 1.json (Misra and Arora 2023)",
        url_path="hansonchan001/tf/HEAD/1.json",
        sha256="9ca6098a3f55512619b3b4c1ac206b3b9a273a9268ba7c1a87b92f06529dcf9f",
        counts=(3000, 3000),
        classes=("not sarcastic", "sarcastic"),
        read=read_jsonl,
        layout=Layout(text="headline", label="is_sarcastic"),
        template="Headline: {text}\nIs the headline sarcastic, yes or no? Answer:",
        answers=("no", "yes"),
    ),
    PaperDataset(
        name="strategyqa",
        file="StrategyQA_task.json",
        origin="Luckfort/CD (BIG-bench; Geva et al. 2021)",
        url_path="Luckfort/CD/HEAD/dataset/StrategyQA_task.json",
        sha256="60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
        counts=(1219, 1071),
        classes=("no", "yes"),
        read=read_strategyqa,
        layout=Layout(labels=YES_NO),
        template="Answer yes or no. Question and facts: {text}",
        answers=("no", "yes"),
    ),
    PaperDataset(
        name="coinflip",
        file="coin_flip.json",
        origin="Luckfort/CD (after Wei et al. 2022)",
        url_path="Luckfort/CD/HEAD/dataset/coin_flip.json",
        sha256="68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a",
        counts=(247, 253),
        classes=("no", "yes"),
        read=read_json_examples,
        layout=Layout(text="question", label="answer", labels=YES_NO),
        template="Answer this puzzle with yes or no. {text}",
        answers=("no", "yes"),
    ),
)

PAPER_DATASETS = {dataset.name: dataset for dataset in _ALL}


def load_paper(paper: PaperDataset, data_dir: Path | None, group_by: str | None, download: bool) -> Dataset:
    """Read the paper's subset of a dataset; raise DatasetError if its file is missing or damaged."""
    (file,) = paper.published
    path = fetch.locate(paper.name, file, data_dir, may_download=download)
    layout = replace(paper.layout, group=group_by or paper.layout.group)
    rows = paper.read(path, layout.needed)
    examples = first_of_each_class(to_examples(rows, layout), *paper.counts)
    _check_counts(paper, examples)
    return Dataset(
        *(paper.name, paper.source, paper.template, examples), answers=paper.answers, first_label=paper.first_label
    )


def paper_info(paper: PaperDataset, data_dir: Path | None) -> DatasetInfo:
    """Describe a dataset, and whether its file is available."""
    path = fetch.find_file(paper.file, data_dir)
    missing = "downloadable" if paper.url_path else "needs a file"
    status, where = (missing, "") if path is None else ("available", str(path.parent))
    return DatasetInfo(paper.name, paper.size, paper.source, paper.template, status, where)


def _check_counts(paper: PaperDataset, examples: tuple[Example, ...]) -> None:
    """Raise DatasetError unless the subset is complete."""
    # Reading a file that was truncated at the end of a line raises no error; only the counts show it.
    n_positive = sum(example.label == 1 for example in examples)
    counts = (len(examples) - n_positive, n_positive)
    if counts != paper.counts:
        raise complaint(paper.file, paper.size, replace(paper, counts=counts).size)
