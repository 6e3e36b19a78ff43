from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest
from click.testing import Result
from helpers.command_line import answer, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb.errors import DatasetError, UnknownNameError
from kdb.ingest.concept.metrics import wilson_interval
from kdb.ingest.concept.splits import make_splits
from kdb.ingest.datasets import Dataset, Example, available_datasets, fetch, load_dataset, prompts
from kdb.ingest.datasets.builtin import BUILT_IN
from kdb.ingest.datasets.paper import PAPER_DATASETS
from kdb.ingest.datasets.published import PUBLISHED

PAPER_DATA = Path(__file__).parents[2] / "shared" / "data" / "concept_depth"
needs_paper_data = pytest.mark.skipif(not PAPER_DATA.is_dir(), reason=f"no paper datasets in {PAPER_DATA}")

EITHER = "expected columns 'text' and 'label', or 'prompt', 'answer' and 'category'"
A_LABEL = "expected label 0, 1, true, false, yes, no, positive or negative"
TWO_CLASSES = "say which of the two classes is label 1, by --positive '1' or --positive 'x'"
ONE_CLASS = "correct it, or name the class of label 1 by --positive; the column has '2'"
REWRITE = "write it as text, or remove the row"
GOOD_CSV = "text,label,town\nIt rains.,1,Bonn\nIt snows.,0,Bonn\nIt hails.,yes,Kiel\nIt pours.,FALSE,Kiel\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no KDB_DATA_DIR and no network: what a test loads is what it put there."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(fetch, "cache_dir", lambda: folder)
    monkeypatch.setattr(fetch, "BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("KDB_DATA_DIR", raising=False)
    return folder


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def message(name: str, **options: object) -> str:
    with pytest.raises(DatasetError) as caught:
        load_dataset(name, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.fixture(scope="module")
def world() -> Dataset:
    return load_dataset("world-cities")


def cities_csv(n: int = 748) -> str:
    rows = [f"City {i} is in {c}.,{label},City {i},{c}" for i in range(n) for label, c in ((1, "A"), (0, "B"))]
    return "\n".join(["statement,label,city,country", *rows]) + "\n"


# --- the paper's datasets ---


@needs_paper_data
@pytest.mark.parametrize(
    ("name", "n", "n_positive"),
    [
        ("cities", 1496, 748),
        ("common_claim", 6000, 3000),
        ("counterfact", 4000, 2000),
        ("hateeval", 6000, 3000),
        ("stsa", 6920, 3610),
        ("imdb", 2000, 1000),
        ("sarcasm", 6000, 3000),
        ("strategyqa", 2290, 1071),
        ("coinflip", 500, 253),
    ],
)
def test_paper_dataset_has_the_papers_counts(name: str, n: int, n_positive: int) -> None:
    dataset = load_dataset(name, data_dir=PAPER_DATA)
    assert (dataset.name, len(dataset.examples), dataset.n_positive) == (name, n, n_positive)
    assert "{text}" in dataset.template
    assert str(PAPER_DATA) not in dataset.source and PAPER_DATASETS[name].file in dataset.source


@needs_paper_data
@pytest.mark.parametrize("name", PAPER_DATASETS)
def test_declared_checksum_is_that_of_the_file(name: str) -> None:
    paper = PAPER_DATASETS[name]
    assert hashlib.sha256((PAPER_DATA / paper.file).read_bytes()).hexdigest() == paper.sha256


@needs_paper_data
def test_cities_are_grouped_by_city_each_once_true_and_once_false() -> None:
    labels: dict[str | None, set[int]] = {}
    for example in load_dataset("cities", data_dir=PAPER_DATA).examples:
        labels.setdefault(example.group, set()).add(example.label)
    assert len(labels) == 748 and all(both == {0, 1} for both in labels.values())


@needs_paper_data
def test_counterfact_knows_relation_and_subject() -> None:
    first = load_dataset("counterfact", data_dir=PAPER_DATA, limit=1).examples[0]
    assert first.relation is not None and first.subject is not None and first.group == first.subject
    assert first.text.startswith(first.relation.replace("{}", first.subject))


@needs_paper_data
def test_common_claim_leaves_out_neither() -> None:
    table = pl.read_csv(PAPER_DATA / "common_claim.csv", schema_overrides={"label": pl.String})
    neither = set(table.filter(pl.col("label") == "Neither")["examples"])
    dataset = load_dataset("common_claim", data_dir=PAPER_DATA)
    assert neither and not neither & {example.text for example in dataset.examples}
    assert all(example.group is None for example in dataset.examples)


@needs_paper_data
def test_hateeval_keeps_quotes_as_they_are_in_the_file() -> None:
    table = pl.read_csv(PAPER_DATA / "hateeval.tsv", separator="\t", quote_char=None)
    examples = load_dataset("hateeval", data_dir=PAPER_DATA).examples
    for label in (0, 1):
        expected = table.filter(pl.col("HS") == label)["text"][:3000].to_list()
        assert [example.text for example in examples if example.label == label] == expected
    assert any(example.text.startswith('"') for example in examples)


@needs_paper_data
def test_stsa_is_read_in_the_files_order() -> None:
    lines = (PAPER_DATA / "stsa.binary.train").read_text(encoding="utf-8").rstrip("\n").split("\n")
    examples = load_dataset("stsa", data_dir=PAPER_DATA).examples
    assert [f"{example.label} {example.text}" for example in examples] == lines


@needs_paper_data
def test_imdb_keeps_texts_with_control_characters_whole() -> None:
    lines = (PAPER_DATA / "imdb_test_2048.jsonl").read_text(encoding="utf-8").split("\n")[:1000]
    texts = [example.text for example in load_dataset("imdb", data_dir=PAPER_DATA).examples if not example.label]
    assert texts == [json.loads(line)["text"] for line in lines]
    assert any("\x85" in text for text in texts)


@needs_paper_data
def test_strategyqa_text_does_not_hold_its_answer() -> None:
    raw = json.loads((PAPER_DATA / "StrategyQA_task.json").read_text(encoding="utf-8"))["examples"]
    examples = load_dataset("strategyqa", data_dir=PAPER_DATA).examples
    for entry, example in zip(raw, examples, strict=True):
        facts = entry["target"].removeprefix("Yes." if example.label else "No.").strip()
        assert example.text == f"{entry['input']} {facts}"
        assert entry["target_scores"] == {"Yes": example.label, "No": 1 - example.label}


@needs_paper_data
def test_limit_keeps_the_first_of_each_class_in_file_order() -> None:
    whole = load_dataset("coinflip", data_dir=PAPER_DATA)
    dataset = load_dataset("coinflip", data_dir=PAPER_DATA, limit=20)
    for label in (0, 1):
        expected = [example for example in whole.examples if example.label == label][:20]
        assert [example for example in dataset.examples if example.label == label] == expected
    assert [example for example in whole.examples if example in dataset.examples] == list(dataset.examples)


@needs_paper_data
def test_group_by_takes_any_column_of_a_paper_file() -> None:
    dataset = load_dataset("cities", data_dir=PAPER_DATA, group_by="correct_country")
    assert (dataset.examples[0].group, dataset.examples[1].group) == ("Russia", "Russia")


# --- the built-in ones ---


def said_country(example: Example) -> str:
    return example.text.removeprefix(f"{example.subject} is a city in ").removesuffix(".")


def test_world_cities_say_each_country_as_often_true_as_false_and_only_within_its_pair(world: Dataset) -> None:
    said: dict[tuple[str | None, str], Counter[int | None]] = {}
    for example in world.examples:
        assert said_country(example) in (example.group or "").split(" / ") and example.category == "country"
        said.setdefault((example.group, said_country(example)), Counter())[example.label] += 1
    assert len(said) == 100 and {frozenset(labels.items()) for labels in said.values()} == {frozenset({(0, 4), (1, 4)})}
    assert len({country for _pair, country in said}) == 100
    assert len({example.text for example in world.examples}) == len(world.examples) == 800


def test_world_cities_say_what_geonames_says(world: Dataset) -> None:
    texts = {example.text: example.label for example in world.examples}
    assert texts["Tokyo is a city in Japan."] == 1
    assert texts["Chicago is a city in the United States."] == 1
    assert not any(word in text for text in texts for word in ("Brooklyn", "Singapore", "Mexico City"))


@pytest.mark.parametrize("limit", [10, 100, None])
def test_world_cities_stay_balanced_with_a_limit(limit: int | None) -> None:
    said: dict[str, int] = {}
    for example in load_dataset("world-cities", limit=limit).examples:
        said[said_country(example)] = said.get(said_country(example), 0) + (1 if example.label else -1)
    assert not any(said.values())


def majority(labels: Sequence[int]) -> int:
    return int(2 * sum(labels) > len(labels))


def guesses(dataset: Dataset, train: Sequence[int], test: Sequence[int]) -> dict[str, list[int]]:
    """Labels of the test part as three readers without a model guess them from the training part."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    examples, labels = dataset.examples, [example.label or 0 for example in dataset.examples]
    most = majority([labels[i] for i in train])
    words = CountVectorizer()
    reader = LogisticRegression(max_iter=1000).fit(
        words.fit_transform(examples[i].text for i in train), [labels[i] for i in train]
    )
    seen: dict[str, list[int]] = {}
    for i in train:
        seen.setdefault(examples[i].text.split()[-1], []).append(labels[i])
    ends = [examples[i].text.split()[-1] for i in test]
    return {
        "majority": [most for _ in test],
        "words": reader.predict(words.transform(examples[i].text for i in test)).tolist(),
        "country, or last word": [majority(seen[end]) if end in seen else most for end in ends],
    }


@pytest.mark.parametrize("name", BUILT_IN)
def test_nothing_but_the_meaning_tells_the_labels_of_a_built_in_dataset(name: str) -> None:
    dataset = load_dataset(name)
    labels, groups = [e.label or 0 for e in dataset.examples], [e.group for e in dataset.examples if e.group]
    split = make_splits(labels, groups=groups or None)[-1]
    low, high = wilson_interval(0.5, len(split.test))
    for reader, guessed in guesses(dataset, split.train.tolist(), split.test.tolist()).items():
        right = sum(guess == labels[i] for guess, i in zip(guessed, split.test, strict=True)) / len(split.test)
        assert low <= right <= high, (reader, right)


def test_coin_puzzles_are_solved_rightly() -> None:
    examples = load_dataset("coinflip-synthetic").examples
    for example in examples:
        assert example.label == (example.text.count("turns it over") % 2 == 0)
    assert (len({example.text for example in examples}), sum(example.label for example in examples)) == (
        500,
        250,
    )
    assert all(example.group is None for example in examples)


def test_built_in_datasets_are_the_same_in_another_process(world: Dataset) -> None:
    names = ("world-cities", "coinflip-synthetic")
    code = f"from kdb.ingest.datasets import load_dataset as load; [print(load(n).fingerprint) for n in {names}]"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [world.fingerprint, load_dataset("coinflip-synthetic").fingerprint]


def test_built_in_dataset_can_be_grouped_by_another_of_its_columns() -> None:
    assert load_dataset("world-cities", group_by="city", limit=1).examples[0].group == "Jakarta"
    assert message("world-cities", group_by="town") == (
        "world-cities: expected one column 'town', found 'text', 'label', 'city', 'country', 'pair', 'category'"
    )


# --- a user's files ---


def user_file(folder: Path, ending: str) -> str:
    path = folder / f"weather.{ending}"
    records = [("It rains.", True), ("It snows.", False), ("It hails.", True)]
    if ending == "csv":
        return write(path, "label,text\n" + "".join(f'{label},"{text}"\n' for text, label in records))
    if ending == "jsonl":
        return write(path, "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in records))
    pl.DataFrame(records, schema=["text", "label"], orient="row").write_parquet(path)
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_user_file_is_read_in_every_format(tmp_path: Path, ending: str) -> None:
    dataset = load_dataset(user_file(tmp_path, ending))
    assert (dataset.name, dataset.template, dataset.n_positive) == ("weather", "{text}", 2)
    assert [(e.text, e.label) for e in dataset.examples] == [
        ("It rains.", 1),
        ("It snows.", 0),
        ("It hails.", 1),
    ]
    assert f"weather.{ending}" in dataset.source and str(tmp_path) not in dataset.source


def test_formats_of_the_same_content_share_a_fingerprint(tmp_path: Path) -> None:
    files = [user_file(tmp_path, ending) for ending in ("csv", "jsonl", "parquet")]
    assert len({load_dataset(file).fingerprint for file in files}) == 1


def test_user_file_takes_name_template_and_group(tmp_path: Path) -> None:
    file = write(tmp_path / "weather.csv", GOOD_CSV)
    dataset = load_dataset(file, dataset_name="sky", template="{text} True?", group_by="town")
    assert (dataset.name, prompts(dataset)[0]) == ("sky", "It rains. True?")
    assert [(e.label, e.group) for e in dataset.examples] == [
        (1, "Bonn"),
        (0, "Bonn"),
        (1, "Kiel"),
        (0, "Kiel"),
    ]


def test_csv_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    text = '\ufefftext,label\r\n"Two\r\nlines, ""quoted""",1\r\n\r\nOne,0\r\n'
    dataset = load_dataset(write(tmp_path / "a.csv", text))
    assert [example.text for example in dataset.examples] == ['Two\r\nlines, "quoted"', "One"]


def test_file_name_with_glob_characters_is_one_file(tmp_path: Path) -> None:
    source = Path(user_file(tmp_path, "parquet"))
    assert load_dataset(str(source.rename(tmp_path / "a[1]*.parquet"))).name == "a[1]*"


# --- bad input ---


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("a.csv", "text,label\nyes,1\nno,x\n", f"a.csv, line 3: {A_LABEL}, found 'x': {TWO_CLASSES}"),
        ("a.csv", 'text,label\n"a\nb",1\nno,\n', f"a.csv, line 4: {A_LABEL}, found '': write one, or remove the row"),
        (
            "a.csv",
            "text,label\nyes,1\n  ,0\n",
            f"a.csv, line 3: expected a text in column 'text', found '  ': {REWRITE}",
        ),
        (
            "a.csv",
            "text,label\nyes,1\nno\n",
            "a.csv, line 3: expected 2 cells, found 1: complete the row, or remove it",
        ),
        ("a.csv", "text,lable\nyes,1\n", f"a.csv, line 1: {EITHER}, found 'text', 'lable': rename the columns"),
        (
            "a.csv",
            "text,text,label\na,b,1\n",
            "a.csv, line 1: expected one column 'text', found 'text', 'text', 'label'",
        ),
        ("a.csv", "", f"a.csv, line 1: {EITHER}, found no columns: rename the columns"),
        (
            "a.csv",
            b"text,label\ncaf\xe9,1\n",
            "a.csv, line 2: expected UTF-8 text, found the byte 0xe9: save the file as UTF-8",
        ),
        (
            "a.csv",
            'text,label\nyes,1\n"no,0\n',
            "a.csv, line 3: expected a row of whole cells, found one that cannot be split (unexpected end of data): "
            "put a text with quotation marks in quotes, and double the marks",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"',
            'a.jsonl, line 2: expected a JSON object, found \'{"text": "b"\'',
        ),
        ("a.jsonl", "\n[1]\n", "a.jsonl, line 2: expected a JSON object, found '[1]'"),
        ("a.jsonl", '{"text": "a"}\n', f"a.jsonl, line 1: {EITHER}, found 'text': rename the columns"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}\n',
            "a.jsonl, line 2: expected one column 'label', found 'text'",
        ),
        (
            "a.jsonl",
            '{"text": 5, "label": 1}\n',
            f"a.jsonl, line 1: expected a text in column 'text', found 5: {REWRITE}",
        ),
        ("a.jsonl", '{"text": "a", "label": 2}\n', f"a.jsonl, line 1: {A_LABEL}, found 2: {ONE_CLASS}"),
        (
            "a.jsonl",
            '{"text": "\\ud800", "label": 1}\n',
            f"a.jsonl, line 1: expected whole characters in column 'text', found '\\ud800': {REWRITE}",
        ),
    ],
)
def test_broken_user_file_is_refused_with_its_line(
    tmp_path: Path, file: str, content: str | bytes, expected: str
) -> None:
    assert message(write(tmp_path / file, content)) == expected


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pl.DataFrame({"text": ["a", None], "label": [0, 1]}).write_parquet(file)
    assert message(str(file)) == f"a.parquet, row 2: expected a text in column 'text', found None: {REWRITE}"
    assert message(str(file), group_by="town") == "a.parquet: expected one column 'town', found 'text', 'label'"
    assert message(write(file, "not Parquet")).startswith(f"Cannot read '{file}' as Parquet: ")


def test_a_missing_file_is_named_with_its_folder_and_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "weather.csv", GOOD_CSV)
    there = "Check the name, or give its path."
    assert message(f"{tmp_path}/no.parquet") == f"There is no file 'no.parquet' in '{tmp_path}'. {there}"
    assert message(f"{tmp_path}/wether.csv") == (
        f"There is no file 'wether.csv' in '{tmp_path}'. Did you mean 'weather.csv'? {there}"
    )
    assert message(f"{tmp_path}/data/weather.csv") == (
        f"There is no file '{tmp_path}/data/weather.csv': no such folder '{tmp_path}/data'. Check the path."
    )
    (tmp_path / "folder.csv").mkdir()
    assert message(f"{tmp_path}/folder.csv") == (
        f"Cannot read '{tmp_path}/folder.csv': it is a folder. Name a file in it."
    )


def test_group_column_must_exist_and_be_filled(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,label,town\na,1,Bonn\nb,0,\n")
    assert message(file, group_by="city") == "a.csv, line 1: expected one column 'city', found 'text', 'label', 'town'"
    assert message(file, group_by="town") == f"a.csv, line 3: expected a value in column 'town', found none: {REWRITE}"


def test_dataset_without_one_class_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,label\na,1\nb,1\n")
    assert (
        message(file) == "Dataset 'a' (a.csv, a user's file) has no example with label 0; a probe needs both classes."
    )


@pytest.mark.parametrize("stem", ["cities", "World-Cities"])
def test_user_file_may_not_shadow_a_dataset_of_kdb(tmp_path: Path, stem: str) -> None:
    file = write(tmp_path / f"{stem}.csv", GOOD_CSV)
    assert message(file) == (
        f"{stem}.csv would be stored as {stem!r}, the name of one of kdb's own datasets: "
        "give another name with --dataset-name."
    )
    assert load_dataset(file, dataset_name="mine").name == "mine"


def test_blank_name_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", GOOD_CSV)
    assert (
        message(file, dataset_name=" ")
        == "a.csv would be stored under a blank name: give another name with --dataset-name."
    )


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_dataset("citys")
    assert "Unknown dataset 'citys'. Did you mean 'cities'" in str(caught.value)
    assert "`kdb datasets` lists them; a file of your own ends in .csv, .tsv, .json, .jsonl or .parquet" in str(
        caught.value
    )


def test_options_that_cannot_be_used_are_refused() -> None:
    assert message("coinflip-synthetic", limit=0) == (
        "limit counts the examples of each class or category: expected 1 or more, found 0."
    )
    assert message("coinflip-synthetic", template="no place") == (
        "The template 'no place' has no place for the text: add {text} to it."
    )
    assert message("coinflip-synthetic", dataset_name="mine") == (
        "Dataset 'coinflip-synthetic' cannot be renamed: --dataset-name is only for a file of your own."
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "cities",
            cities_csv().replace("A.,1,City 7,", "A.,x,City 7,"),
            "cities.csv, line 16: expected label 0 or 1, found 'x'",
        ),
        ("cities", cities_csv(700), "cities.csv: expected 748 true + 748 false, found 700 true + 700 false"),
        ("stsa", "1 good\nbad\n", "stsa.binary.train, line 2: expected label 0 or 1, found 'bad'"),
        ("hateeval", "id\ttext\tHS\n1\ta\n", "hateeval.tsv, line 2: expected 3 cells, found 2"),
        (
            "common_claim",
            ",examples,label\n0,a,Maybe\n",
            "common_claim.csv, line 2: expected label true, false or neither, found 'Maybe'",
        ),
        (
            "coinflip",
            '{"examples": [\n {"question": "a"',
            "coin_flip.json, line 2: expected valid JSON, found Expecting ',' delimiter",
        ),
        ("coinflip", '{"rows": []}', 'coin_flip.json: expected a list named "examples", found none'),
        (
            "coinflip",
            '{"examples": [\n {"question": "a", "answer": "yes"},\n\n {"question": "b"}]}',
            "coin_flip.json, line 4: expected one column 'answer', found 'question'",
        ),
        (
            "strategyqa",
            '{"examples": [\n{"input": "a", "target": "Perhaps."}]}',
            "StrategyQA_task.json, line 2: expected a target that begins Yes. or No., found 'Perhaps.'",
        ),
    ],
)
def test_half_broken_paper_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    write(tmp_path / PAPER_DATASETS[name].file, content)
    assert message(name, data_dir=tmp_path) == expected


# --- where files come from ---


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that stands in for GitHub."""
    root = tmp_path_factory.mktemp("github")
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setattr(fetch, "BASE_URL", f"http://127.0.0.1:{http.server_port}")
        yield root
        http.shutdown()


def serve_cities(server: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    paper = replace(PAPER_DATASETS["cities"], url_path="cities.csv", sha256=sha256)
    monkeypatch.setitem(PAPER_DATASETS, "cities", paper)
    write(server / "cities.csv", cities_csv())


def test_missing_file_is_downloaded_once_into_the_cache(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cities(server, monkeypatch, hashlib.sha256(cities_csv().encode()).hexdigest())
    first = load_dataset("cities")
    assert [file.name for file in cache.iterdir()] == ["cities.csv"]
    (server / "cities.csv").unlink()
    assert load_dataset("cities") == first and len(first.examples) == 1496


def test_wrong_checksum_leaves_nothing_behind(
    server: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_cities(server, monkeypatch, "0" * 64)
    assert message("cities", data_dir=tmp_path) == (
        f"Dataset 'cities' needs the file cities.csv, which is not in {tmp_path}, {cache}. "
        f"The file at {fetch.BASE_URL}/cities.csv has changed (its SHA-256 is not the expected one). "
        "Put the file into a folder, and give --data-dir that folder."
    )
    assert not list(cache.iterdir())


def test_failed_download_says_why_and_leaves_nothing_behind(server: Path, cache: Path) -> None:
    assert "/Luckfort/CD/HEAD/dataset/cities.csv: File not found. Put the file" in message("cities")
    assert not list(cache.iterdir())


def test_without_a_network_every_place_tried_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDB_DATA_DIR", "/nowhere")
    said = message("cities", data_dir=tmp_path)
    assert f"which is not in {tmp_path}, /nowhere, {cache}. Cannot download http://127.0.0.1:9/" in said
    assert "Connection refused. Put the file" in said


def test_cache_that_cannot_be_written_is_named(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_cities(server, monkeypatch, hashlib.sha256(cities_csv().encode()).hexdigest())
    write(tmp_path / "file", "")
    monkeypatch.setattr(fetch, "cache_dir", lambda: tmp_path / "file" / "datasets")
    assert f"Cannot write {tmp_path}/file/datasets/cities.csv: Not a directory." in message("cities")


def test_no_download_where_there_is_none_or_it_is_switched_off() -> None:
    published = "its texts are published in dax44/AMLM, data/aclImdb/test (Maas et al. 2011). Put the file"
    assert f"It cannot be downloaded as one file; {published}" in message("imdb")
    assert "Downloading is switched off. Put the file" in message("cities", download=False)


def test_data_dir_goes_before_the_environment_and_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {place: tmp_path / place for place in ("given", "environment")}
    for place, folder in {**folders, "cache": cache}.items():
        folder.mkdir(exist_ok=True)
        write(folder / "cities.csv", cities_csv().replace("City 0 ", f"{place} "))
    monkeypatch.setenv("KDB_DATA_DIR", str(folders["environment"]))
    assert load_dataset("cities", data_dir=folders["given"]).examples[0].text == "given is in A."
    (folders["given"] / "cities.csv").unlink()
    assert load_dataset("cities", data_dir=folders["given"]).examples[0].text == "environment is in A."
    monkeypatch.delenv("KDB_DATA_DIR")
    assert load_dataset("cities").examples[0].text == "cache is in A."


# --- fetching ---


def serve(server: Path, monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    """Publish files for the datasets with these names; their checksums are those of the contents."""
    for name, content in contents.items():
        write(server / f"{name}.txt", content)
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        paper = replace(PAPER_DATASETS[name], url_path=f"{name}.txt", sha256=sha256)
        monkeypatch.setitem(PAPER_DATASETS, name, paper)


def test_fetched_files_are_verified_and_not_downloaded_twice(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_kdb: Callable[..., Result]
) -> None:
    serve(server, monkeypatch, cities=cities_csv(), stsa="1 good")
    folder = tmp_path / "new" / "papers"
    fetch_both = ("datasets", "fetch", "cities", "stsa", "--data-dir", folder)
    assert answer(run_kdb(*fetch_both)) == "".join(
        f"{name}: 1 file in {folder}, 1 downloaded, all verified.\n" for name in ("cities", "stsa")
    )
    assert (folder / "cities.csv").read_text() == cities_csv()
    for file in server.iterdir():
        file.unlink()
    assert f"stsa: 1 file in {folder}, verified, all there already." in answer(run_kdb(*fetch_both))
    assert len(load_dataset("cities", data_dir=folder).examples) == 1496


def test_a_file_that_is_not_the_published_one_is_left_alone(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_kdb: Callable[..., Result]
) -> None:
    serve(server, monkeypatch, cities=cities_csv(), stsa="1 good")
    write(tmp_path / "cities.csv", "mine")
    write(server / "stsa.txt", "1 changed")
    said = refusal(run_kdb("datasets", "fetch", "cities", "stsa", "--data-dir", tmp_path))
    assert said.startswith("2 of 2 datasets were not fetched.\n")
    assert f"cities: {tmp_path}/cities.csv is not the published file: its SHA-256 is another. Move it" in said
    assert f"stsa.txt has changed (its SHA-256 is not the expected one). The file belongs at {tmp_path}/stsa" in said
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("cities.csv", "mine")]


def test_a_failed_download_does_not_stop_the_others(
    server: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, run_kdb: Callable[..., Result]
) -> None:
    serve(server, monkeypatch, stsa="1 good")
    result = run_kdb("datasets", "fetch")
    assert (result.exit_code, result.stdout) == (2, f"stsa: 1 file in {cache}, 1 downloaded, all verified.\n")
    failed = set(PAPER_DATASETS) - {"stsa", "imdb"} | set(PUBLISHED)
    assert f"{len(failed)} of {len(failed) + 2} datasets were not fetched." in result.stderr
    assert all(f"  {name}: Cannot download " in result.stderr for name in failed)


def test_a_file_that_cannot_be_downloaded_is_described(cache: Path, run_kdb: Callable[..., Result]) -> None:
    assert refusal(run_kdb("datasets", "fetch", "imdb")) == (
        "1 of 1 datasets were not fetched.\n  imdb: It cannot be downloaded as one file; its texts are published in "
        f"dax44/AMLM, data/aclImdb/test (Maas et al. 2011). The file belongs at {cache}/imdb_test_2048.jsonl."
    )
    assert answer(run_kdb("datasets", "fetch", "ioi")) == "ioi is built in, and needs no file.\n"
    assert refusal(run_kdb("datasets", "fetch", "citis")).startswith("Unknown dataset 'citis'. Did you mean 'cities'")


@pytest.mark.parametrize("command", [("datasets",), ("ingest", "--model", "smollm2-135m", "--dry-run")])
def test_a_folder_that_does_not_exist_is_refused(command: Sequence[str], run_kdb: Callable[..., Result]) -> None:
    for result in (run_kdb(*command, "--data-dir", "./nofolder"), run_kdb(*command, KDB_DATA_DIR="nofolder")):
        assert refusal(result).startswith("--data-dir: no such folder 'nofolder'. Name the folder with the files")


# --- answers and cues ---


def test_every_named_dataset_asks_for_its_answers_in_its_template() -> None:
    asking = {"true": ("false", "true"), "yes": ("no", "yes"), "positive": ("negative", "positive")}
    for declared in (*BUILT_IN.values(), *PAPER_DATASETS.values()):
        (answers,) = [pair for word, pair in asking.items() if re.search(rf"\b{word}\b", declared.template)]
        assert declared.answers == answers, declared.name


@pytest.mark.parametrize("answers", ["no,yes", " no , yes ", ("no", "yes")])
def test_a_question_about_a_users_file_follows_its_texts(tmp_path: Path, answers: str | tuple[str, str]) -> None:
    file = write(tmp_path / "a.csv", GOOD_CSV)
    dataset = load_dataset(file, ask=" Is it true? ", answers=answers)
    assert (dataset.answers, dataset.cue) == (("no", "yes"), "\nIs it true?\nAnswer:")
    assert prompts(dataset) == prompts(load_dataset(file))


def test_a_users_labels_are_not_taken_for_answers(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path / "a.csv", "text,label\na,false\nb,true\n"))
    assert (dataset.answers, dataset.cue) == (None, "")


def test_a_template_of_the_user_takes_the_place_of_the_datasets_question() -> None:
    load = partial(load_dataset, "coinflip-synthetic")
    assert load().answers == ("no", "yes")
    assert load(template="{text}").answers is None
    told = load(template="{text} Yes or no?", answers="no,yes")
    assert (told.answers, told.cue) == (("no", "yes"), "")
    assert load(template="{text}", ask="Up:", answers="down,up").cue == "\nUp:"


WORDS = "--answers: expected two different words, label 0's first, such as no,yes; found "


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("a.csv", {"ask": "So?"}, "--ask needs the two answers: add --answers, label 0's word first, such as no,yes."),
        (
            "a.csv",
            {"answers": "no,yes"},
            "--answers needs a question: add --ask, such as 'Is it true?', or a --template that asks.",
        ),
        ("a.csv", {"ask": " ", "answers": "no,yes"}, "--ask is blank: write a question, such as 'Is it true?'."),
        ("a.csv", {"ask": "So?", "answers": "yes"}, f"{WORDS}'yes'."),
        ("a.csv", {"ask": "So?", "answers": "no,yes,maybe"}, f"{WORDS}'no,yes,maybe'."),
        ("a.csv", {"ask": "So?", "answers": "no,"}, f"{WORDS}'no,'."),
        ("a.csv", {"ask": "So?", "answers": "yes,Yes"}, f"{WORDS}'yes,Yes'."),
        (
            "world-cities",
            {"ask": "So?", "answers": "no,yes"},
            "Dataset 'world-cities' asks a question of its own. Leave --ask and --answers out, or add --template.",
        ),
        (
            "knowledge",
            {"answers": "no,yes"},
            "Dataset 'knowledge' has prompts that their answers continue. Leave --ask and --answers out.",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    tmp_path: Path, name: str, options: dict[str, str], expected: str
) -> None:
    write(tmp_path / "a.csv", GOOD_CSV)
    assert message(str(tmp_path / name) if name == "a.csv" else name, **options) == expected


def test_a_text_with_both_labels_is_refused_with_its_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,label\nIt rains.,1\nIt snows.,0\nIt rains. ,yes\nIt rains.,no\n")
    assert message(file) == (
        "a.csv, line 5: expected the label 1 that a.csv, line 2 has for the text 'It rains.', found 0: "
        "keep one of the two rows"
    )


@pytest.mark.parametrize(
    ("template", "cue"),
    [
        ("{text}", "\nAnswer:"),
        ("Is it true? {text}", "\nAnswer:"),
        ("{text}\nYes or no? Answer:", ""),
        ("{text} Is it so? ", ""),
    ],
)
def test_the_cue_asks_for_an_answer_unless_the_template_ends_by_asking(template: str, cue: str) -> None:
    assert example_dataset("It rains.", template=template).cue == cue


def test_list_of_datasets_says_what_is_available(tmp_path: Path) -> None:
    write(tmp_path / "cities.csv", "")
    infos = {info.name: info for info in available_datasets(tmp_path)}
    ours, published = ["world-cities", "coinflip-synthetic"], ["knowledge", "ioi", *PUBLISHED]
    assert list(infos) == [*ours, *PAPER_DATASETS, *published]
    assert (infos["cities"].status, infos["cities"].where) == ("available", str(tmp_path))
    assert (infos["cities"].size, infos["stsa"].status) == ("748 true + 748 false", "downloadable")
    assert (infos["imdb"].status, infos["world-cities"].status) == ("needs a file", "built in")


def test_size_of_a_built_in_dataset_is_what_is_made(world: Dataset) -> None:
    sizes = {info.name: info.size for info in available_datasets(None)}
    for dataset in (world, load_dataset("coinflip-synthetic")):
        n_negative = len(dataset.examples) - dataset.n_positive
        counts = [int(word) for word in sizes[dataset.name].split() if word.isdigit()]
        assert counts == [dataset.n_positive, n_negative]


# --- prompts and fingerprints ---


def example_dataset(*texts: str, template: str = "<{text}>") -> Dataset:
    examples = tuple(Example(text, i % 2) for i, text in enumerate(texts))
    return Dataset("d", "", template, examples, answers=("no", "yes"))


def test_prompt_is_the_stripped_text_in_the_template() -> None:
    assert prompts(example_dataset(" a {text} \n", "{b}", template="{x} {text}.")) == [
        "{x} a {text}.",
        "{x} {b}.",
    ]


def test_noise_stands_before_each_text_and_follows_the_seed() -> None:
    dataset = example_dataset(*"abcdefgh" * 8)
    noisy = prompts(dataset, noise=True, seed=1)
    assert noisy == prompts(dataset, noise=True, seed=1) != prompts(dataset, noise=True, seed=2)
    assert {prompt[:5] for prompt in noisy} == {"<aaa ", "<bbb "}
    assert ["<" + prompt[5:] for prompt in noisy] == prompts(dataset)


EXAMPLES = st.lists(
    st.builds(Example, st.text(), st.integers(0, 1), st.none() | st.text()), min_size=1, max_size=4
).map(tuple)


@settings(max_examples=50)
@given(EXAMPLES, EXAMPLES)
def test_fingerprint_tells_contents_apart_and_nothing_else(
    one: tuple[Example, ...], other: tuple[Example, ...]
) -> None:
    fingerprint = Dataset("a", "here", "{text}", one).fingerprint
    assert fingerprint == Dataset("b", "there", "{text}?", one).fingerprint
    assert (fingerprint == Dataset("a", "here", "{text}", other).fingerprint) == (one == other)


@settings(max_examples=50)
@given(EXAMPLES, st.data())
def test_fingerprint_changes_with_any_text_or_label(examples: tuple[Example, ...], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(examples) - 1))
    old = examples[place]
    for new in (replace(old, text=old.text + "."), replace(old, label=1 - old.label)):
        changed = (*examples[:place], new, *examples[place + 1 :])
        assert Dataset("a", "", "", changed).fingerprint != Dataset("a", "", "", examples).fingerprint


def test_fingerprint_is_the_same_on_every_platform() -> None:
    dataset = Dataset("d", "", "", (Example("né", 1, "g"), Example("a", 0)))
    assert dataset.fingerprint == hashlib.sha256(b'["n\\u00e9", 1, "g"]\n["a", 0, null]\n').hexdigest()


def test_importing_datasets_loads_nothing_heavy() -> None:
    heavy = "{'polars', 'pyarrow', 'torch', 'transformers', 'sklearn', 'duckdb', 'ssl'}"
    code = f"import sys, kdb.ingest.datasets; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
