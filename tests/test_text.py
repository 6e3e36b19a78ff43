"""Names and texts of others where they are shown: terminal, chart, page, Markdown."""

from __future__ import annotations

import pytest

from kdb.text import Code, markdown, markdown_code, markdown_table, one_line, visible, visible_within


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x01b", "a\\u0001b"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\x9b2J\x7f", "\\u009b2J\\u007f"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\ud800 \uffff", "\\ud800 \\uffff"),
        ("\U000e0041", "\\U000e0041"),
        ("smollm2-135m ü 漢字 👩‍🔬 x\ty\nz", "smollm2-135m ü 漢字 👩‍🔬 x\ty\nz"),
    ],
)
def test_what_nobody_sees_is_an_escape_and_all_else_stays(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible_within({"a": [text, 1, None, {text: True}]}) == {"a": [shown, 1, None, {shown: True}]}


def test_one_line_is_one() -> None:
    assert one_line(" a\r\n  b\tc\rd\u2028") == "a b c\\u000dd\\u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("[free](javascript:alert(1))", r"[free\](javascript:alert(1))"),
        ("[x]: https://evil.example", r"[x\]: https&#58;//evil.example"),
        ("www.evil.example a@b.c", "www&#46;evil.example a&#64;b.c"),
        ("a|b `c` *d* _e_ ~f~ $g$ \\", r"a\|b \`c\` \*d\* \_e\_ \~f\~ \$g\$ " + "\\\\"),
        ("# title\n- item", r"\# title - item"),
        ("n_prompts [1, 2] -0.5", "n_prompts [1, 2] -0.5"),
    ],
)
def test_markdown_shows_the_text_as_it_is(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_code_of_markdown_cannot_be_left() -> None:
    assert markdown_code("kdb query top-heads --k 3") == "`kdb query top-heads --k 3`"
    assert markdown_code("a` <img> |") == r"<code>a\` &lt;img&gt; \|</code>"


def test_a_markdown_table_has_a_line_for_each_row_whatever_is_in_it() -> None:
    assert markdown_table(["name", "n"], [["a|b\nc", "1"], [Code("{}"), ""]]) == [
        r"| name   | n   |",
        r"| ------ | --- |",
        r"| a\|b c | 1   |",
        r"| `{}`   |     |",
    ]
