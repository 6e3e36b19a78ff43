"""The kdb command: a file per group of commands, each of which parses, calls one function and renders.

The modules import what they need inside their functions: `kdb --help` must not load DuckDB, and asking a
question must not load torch.
"""

from __future__ import annotations

from typing import Any

import click

from kdb.cli.ask import queries, query, schema, sql
from kdb.cli.compare import compare
from kdb.cli.draw import plot, report
from kdb.cli.keep import clean, compact, migrate, rebuild, runs, verify
from kdb.cli.measure import ablate, datasets, ingest, models, probe, project
from kdb.cli.serve import serve
from kdb.cli.share import export, import_, pull, push
from kdb.errors import KdbError


class _Refused(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    """Commands in the order they are used, and kdb's own errors as one message with exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KdbError as error:
            raise _Refused(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted. What is finished is kept: the same command goes on from there.", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kdb-lm", prog_name="kdb")
def main() -> None:
    """Measure where a language model keeps what it knows, and ask in SQL.

    \b
    kdb ingest --model smollm2-135m
    kdb query concept-depth
    """


for command in (
    *(ingest, probe, project, ablate),
    *(query, queries, sql, plot, report, compare, serve),
    *(schema, runs, verify, clean, compact, migrate, rebuild, export, import_, push, pull, models, datasets),
):
    main.add_command(command)
