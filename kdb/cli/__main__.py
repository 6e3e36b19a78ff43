"""``python -m kdb.cli``: the kdb command, where its script is not on the path."""

from kdb.cli import main

main(prog_name="kdb")
