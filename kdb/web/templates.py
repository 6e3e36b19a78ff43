"""HTML from Jinja templates. Everything is escaped, because texts come from models and datasets."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdb.numbers import count_of
from kdb.web.cells import cell, meaning, shade

_NEURON = re.compile(r"(f\d+(\.\d+)?|a\d+\.\d+)_\d+")
_HEAD = re.compile(r"a(\d+)\.(\d+)")
_LAYER = re.compile(r"a(\d+)|f(\d+)(\.\d+)?")
"""A layer, or an expert of one: it is on the page of its layer."""


def render_template(name: str, /, **context: Any) -> str:
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
    environment.filters.update(cell=cell, token=token, tokens=tokens, count_of=count_of)
    environment.globals.update(
        url=url, link=link, meaning=meaning, shade=shade, version=importlib.metadata.version("kdb-lm")
    )
    return environment


def url(path: str, params: Mapping[str, Any] | None = None, **more: Any) -> str:
    """Return a path with its query string, without None and empty lists."""
    values = {name: value for name, value in {**(params or {}), **more}.items() if value not in (None, [], ())}
    return f"{path}?{urlencode(values, doseq=True)}" if values else path


def token(text: str | None) -> str:
    """Return a token as it is shown: a space at its start or end is visible, and so are ends of lines."""
    shown = (text or "").replace("\n", "⏎").replace("\t", "⇥")
    return re.sub(r"^ | $", "␣", shown)


def tokens(listed: str | None) -> list[str]:
    """Return the tokens in a cell of JSON strings that are separated by commas; none if it is not one."""
    try:
        found = json.loads(f"[{listed or ''}]")
    except ValueError:
        return []
    return [one for one in found if isinstance(one, str)]


def link(column: str, row: Mapping[str, Any]) -> str | None:
    """Return the link of a table's cell to the page of what it names; None if it has no page."""
    value, model, dataset = row.get(column), row.get("model"), row.get("dataset")
    if value is None:
        return None
    if column == "run":
        return url("/tables/runs", filter=f"run={value}") if re.fullmatch(r"\w+", str(value)) else None
    if column in ("model", "dataset") and isinstance(value, str) and "," not in value:
        return url(f"/{column}", {column: value})
    if column == "category" and "score" in row:
        return url("/category", category=value, model=model)
    if model and dataset and column in ("prompt_id", "text") and row.get("prompt_id") is not None:
        return url("/prompt", model=model, dataset=dataset, prompt=row["prompt_id"])
    return _link_of_part(column, str(value), model) if model else None


def _link_of_part(column: str, name: str, model: str) -> str | None:
    """Return the link of a neuron, head, expert or layer by its name, or of a layer by its number."""
    if column == "layer" and name.isdigit():
        return url("/layer", model=model, layer=name)
    if column not in ("name", "neuron_name", "head_name", "expert_name", "layer_name"):
        return None
    if _NEURON.fullmatch(name):
        return url("/neuron", model=model, neuron=name)
    if match := _HEAD.fullmatch(name):
        return url("/head", model=model, layer=match[1], head=match[2])
    match = _LAYER.fullmatch(name)
    return url("/layer", model=model, layer=match[1] or match[2]) if match else None
