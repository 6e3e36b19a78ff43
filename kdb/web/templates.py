"""HTML from Jinja templates. Everything is escaped, because texts come from models and datasets."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdb.analysis.report import cell

_NEURON = re.compile(r"(f\d+|a\d+\.\d+)_\d+")
_HEAD = re.compile(r"a(\d+)\.(\d+)")


def render_template(name: str, **context: Any) -> str:
    """Return the HTML of a template."""
    return _environment().get_template(name).render(**context)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    environment.globals.update(url=url, link=link, version=importlib.metadata.version("kdb-lm"))
    return environment


def url(path: str, params: Mapping[str, Any] | None = None, **more: Any) -> str:
    """Return a path with its query string, without None and empty lists."""
    values = {name: value for name, value in {**(params or {}), **more}.items() if value not in (None, [], ())}
    return f"{path}?{urlencode(values, doseq=True)}" if values else path


def link(column: str, row: Mapping[str, Any]) -> str | None:
    """Return the link of a table's cell to the page of its model, prompt, neuron or head; None if it has no page."""
    value, model, dataset = row.get(column), row.get("model"), row.get("dataset")
    if value is None:
        return None
    if column == "model":
        return url("/model", model=value)
    if column == "run":
        return url("/sql", q=f"SELECT * FROM runs WHERE run = '{value}'") if re.fullmatch(r"\w+", str(value)) else None
    if (
        model
        and dataset
        and column in ("prompt_id", "text")
        and "target_token" in row
        and row.get("prompt_id") is not None
    ):
        return url("/prompt", model=model, dataset=dataset, prompt=row["prompt_id"])
    if model and column in ("name", "neuron_name", "head_name"):
        if _NEURON.fullmatch(str(value)):
            return url("/neuron", model=model, neuron=value)
        if match := _HEAD.fullmatch(str(value)):
            return url("/head", model=model, layer=match[1], head=match[2])
    return None
