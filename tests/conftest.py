"""Fixtures that test modules share: a tiny model and dataset, the command line, a measured warehouse, two real models.

The tiny model is a real Llama of two layers with random weights; it reads any text, a token a byte. Its 40
prompts end in a full stop or an exclamation mark, and that is their label: every probe can learn it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers.tiny_llama import ASK, ASK_OPTIONS, make_tiny_model, preload, weather

import kdb
from kdb.cli import main
from kdb.ingest import speed
from kdb.ingest.datasets import load_dataset
from kdb.ingest.job import Job
from kdb.ingest.models.find import REGISTRY, LoadedModel, find_model
from kdb.ingest.models.load import load_model
from kdb.ingest.settings import Measuring, Probing

REAL_MODELS = {"smollm2_135m", "gemma_3_270m"}
"""Fixtures that load a real model: their tests get the marker real_model."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if REAL_MODELS & set(getattr(item, "fixturenames", ())):
            item.add_marker("real_model")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """Skip fsync. It protects from power loss, which no test causes; a killed process keeps what it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the user's own warehouse, data folder and measured speed from the environment of the tests."""
    monkeypatch.delenv("KDB_WAREHOUSE", raising=False)
    monkeypatch.delenv("KDB_DATA_DIR", raising=False)
    monkeypatch.setattr(speed, "user_cache_path", lambda _: Path(__file__))  # a file, so nothing can be stored in it


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of datasets and golden values that lies beside the repository."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no golden values or original datasets here: {folder} is absent")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on tiny matrices make the tests ten times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_loaded(tiny_model: Path) -> LoadedModel:
    return load_model(find_model(str(tiny_model)))


@pytest.fixture(scope="session")
def best(tiny_loaded: LoadedModel) -> Callable[[str], str]:
    """The letter that the tiny model thinks likeliest after a text and a space: an answer that it knows."""
    import torch  # most tests do without it

    tokenizer = tiny_loaded.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))

    def letter(text: str) -> str:
        with torch.inference_mode():
            logits = tiny_loaded.model(torch.tensor([tokenizer(f"{text} ")["input_ids"]])).logits[0, -1]
        return string.ascii_letters[int(logits[ids].argmax())]

    return letter


@pytest.fixture(scope="session")
def smollm2_135m() -> LoadedModel:
    return _installed("smollm2-135m")


@pytest.fixture(scope="session")
def gemma_3_270m() -> LoadedModel:
    return _installed("gemma-3-270m")


def _installed(name: str) -> LoadedModel:
    package = REGISTRY[name].package
    if package is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} would be a download: the package {package} is not installed")
    return load_model(find_model(name))


# Datasets and jobs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def user_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``weather.csv``: 40 texts, 20 of each label, two in each town (column ``town``)."""
    path = tmp_path_factory.mktemp("datasets") / "weather.csv"
    path.write_text(weather(40))
    return path


@pytest.fixture(scope="session")
def tiny_job(tiny_model: Path, user_dataset: Path) -> Callable[..., Job]:
    """Make the job of ``kdb ingest --model tiny --dataset weather.csv --ask Answer: --answers no,yes``.

    Keywords change its settings.
    """

    def make(*, dataset: Path = user_dataset, group_by: str | None = None, splits: int = 1, **measuring: object) -> Job:
        loaded = load_dataset(str(dataset), group_by=group_by, limit=measuring.get("limit"), **ASK)
        return Job(find_model(str(tiny_model)), loaded, Measuring(**measuring), Probing(splits=splits))

    return make


# The command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_kdb() -> Callable[..., Result]:
    """Run a kdb command in this process; ``.exit_code``, ``.stdout`` and ``.stderr`` say what came of it."""

    def run(*args: str | Path, **env: str) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args], env=env)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception  # what a user would see as a traceback
        return result

    return run


@pytest.fixture(scope="session")
def start_kdb() -> Callable[..., subprocess.Popen[str]]:
    """Start the installed kdb command as a process of its own."""

    def start(*args: str | Path) -> subprocess.Popen[str]:
        command = [Path(sys.executable).with_name("kdb"), *args]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes in milliseconds, forked from one that has imported torch: to be killed at leisure."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload())
    return context


# Warehouses ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, user_dataset: Path, run_kdb: Callable[..., Result]
) -> Path:
    """A warehouse with one run, of the tiny model on ``weather``. Tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("measured") / "kdb-warehouse"
    result = run_kdb("ingest", "--model", tiny_model, "--dataset", user_dataset, *ASK_OPTIONS, "--warehouse", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def warehouse(measured: Path, tmp_path: Path) -> Path:
    """A copy of that warehouse, to be damaged, moved and written to."""
    copy = Path(shutil.copytree(measured, tmp_path / "warehouse"))
    kdb.open(copy)  # kdb.duckdb holds absolute paths, and is written anew here
    return copy


class SmallDisk:
    """A file system of 16 MiB at ``path``, to be filled up or made read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, *, leave: int = 0) -> None:
        """Leave so many bytes free and no more."""
        self.free()
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        self._filler.write_bytes(bytes(free - leave))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def make_read_only(self) -> None:
        """Mount the disk read-only, since root may ignore file permissions."""
        assert _mount("-o", "remount,ro", str(self.path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)):
        pytest.skip("needs root on Linux, to mount a small file system")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(*args: str) -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    return subprocess.run(["mount", *args], capture_output=True).returncode == 0
