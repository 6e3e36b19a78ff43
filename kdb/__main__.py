"""``python -m kdb``: the kdb command, if its script is not on the path."""

from kdb.cli import main

main(prog_name="kdb")
