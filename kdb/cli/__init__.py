"""The kdb command, with one file per group of commands.

Each command parses its options, calls one function and prints the result. The modules import what they need inside
their functions: `kdb --help` must not load DuckDB, and a query must not load torch.
"""

from __future__ import annotations

from typing import Any

import click

from kdb.cli.ablate import ablate
from kdb.cli.ask import queries, query, schema, sql
from kdb.cli.compare import compare
from kdb.cli.completion import completion
from kdb.cli.datasets import datasets
from kdb.cli.draw import plot, report, summary
from kdb.cli.keep import clean, compact, migrate, rebuild, runs, verify
from kdb.cli.lens import lens
from kdb.cli.measure import ingest, models, probe, project
from kdb.cli.patch import patch
from kdb.cli.serve import demo, serve
from kdb.cli.share import export, import_, pull, push
from kdb.cli.transfer import direction, transfer
from kdb.errors import KdbError
from kdb.faults import INTERNAL, INTERRUPTED, USERS, explain, is_debugging, is_interrupt
from kdb.text import visible


class _Refused(click.ClickException):
    exit_code = USERS


class _Failed(_Refused):
    exit_code = INTERNAL


class _Stopped(_Refused):
    exit_code = INTERRUPTED

    def show(self, file: Any = None) -> None:
        """Print the message on a new line, after the ^C of the terminal."""
        click.echo(f"\n{self.message}", err=True)


class _Commands(click.Group):
    """Commands in the order in which they are used, with every error shown as one message.

    Exit codes are 2 for an error that the user can fix, 70 for an internal error, 130 after Ctrl-C.
    """

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under the headings of `GROUPS`."""
        for heading, members in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(str(one.name), one.get_short_help_str(_LONGEST_HELP)) for one in members])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (*_CLICKS_OWN, SystemExit):
            raise
        except BaseException as error:  # a panic of Polars is no Exception
            if is_debugging() and not isinstance(error, KdbError):
                raise
            raise _refused(error, f"kdb {ctx.invoked_subcommand}") from error


_CLICKS_OWN = (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError)
"""Exceptions that click handles itself, such as a closed pipe."""


def _refused(error: BaseException, doing: str) -> _Refused:
    if isinstance(error, KdbError) and not is_interrupt(error):
        return _Refused(visible(error.shell or str(error)))
    fault = explain(error, doing)
    kinds = {kind.exit_code: kind for kind in (_Refused, _Failed, _Stopped)}
    return kinds[fault.exit_code](fault.message)


GROUPS: dict[str, tuple[click.Command, ...]] = {
    "Measure": (ingest, probe, project, transfer, ablate, patch, lens, models, datasets),
    "Ask": (query, queries, sql, schema, compare, direction),
    "Show": (demo, summary, plot, report, serve),
    "Share": (export, import_, push, pull),
    "Keep": (runs, verify, clean, compact, migrate, rebuild, completion),
}
"""Commands by what they are for, in the order in which they are used."""

_LONGEST_HELP = 200
"""Characters of a command's line in the help: enough for every first sentence."""


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`kdb COMMAND --help` explains a command, with examples. The guides are README.md and the folder docs of "
    "kdb's source.",
)
@click.version_option(package_name="kdb-lm", prog_name="kdb")
def main() -> None:
    """Measure where a language model stores what it knows, and query the results in SQL.

    \b
    kdb ingest --model smollm2-135m
    kdb query concept-depth
    """


for command in (one for members in GROUPS.values() for one in members):
    main.add_command(command)
