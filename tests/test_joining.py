"""Answers follow their prompt as a text would: what stands between them, and which tokens that gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import tokenizer

from kdb.ingest.attribution.targets import answer_tokens, find_targets, target_token
from kdb.ingest.datasets import load_dataset
from kdb.ingest.datasets.joining import answer_prefix
from kdb.ingest.models.find import REGISTRY, find_model
from kdb.ingest.models.load import load_tokenizer
from kdb.ingest.models.tokens import following

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", "Paris"),
        ("The year was", "1984"),
        ("In 1984", "Orwell"),
        ("1, 2,", "3"),
        ("Q: who? A:", "me"),
        ("It rained;", "so"),
        ("Stop!", "Now"),
        ("the value of f(x)", "is"),
        ("as shown in [1]", "is"),
        ('He said "yes"', "and"),
        ("'Yes,' he said, 'it's late'", "and"),
        ("The word ‘it’s’", "is"),
        ("“Yes,”", "she"),
        ("„Ja“", "sagte"),
        ("« oui »", "dit"),
        ("भारत की राजधानी है", "दिल्ली"),
        ("한국의 수도는", "서울"),
        ("Столица России", "Москва"),
        ("ما هي عاصمة فرنسا؟", "باريس"),
    ],
)
def test_a_space_joins_them_after_a_letter_a_digit_or_a_closing_mark(prompt: str, answer: str) -> None:
    assert answer_prefix(prompt, answer) == " "


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The largest heading of HTML is <", "h"),
        ("print(", "x"),
        ('print("', "Hello"),
        ('He wrote "no" and then "', "yes"),
        ('He was 5" tall and said "', "yes"),
        ('["a","', "b"),
        ("x = [", "1"),
        ("x =", "5"),
        ("a well-", "known"),
        ("It costs $", "5"),
        ("def f() {", "return"),
        ("She said “", "yes"),
        ("Er sagte: „", "Ja"),
        ("Il dit «", "oui"),
        ("the dog's bowl is '", "red"),
        ("La capitale de l'", "Italie"),
        ("La capitale de l’", "Italie"),
        ("中国的首都是", "北京"),
        ("中国的首都是，", "北京"),
        ("中华人民共和国成立于", "1949"),
        ("日本の首都は", "東京"),
        ("ประเทศไทยมีเมืองหลวงคือ", "กรุงเทพ"),
        ("The Chinese word for water is", "水"),
    ],
)
def test_they_are_joined_as_written_after_an_opening_mark_and_in_scripts_without_spaces(
    prompt: str, answer: str
) -> None:
    assert answer_prefix(prompt, answer) == ""
    assert answer_prefix(f"{prompt} ", answer) == " "


# --- tokens ---


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    package = REGISTRY[request.param].package
    if package is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{request.param} would be a download: the package {package} is not installed")
    return load_tokenizer(find_model(request.param))


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("In HTML the largest heading is written <", "h"),
        ('In Python, one prints with print("', "Hello"),
        ("中国的首都是", "北京"),
        ("x =", "y"),
    ],
)
def test_an_answer_joined_as_written_is_scored_without_a_space(real_tokenizer: Any, prompt: str, answer: str) -> None:
    ids, tokens = answer_tokens(real_tokenizer, prompt, answer)
    assert ids == real_tokenizer(prompt)["input_ids"]
    assert real_tokenizer.decode(tokens) == answer
    assert target_token(real_tokenizer, prompt, answer) == (ids, tokens[0])


def test_a_word_after_words_keeps_its_space(real_tokenizer: Any) -> None:
    ids, target = target_token(real_tokenizer, "The capital of France is", "Paris")
    assert (ids, real_tokenizer.decode([target])) == (real_tokenizer("The capital of France is")["input_ids"], " Paris")


def test_a_given_prefix_wins(real_tokenizer: Any) -> None:
    decode = real_tokenizer.decode
    assert decode([target_token(real_tokenizer, "It is written <", "h", " ")[1]]) == " h"
    assert decode([target_token(real_tokenizer, "The capital of France is", "Paris", "")[1]]) == "Paris"
    ids, answer = answer_tokens(real_tokenizer, "The capital of France is", "Paris", ' "')
    assert decode(ids, skip_special_tokens=True) == 'The capital of France is "'
    assert decode(answer) == "Paris"


def test_an_answers_tokens_are_all_that_it_adds(real_tokenizer: Any) -> None:
    ids, answer = answer_tokens(real_tokenizer, "Gabriel Garcia Marquez was born in", "Aracataca")
    assert ids == real_tokenizer("Gabriel Garcia Marquez was born in")["input_ids"]
    assert len(answer) > 1 and real_tokenizer.decode(answer) == " Aracataca"


@pytest.mark.parametrize("kind", ["bytes", "always", "first"])
def test_text_that_follows_another_has_no_space_put_before_it(kind: str) -> None:
    made = tokenizer(kind)
    assert made.decode(following(made, "France")).strip() == "France"
    assert not any(made.decode([token]).startswith(" ") for token in following(made, "France"))
    assert "▁" not in "".join(made.convert_ids_to_tokens(following(made, "France")))


# --- answers of one category ---


def test_answers_that_begin_with_the_same_token_are_marked(real_tokenizer: Any) -> None:
    prompts = [
        (f"The year of {name} was", year, "year") for name, year in (("a", "1984"), ("b", "1990"), ("c", "2001"))
    ]
    one, other, third = find_targets(real_tokenizer, prompts, [None] * 3)
    assert (one.is_shared, other.is_shared, third.is_shared) == (True, True, False)
    assert one.first == other.first != third.first
    assert one.rivals == (third.first,) and set(third.others) == {one.answer, other.answer}
    assert [target.prefix for target in (one, other, third)] == [" "] * 3
    # The space before a digit is a token of its own in both tokenizers, and the prompt's last.
    assert real_tokenizer.decode(one.token_ids[-1:]) == " "


def test_an_answer_in_another_place_is_no_rival_of_itself(real_tokenizer: Any) -> None:
    prompts = [("The tag is <", "h", "tag"), ("The letter is", "h", "tag"), ("The letter is now", "p", "tag")]
    tag, letter, _third = find_targets(real_tokenizer, prompts, [None] * 3)
    decoded = [[real_tokenizer.decode([token]) for token in target.rivals] for target in (tag, letter)]
    assert decoded == [["p"], [" p"]]


# --- files ---

FACTS = """prompt,answer,category
The capital of France is, Paris,c
The tag is <, h,c
The letter is,q,c
x = ,5,n
y =,"
6",n
"""


def test_white_space_in_the_answer_column_is_kept_as_the_prefix(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text(FACTS)
    examples = load_dataset(str(tmp_path / "facts.csv")).examples
    assert [(e.answer, e.answer_prefix) for e in examples] == [
        ("Paris", " "),
        ("h", " "),
        ("q", None),
        ("5", " "),
        ("6", "\n"),
    ]


def test_white_space_before_an_answer_makes_another_dataset(tmp_path: Path) -> None:
    prints = set()
    for text in (FACTS, FACTS.replace("<, h", "<,h"), FACTS.replace("<, h", "<,\th")):
        (tmp_path / "facts.csv").write_text(text)
        prints.add(load_dataset(str(tmp_path / "facts.csv")).fingerprint)
    assert len(prints) == 3
