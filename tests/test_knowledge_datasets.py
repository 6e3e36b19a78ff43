"""Prompts with one right answer: the built-in set, published collections, a user's file, and target tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers.tokenizers import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb.errors import DatasetError
from kdb.ingest.attribution.targets import Target, check_candidates, find_targets, target_token
from kdb.ingest.datasets import Dataset, Example, available_datasets, cloze, fetch, load_dataset, prompts, questions
from kdb.ingest.datasets.answers import with_one_answer
from kdb.ingest.datasets.published import PUBLISHED
from kdb.ingest.datasets.world import answers_by_category
from kdb.ingest.models.find import REGISTRY, find_model
from kdb.ingest.models.load import load_tokenizer
from kdb.queries.domains import CATEGORIES

pytestmark = pytest.mark.slow

GOOD_CSV = """prompt,answer,category
The capital of France is,Paris,capital
The capital of Italy is,Rome,capital
Grass is, green ,color
Snow is,white,color
"""


@pytest.fixture(autouse=True)
def _no_network(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(fetch, "cache_dir", lambda: folder)
    monkeypatch.setattr(fetch, "BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def facts(shared: Path) -> Path:
    """The folder of the published files."""
    return shared / "data" / "knowledge"


@pytest.fixture(scope="module")
def built_in() -> Dataset:
    return load_dataset("knowledge")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(DatasetError) as caught:
        call()
    return str(caught.value)


def refusal(path: Path, content: str | bytes, **options: Any) -> str:
    write(path, content)
    return message(lambda: load_dataset(str(path), **options))


def by_category(dataset: Dataset) -> dict[str | None, int]:
    return dict(Counter(example.category for example in dataset.examples))


# --- the built-in one ---


def test_built_in_prompts_are_many_in_each_of_six_categories_and_all_different(built_in: Dataset) -> None:
    sizes = by_category(built_in)
    assert set(sizes) == set(CATEGORIES) and all(40 <= size <= 60 for size in sizes.values())
    assert len({example.text for example in built_in.examples}) == len(built_in.examples) <= 330
    assert (built_in.study, built_in.template, built_in.n_positive) == ("knowledge", "{text}", None)


@pytest.mark.parametrize("category", CATEGORIES)
def test_built_in_category_has_several_phrasings_and_answers(built_in: Dataset, category: str) -> None:
    examples = [example for example in built_in.examples if example.category == category]
    assert len({example.relation for example in examples}) >= 3
    assert len({example.answer for example in examples}) >= 7


def test_built_in_answer_is_one_plain_word_that_its_prompt_does_not_end_with(built_in: Dataset) -> None:
    for example in built_in.examples:
        assert example.answer is not None and example.answer.isascii() and example.answer.isalpha()
        assert example.text == example.text.strip() and not example.text.endswith(example.answer)
        assert example.relation and example.subject and example.label is None


def test_built_in_dataset_answers_a_question_in_one_way(built_in: Dataset) -> None:
    answers: dict[tuple[str | None, str | None], set[str | None]] = {}
    for example in built_in.examples:
        answers.setdefault((example.relation, example.subject), set()).add(example.answer)
    assert all(len(known) == 1 for known in answers.values())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The capital of France is the city of", "Paris"),
        ("The national language of Brazil is called", "Portuguese"),
        ("People who live in London speak a language called", "English"),
        ("The flag of the Netherlands is red, white and", "blue"),
        ("The colors of the rainbow are red, orange, yellow,", "green"),
        ("The countdown goes on: five, four, three,", "two"),
        ("Counting by twos: three, five, seven,", "nine"),
        ("The last day of December is followed by the first day of", "January"),
        ("Mount Fuji is in the country of", "Japan"),
    ],
)
def test_built_in_prompt_has_its_answer(built_in: Dataset, text: str, answer: str) -> None:
    assert [example.answer for example in built_in.examples if example.text == text] == [answer]


def test_built_in_dataset_is_the_same_in_another_process(built_in: Dataset) -> None:
    code = "from kdb.ingest.datasets import load_dataset as load; print(load('knowledge').fingerprint)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == built_in.fingerprint


def test_indirect_objects_stand_in_pairs_that_differ_in_the_giver_only() -> None:
    examples = load_dataset("ioi").examples
    assert len({example.text for example in examples}) == len(examples) == 100
    for one, other in zip(examples[::2], examples[1::2], strict=True):
        assert (one.relation, one.subject, one.answer) == (other.relation, other.answer, other.subject)
        before, after = one.text.rsplit(str(one.subject), 1)
        assert other.text == f"{before}{other.subject}{after}"
        assert str(one.answer) in before
    orders = Counter(
        example.text.find(str(example.answer)) < example.text.find(str(example.subject)) for example in examples
    )
    assert orders == {True: 50, False: 50}


def test_indirect_objects_are_measured_only_when_they_are_named() -> None:
    assert not {info.name: info for info in available_datasets()}["ioi"].by_default


def test_built_in_dataset_is_listed_with_its_size(built_in: Dataset) -> None:
    info = next(info for info in available_datasets() if info.name == "knowledge")
    assert (info.study, info.status, info.template) == ("knowledge", "built in", "{text}")
    listed = {part.split()[1]: int(part.split()[0]) for part in info.size.split(" + ")}
    assert listed == by_category(built_in)


# --- the published ones ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dataset_has_its_counts_and_one_answer_to_each_prompt(facts: Path, name: str) -> None:
    dataset = load_dataset(name, data_dir=facts)
    assert by_category(dataset) == dict(PUBLISHED[name].counts)
    texts = [example.text for example in dataset.examples]
    assert len(set(texts)) == len(texts) and all(example.answer for example in dataset.examples)
    assert dataset.study == "knowledge" and set(by_category(dataset)) <= set(CATEGORIES)
    assert "; prompts with more than one answer, left out: " in dataset.source and str(facts) not in dataset.source


@pytest.mark.parametrize(
    ("name", "text", "answer", "category"),
    [
        ("relations", "The capital of Brazil is the city of", "Brasília", "capital"),
        ("pararel", "Ankara is the capital of", "Turkey", "capital"),
        ("known-1000", "Ireland's capital,", "Dublin", "capital"),
        ("bigbench-wikidata", "The country of citizenship of Joseph Plunkett is", "Ireland", "country"),
        ("memory-colors", "What is the color of grass?", "green", "color"),
        ("memory-colors", "What is the color of snow?", "white", "color"),
        ("independence-days", "Each year, South Korea celebrates its independence in the month of", "August", "month"),
        ("numersense", "Latin verbs have", "four", "number"),
        ("triviaqa", "Juba is the capital of which country?", "South Sudan", "country"),
        ("opentriviaqa", "What is the official language of the Republic of Cuba?", "Spanish", "language"),
    ],
)
def test_published_fact_is_read(facts: Path, name: str, text: str, answer: str, category: str) -> None:
    found = [e for e in load_dataset(name, data_dir=facts).examples if e.text == text]
    assert [(e.answer, e.category) for e in found] == [(answer, category)]


def test_bigbench_prompt_with_two_answers_is_left_out_and_counted(facts: Path) -> None:
    dataset = load_dataset("bigbench-wikidata", data_dir=facts)
    assert dataset.source.endswith(", left out: 1")
    assert not any(e.text == "The language of Prison Break is" for e in dataset.examples)
    assert not any(e.answer == "U" for e in dataset.examples)


def test_independence_days_leave_out_countries_with_two_months(facts: Path) -> None:
    subjects = {e.subject for e in load_dataset("independence-days", data_dir=facts).examples if e.category == "month"}
    assert len(subjects) == 162 and "Norway" not in subjects and "The Gambia" in subjects


def test_questions_are_put_as_questions(facts: Path) -> None:
    dataset = load_dataset("memory-colors", data_dir=facts, limit=2)
    assert prompts(dataset)[0] == "Question: What is the color of a sunflower?\nAnswer:"


def test_pararel_keeps_the_patterns_that_end_in_the_answer(tmp_path: Path) -> None:
    trex = write(tmp_path / "P36.jsonl", '{"sub_label": "France", "obj_label": "Paris"}\n')
    patterns = write(
        tmp_path / "patterns.jsonl",
        "".join(
            json.dumps({"pattern": pattern}) + "\n"
            for pattern in ("The capital of [X] is [Y] .", "[X]'s capital, [Y].", "[Y] is in [X].", "[X] has [Y] now.")
        ),
    )
    nothing = write(tmp_path / "none.jsonl", "")
    read = cloze.read_pararel([trex, patterns, nothing, nothing])
    assert [(e.text, e.answer, e.relation) for e in read] == [
        ("The capital of France is", "Paris", "P36"),
        ("France's capital,", "Paris", "P36"),
    ]


def test_opentriviaqa_is_read_line_by_line_in_two_encodings(tmp_path: Path) -> None:
    file = write(
        tmp_path / "general",
        b"#Q Which country has the caf\xe9\nA in Paris?\r\n^ France\r\nA Spain\r\nB France\r\n\r\n"
        + "#Q Which country is São Paulo in?\n^ Brazil\nA Brazil\n\n".encode()
        + b"#Q Which of these is a country?\n^ Peru\nA Peru\nB Rome\n",
    )
    read = [e for e in questions.read_opentriviaqa([file]) if e.category]
    assert [(e.text, e.answer, e.relation) for e in read] == [
        ("Which country has the café A in Paris?", "France", "general"),
        ("Which country is São Paulo in?", "Brazil", "general"),
    ]


def test_triviaqa_undoes_double_quotes_and_prefers_the_canonical_answer(tmp_path: Path) -> None:
    topics = write(
        tmp_path / "topics.txt",
        '"""What color is the """"Orange"""" car?"""\t"[\'Green\', \'Verde\']"\r\n'
        "What color is it?\t['Red', 'Blue']\r\n"
        "How many are there?\t['8', 'Eight', 'VIII']\r\n"
        "Which country?\t['Peru', 'USA', 'U.S.']\r\n",
    )
    best = write(tmp_path / "best.jsonl", '{"context": "Question: Which country?\\nAnswer:", "answer": "PERU"}\n')
    kept, dropped = with_one_answer(questions.read_triviaqa([topics, best]))
    assert [(e.text, e.answer, e.category) for e in kept] == [
        ('What color is the "Orange" car?', "green", "color"),
        ("How many are there?", "eight", "number"),
        ("Which country?", "Peru", "country"),
    ]
    assert dropped == 1


@pytest.mark.parametrize(
    ("question", "accepted", "expected"),
    [
        ("In which month is Halloween?", ["October"], ("month", ["October"])),
        ("What colour is a London bus?", ["A Red"], ("color", ["red"])),
        ("What colour is ash?", ["grey", "gray"], ("color", ["gray"])),
        ("Who wrote The Orange?", ["Orange"], None),
        ("How many?", ["21"], ("number", ["21"])),
        ("Which language is spoken there?", ["FRENCH"], ("language", ["French"])),
        ("What is the capital of Peru?", ["Lima"], ("capital", ["Lima"])),
        ("Which country is it?", ["The Netherlands", "Holland"], ("country", ["Netherlands"])),
        ("Which river is it?", ["Jordan"], None),
    ],
)
def test_category_of_a_question_follows_from_its_words_and_answer(
    question: str, accepted: list[str], expected: tuple[str, list[str]] | None
) -> None:
    assert answers_by_category(question, accepted) == expected


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        ("known-1000", "known_1000.json", '[\n{"prompt": 1}]', "known_1000.json, line 2: expected one column 'att"),
        ("known-1000", "known_1000.json", "{}", "known_1000.json: expected a JSON list, found none"),
        ("known-1000", "known_1000.json", "[", "known_1000.json, line 1: expected valid JSON, found"),
        ("memory-colors", "memory_colors.csv", "Item, Color\n", "memory_colors.csv, line 1: expected one column 'Desc"),
        (
            "memory-colors",
            "memory_colors.csv",
            "Descriptor, Item, Color\na, plum, purple\n",
            "memory_colors.csv: expected 108 color, found 1 color",
        ),
        (
            "independence-days",
            "independence_days.csv",
            "Country,Date_holiday,Year_celebrated\nPeru,28 July,1821\n",
            "independence_days.csv, line 2: expected a date such as 8/19, found '28 July'",
        ),
    ],
)
def test_broken_published_file_is_refused(tmp_path: Path, name: str, file: str, content: str, expected: str) -> None:
    write(tmp_path / file, content)
    assert expected in message(lambda: load_dataset(name, data_dir=tmp_path))


@pytest.mark.parametrize(
    ("read", "content", "expected"),
    [
        (cloze.read_numersense, "a <mask>\n", "f, line 1: expected a sentence with <mask>, a tab and a word"),
        (questions.read_opentriviaqa, "\n^ Peru\n", "f, line 2: expected a question before its answer"),
        (questions.read_opentriviaqa, "#Q Why?\nA\n", "f, line 1: expected an answer after the question, found none"),
        (questions.read_opentriviaqa, b"#Q caf\xe9 \x81\n^ a\n", "f, line 1: expected UTF-8 or Windows-1252 text"),
    ],
)
def test_broken_line_is_named(
    tmp_path: Path, read: Callable[[list[Path]], object], content: str | bytes, expected: str
) -> None:
    file = write(tmp_path / "f", content)
    assert expected in message(lambda: list(read([file])))  # type: ignore[call-overload]


def test_missing_files_of_a_published_dataset_are_named(tmp_path: Path) -> None:
    said = message(lambda: load_dataset("pararel", data_dir=tmp_path))
    assert f"Dataset 'pararel' needs the file pararel/trex/P37.jsonl, which is not in {tmp_path}, " in said
    assert "Connection refused. Put the file" in said
    assert "Connection refused." in message(lambda: load_dataset("memory-colors"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_declared_checksums_are_those_of_the_files(facts: Path, name: str) -> None:
    for file in PUBLISHED[name].published:
        assert hashlib.sha256((facts / file.name).read_bytes()).hexdigest() == file.sha256
        assert file.url_path is not None and Path(file.url_path).suffix == Path(file.name).suffix


def test_published_datasets_are_listed_with_folder_and_status(tmp_path: Path) -> None:
    for file in PUBLISHED["numersense"].files:
        write(tmp_path / file, "")
    write(tmp_path / "memory_colors.csv", "")
    infos = {info.name: info for info in available_datasets(tmp_path)}
    assert set(PUBLISHED) <= set(infos) and infos["cities"].study == "concept"
    for name in ("numersense", "memory-colors"):
        assert (infos[name].status, infos[name].where, infos[name].study) == ("available", str(tmp_path), "knowledge")
    assert {infos[name].status for name in ("pararel", "known-1000")} == {"downloadable"}
    assert infos["independence-days"].size == "161 number + 162 month"


EXAMPLES = st.lists(
    st.builds(
        lambda text, answer, category: Example(text, answer=answer, category=category),
        *(st.sampled_from("abcd"), st.sampled_from("xyz"), st.sampled_from([None, "one", "two"])),
    )
)


@given(EXAMPLES)
def test_prompts_kept_have_one_answer_in_the_whole_source(examples: list[Example]) -> None:
    kept, dropped = with_one_answer(examples)
    answers: dict[str, set[str | None]] = {}
    for example in examples:
        answers.setdefault(example.text, set()).add(example.answer)
    asked = {example.text for example in examples if example.category}
    assert {example.text for example in kept} == {text for text in asked if len(answers[text]) == 1}
    assert len(kept) + dropped == len(asked)
    places = [examples.index(example) for example in kept]
    assert places == sorted(places)


# --- a user's file ---


def user_file(folder: Path, ending: str) -> str:
    path = folder / f"facts.{ending}"
    if ending == "csv":
        return str(write(path, GOOD_CSV))
    table = pl.read_csv(GOOD_CSV.encode())
    if ending == "jsonl":
        table.write_ndjson(path)
    else:
        table.write_parquet(path)
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_file_with_prompts_and_answers_is_a_knowledge_dataset(tmp_path: Path, ending: str) -> None:
    dataset = load_dataset(user_file(tmp_path, ending))
    assert (dataset.study, dataset.name, dataset.n_positive) == ("knowledge", "facts", None)
    assert [(e.text, e.answer, e.category, e.label) for e in dataset.examples][1:3] == [
        ("The capital of Italy is", "Rome", "capital", None),
        ("Grass is", "green", "color", None),
    ]


def test_formats_of_the_same_facts_share_a_fingerprint(tmp_path: Path) -> None:
    files = [user_file(tmp_path, ending) for ending in ("csv", "jsonl", "parquet")]
    assert len({load_dataset(file).fingerprint for file in files}) == 1


def test_a_rival_and_a_corrupt_prompt_of_the_file_are_kept_and_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    plain = ["The sky is,blue,color,,", "Snow is,white,color,,"]
    rows = ["The capital of Peru is,Lima,capital,Rome,The capital of Italy is", *plain]
    (tmp_path / "f.csv").write_text("\n".join(["prompt,answer,category,rival,corrupt", *rows]))
    dataset = load_dataset(str(tmp_path / "f.csv"))
    assert [(e.rival, e.corrupt) for e in dataset.examples] == [
        ("Rome", "The capital of Italy is"),
        (None, None),
        (None, None),
    ]
    (tmp_path / "g.csv").write_text((tmp_path / "f.csv").read_text().replace("Italy", "Spain"))
    assert load_dataset(str(tmp_path / "g.csv")).fingerprint != dataset.fingerprint


@pytest.mark.parametrize("row", ["a b,c,d,c,", "a b,c,d,,a b"])
def test_a_rival_or_corrupt_prompt_that_is_no_other_is_refused_with_its_row(tmp_path: Path, row: str) -> None:
    (tmp_path / "f.csv").write_text(f"prompt,answer,category,rival,corrupt\n{row}\n")
    with pytest.raises(DatasetError, match=r"f\.csv, (line|row) .*: .*of another text"):
        load_dataset(str(tmp_path / "f.csv"))


@pytest.mark.parametrize(
    ("column", "value"), [("rival", ["Rome"]), ("corrupt", 5), ("subject", {}), ("rival", "\ud800")]
)
def test_an_optional_column_of_knowledge_holds_text_or_nothing(tmp_path: Path, column: str, value: Any) -> None:
    row = {"prompt": "The capital of France is", "answer": "Paris", "category": "capital", "rival": "Oslo"}
    (tmp_path / "f.jsonl").write_text(json.dumps(row | {column: value}))
    with pytest.raises(DatasetError, match=rf"f\.jsonl, line 1: expected .* in column '{column}'"):
        load_dataset(str(tmp_path / "f.jsonl"))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_relation_and_subject_are_kept_where_they_are_given(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    table = pl.DataFrame(
        {
            "prompt": ["a", "b"],
            "answer": ["x", "y"],
            "category": ["c", "c"],
            "relation": ["r", None],
            "subject": ["s", None],
        }
    )
    {"csv": table.write_csv, "jsonl": table.write_ndjson, "parquet": table.write_parquet}[ending](path)
    assert [(e.relation, e.subject) for e in load_dataset(str(path)).examples] == [("r", "s"), (None, None)]


def test_json_lines_may_lack_relation_and_subject_in_some_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "answer": "x", "category": "c", "relation": "r"},
        {"prompt": "b", "answer": "y", "category": "c", "subject": "s"},
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert [(e.relation, e.subject) for e in load_dataset(str(path)).examples] == [("r", None), (None, "s")]


def test_repeat_of_prompt_and_answer_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", GOOD_CSV + " Snow is ,white ,color\n")
    assert [e.text for e in load_dataset(str(path)).examples].count("Snow is") == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("Coal is,,color", "expected an answer in column 'answer', found '': write it as text, or remove the row"),
        ("Coal is,  ,color", "expected an answer in column 'answer', found '  ': write it"),
        (" ,black,color", "expected a prompt in column 'prompt', found ' ': write it"),
        ("Coal is,black,", "expected a category in column 'category', found '': write it"),
        (
            " Snow is,black,color",
            "expected the answer 'white' that a.csv, line 5 has for the prompt 'Snow is', found 'black': "
            "keep one of the two rows",
        ),
        ("Snow is,white,weather", "expected the category 'color' that a.csv, line 5 has for the prompt 'Snow is', "),
    ],
)
def test_row_that_cannot_be_judged_is_refused_with_its_line(tmp_path: Path, row: str, expected: str) -> None:
    assert f"a.csv, line 6: {expected}" in refusal(tmp_path / "a.csv", f"{GOOD_CSV}{row}\n")


def test_broken_json_line_of_facts_is_named(tmp_path: Path) -> None:
    good = '{"prompt": "a", "answer": "x", "category": "c"}\n'
    assert "a.jsonl, line 2: expected an answer in column 'answer', found 4" in refusal(
        tmp_path / "a.jsonl", good + '{"prompt": "b", "answer": 4, "category": "c"}\n'
    )
    assert "a.jsonl, line 2: expected one column 'answer', found 'prompt', 'category'" in refusal(
        tmp_path / "a.jsonl", good + '{"prompt": "b", "category": "c"}\n'
    )


def test_category_with_one_answer_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.csv", GOOD_CSV + "Two is,even,number\nFour is,even,number\n") == (
        "Dataset 'a' (a.csv, a user's file) has only the answer 'even' in the category 'number'; an answer is compared "
        "with the others of its category: add prompts with another answer, or move these to another category."
    )


def test_limit_that_leaves_one_answer_in_a_category_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.csv", GOOD_CSV, limit=1) == (
        "Dataset 'a' (a.csv, a user's file) has only the answer 'Paris' among the first 1 prompts of the category "
        "'capital'; an answer is compared with the others of its category: raise the limit."
    )


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "a.csv", "prompt,answer,category\n") == "Dataset 'a' (a.csv, a user's file) has no prompts."
    )


@pytest.mark.parametrize(
    ("file", "content", "line", "found"),
    [
        ("a.csv", "prompt,answer\na,b\n", 1, "'prompt', 'answer'"),
        ("a.csv", "text,category,answer\n", 1, "'text', 'category', 'answer'"),
        ("a.csv", "", 1, "no columns"),
        ("a.jsonl", "", 1, "no columns"),
        ("a.jsonl", '\n{"prompt": "a"}\n', 2, "'prompt'"),
    ],
)
def test_file_of_neither_study_is_told_the_columns_of_both(
    tmp_path: Path, file: str, content: str, line: int, found: str
) -> None:
    assert refusal(tmp_path / file, content) == (
        f"{file}, line {line}: expected columns 'text' and 'label', or 'prompt', 'answer' and 'category', "
        f"found {found}: rename the columns"
    )


def test_file_with_the_columns_of_both_studies_is_refused(tmp_path: Path) -> None:
    assert "not both, found" in refusal(tmp_path / "a.csv", "text,label,prompt,answer,category\n")


def test_parquet_file_of_neither_study_is_told_the_columns_of_both(tmp_path: Path) -> None:
    pl.DataFrame({"prompt": ["a"]}).write_parquet(tmp_path / "a.parquet")
    assert "found 'prompt': rename the columns" in message(lambda: load_dataset(str(tmp_path / "a.parquet")))


def test_knowledge_cannot_be_grouped(tmp_path: Path) -> None:
    for name in (user_file(tmp_path, "csv"), "knowledge", "pararel"):
        assert "cannot be grouped by 'answer'" in message(lambda name=name: load_dataset(name, group_by="answer"))


@pytest.mark.parametrize("name", ["knowledge", "Known-1000"])
def test_file_may_not_take_the_name_of_a_knowledge_dataset(tmp_path: Path, name: str) -> None:
    assert "the name of one of kdb's own datasets" in refusal(tmp_path / f"{name}.csv", GOOD_CSV)


ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 5)), min_size=1, max_size=8)


@given(ROWS, st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_limit_keeps_the_first_of_each_category_in_the_files_order(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[tuple[str, int]], limit: int
) -> None:
    categories = [category for category, size in blocks for _ in range(size)]
    lines = [f"{i},answer {i},{category}" for i, category in enumerate(categories)]
    path = write(tmp_path_factory.mktemp("limit") / "a.csv", "\n".join(["prompt,answer,category", *lines]))
    kept = [int(example.text) for example in load_dataset(str(path), limit=limit).examples]
    assert kept == [i for i, category in enumerate(categories) if categories[:i].count(category) < limit]


# --- fingerprints ---

FACTS = st.lists(
    st.builds(
        lambda text, answer, category: Example(text, answer=answer, category=category),
        *(st.text(), st.text(), st.text()),
    ),
    min_size=1,
    max_size=4,
).map(tuple)


@settings(max_examples=50)
@given(FACTS, FACTS)
def test_fingerprint_tells_facts_apart(one: tuple[Example, ...], other: tuple[Example, ...]) -> None:
    fingerprint = Dataset("a", "here", "{text}", one, study="knowledge").fingerprint
    assert fingerprint == Dataset("b", "there", "{text}?", one, study="knowledge").fingerprint
    assert (fingerprint == Dataset("a", "", "", other, study="knowledge").fingerprint) == (one == other)


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("coinflip-synthetic", "b1112650d4ee9622b99349cf7fbb51383bfd1f8c0a3ff061007bd3b7dbcf0e13"),
        ("world-cities", "ecce528be5e86835e0071a3f7303588c434c456497ccae28825e866fca3125ff"),
        ("knowledge", "fa9136dbcf96f792854f0db1c76bb1b363bcbe5aebb3a4ab308c4da1a40236c6"),
    ],
)
def test_built_in_dataset_is_the_same_in_every_version_of_kdb(name: str, fingerprint: str) -> None:
    assert load_dataset(name).fingerprint == fingerprint


# --- target tokens ---


@pytest.mark.parametrize("kind", ["bytes", "always", "first", "words"])
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_target_is_the_first_token_that_the_answer_adds(kind: str, bos: bool, eos: bool) -> None:
    made = tokenizer(kind, bos=bos, eos=eos)
    ids, target = target_token(made, "The capital of Italy is", " Rome ")
    bare = made("The capital of Italy is", add_special_tokens=False)["input_ids"]
    whole = made("The capital of Italy is Rome", add_special_tokens=False)["input_ids"]
    assert ids == [made.bos_token_id] * bos + bare
    assert whole[: len(bare)] == bare and target == whole[len(bare)]


@pytest.mark.parametrize("kind", ["bytes", "always", "first", "words"])
def test_white_space_at_the_end_of_a_prompt_changes_nothing(kind: str) -> None:
    made = tokenizer(kind)
    assert target_token(made, "France is \n", "Paris") == target_token(made, "France is", "Paris")


def test_space_that_is_a_token_of_its_own_belongs_to_the_prompt() -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("▁ab12")}
    bpe = Tokenizer(BPE(vocab=letters, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bpe.decoder = decoders.Metaspace(prepend_scheme="always")
    made = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert target_token(made, "a", "12") == ([0, 1, 0], 3)


def test_token_across_the_border_leaves_the_answers_own_token() -> None:
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # Spaces are no border here, and "a▁" is one token: the prompt "a" is not how "a b" begins.
    vocab = {piece: i for i, piece in enumerate(["▁", "a", "b", "a▁"])}
    bpe = Tokenizer(BPE(vocab=vocab, merges=[("a", "▁")]))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    from tokenizers import decoders

    bpe.decoder = decoders.Replace("▁", " ")
    made = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert made("a b")["input_ids"] == [3, 2]
    assert target_token(made, "a", "b") == ([1], 2)


def test_answer_that_adds_no_token_is_refused_with_its_prompt() -> None:
    made = tokenizer("bytes")
    assert message(lambda: target_token(made, "The capital of Italy is", " ")) == (
        "The answer '' to the prompt 'The capital of Italy is' adds no token to the prompt: use another answer."
    )


def test_answer_that_the_tokenizer_does_not_know_is_refused() -> None:
    made = tokenizer("words")
    assert "'Bonn' to the prompt 'The capital of Italy is' is unknown to" in message(
        lambda: target_token(made, "The capital of Italy is", "Bonn")
    )


WORDS = st.text("abcdefgh 12é", min_size=1).filter(str.strip)


@pytest.mark.parametrize("kind", ["bytes"])
@settings(max_examples=100, deadline=None)
@given(prompt=WORDS, answer=WORDS)
def test_target_and_prompt_are_how_the_whole_text_begins(kind: str, prompt: str, answer: str) -> None:
    made = BYTES.setdefault(kind, tokenizer(kind, bos=True, eos=True))
    ids, target = target_token(made, prompt, answer)
    whole = made(f"{prompt.rstrip()} {answer.strip()}")["input_ids"]
    assert whole[: len(ids) + 1] == [*ids, target]
    assert made.decode([target]).strip()


BYTES: dict[str, Any] = {}


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    package = REGISTRY[request.param].package
    if package is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{request.param} would be a download: the package {package} is not installed")
    return load_tokenizer(find_model(request.param))


def test_targets_of_the_built_in_prompts_are_the_beginnings_of_their_answers(
    real_tokenizer: Any, built_in: Dataset
) -> None:
    targets = []
    for example in built_in.examples:
        ids, target = target_token(real_tokenizer, example.text, example.answer or "")
        assert ids == real_tokenizer(example.text)["input_ids"]
        piece = real_tokenizer.decode([target])
        assert piece.startswith(" ") and f" {example.answer}".startswith(piece)
        targets.append(target)
    asked = [(example.text, example.answer or "", example.category or "") for example in built_in.examples]
    found = list(find_targets(real_tokenizer, asked, [None] * len(asked)))
    assert [target.first for target in found] == targets
    assert not any(target.is_shared for target in found)
    check_candidates(found, [category for *_, category in asked])


def test_digit_is_the_target_after_a_space_that_the_prompt_takes(real_tokenizer: Any) -> None:
    ids, target = target_token(real_tokenizer, "The year was", "1984")
    assert real_tokenizer.decode([target]) == "1"
    assert real_tokenizer.decode(ids, skip_special_tokens=True) == "The year was "


def test_answers_that_all_begin_with_one_token_are_refused() -> None:
    def target(*others: tuple[int, ...]) -> Target:
        return Target([], " ", (1, 2), others)

    check_candidates([target((2,)), target((1, 3))], ["a", "b"])
    check_candidates([target((1, 3)), target((1, 4))], ["b", "b"], whole=True)
    for targets, whole in (([target((2,)), target()], True), ([target((1, 3)), target((1, 4))], False)):
        assert "All answers of the category 'b' begin" in message(
            lambda targets=targets, whole=whole: check_candidates(targets, ["b", "b"], whole=whole)
        )
    assert message(lambda: check_candidates([target((1, 3))], ["b"])) == (
        "All answers of the category 'b' begin with the same token of this model. A target is compared with the "
        "other targets of its category: add different answers to it, or compare whole answers with --answer-tokens "
        "all."
    )
