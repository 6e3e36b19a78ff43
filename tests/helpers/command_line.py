"""The answer of a command, and the one message of a command that was refused."""

from __future__ import annotations

import re

from click.testing import Result


def refusal(result: Result) -> str:
    """The one message of a command that was refused: on stderr, with exit code 2, and nothing on stdout."""
    assert (result.exit_code, result.stdout) == (2, "")
    before, *messages = re.split(r"^Error: ", result.stderr, flags=re.MULTILINE)
    assert len(messages) == 1
    assert before == "" or before.startswith("Usage: ")  # click shows the usage of a command that was misspelt
    return messages[0].strip()


def answer(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout
