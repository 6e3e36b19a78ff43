"""Time figures and the report on a warehouse of nine models and nine datasets, each as a whole process.

    python benchmarks/analysis.py

The numbers are invented (tests/helpers/synthetic.py), their sizes are realistic. Prints for each figure the median time
of three runs after one to warm up, and for the report its time and peak memory. For comparison it times a Python that
only imports Altair, because every command does that.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.synthetic import build

from kdb.analysis.figures import FIGURES

ONE = {
    "hidden-states": ["--model", "llama-13b", "--dataset", "cities"],
    "prompt-story": ["--model", "llama-13b", "--prompt", "0"],
}
"""Options of the figures that show one model; the other figures show all nine."""

PEAK = """
import sys
from pathlib import Path
from kdb.cli import main
main(sys.argv[1:], standalone_mode=False)
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024)
"""


def seconds(command: list[str]) -> float:
    """Median wall time of three runs after one to warm up."""
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    """Print a row per command."""
    kdb = str(Path(sys.executable).with_name("kdb"))
    with tempfile.TemporaryDirectory() as folder:
        warehouse, page = Path(folder) / "warehouse", Path(folder) / "figure"
        begun = time.perf_counter()
        build(warehouse)
        size = sum(file.stat().st_size for file in warehouse.rglob("*.parquet"))
        print(f"built in {time.perf_counter() - begun:.0f} s: {size / 2**20:.0f} MiB of Parquet")
        print(f"{'python, altair imported':32} {seconds([sys.executable, '-c', 'import altair']):6.2f} s")
        for name in FIGURES:
            args = ["plot", name, *ONE.get(name, []), "-o", f"{page}.html", "--warehouse", str(warehouse)]
            print(f"{'kdb plot ' + name:32} {seconds([kdb, *args]):6.2f} s", flush=True)
        begun = time.perf_counter()
        args = ["report", "-o", f"{page}.html", "--warehouse", str(warehouse)]
        done = subprocess.run([sys.executable, "-c", PEAK, *args], check=True, capture_output=True, text=True)
        took = time.perf_counter() - begun
        print(f"{'kdb report, nine models':32} {took:6.2f} s, peak {int(done.stdout) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
