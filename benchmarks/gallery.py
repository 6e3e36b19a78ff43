"""Draw all figures of a warehouse into one HTML page, to be looked at whole.

    python benchmarks/gallery.py kdb-warehouse -o gallery.html
    python benchmarks/gallery.py kdb-warehouse -o dark.html --theme dark

The page needs no other file. Figures of one prompt show the first prompt of the first model. Figures for which nothing
is stored are listed at the end, with the reason.
"""

from __future__ import annotations

import argparse
import base64
import html
from pathlib import Path
from typing import Any

import kdb
from kdb.analysis.figures import FIGURES, Figure
from kdb.analysis.save import to_png, to_svg, write_whole
from kdb.analysis.themes import THEMES
from kdb.errors import KdbError
from kdb.opened import OpenWarehouse

LARGE = 1_000_000
"""Characters of SVG above which a figure is embedded as PNG."""


def main() -> None:
    """Write the page, and say what could not be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warehouse")
    parser.add_argument("-o", "--output", type=Path, default=Path("gallery.html"))
    parser.add_argument("--theme", choices=THEMES, default="paper")
    args = parser.parse_args()
    wh = kdb.open(args.warehouse)
    parts, missing = [], []
    for figure in FIGURES.values():
        try:
            parts.append(section(wh, figure, args.theme))
        except KdbError as error:
            missing.append(f"{figure.name}: {error}")
    write_whole(args.output, page(parts, missing).encode())
    print("\n".join([f"Wrote {args.output} with {len(parts)} of {len(FIGURES)} figures.", *missing]))


def section(wh: OpenWarehouse, figure: Figure, theme: str) -> str:
    """Return a figure with its command as HTML."""
    params = required(wh, figure.name)
    words = [f"--{name} {value}" for name, value in params.items()]
    command = " ".join(["kdb plot", figure.name, *words, f"-o {figure.name}.svg"])
    source = picture(wh.plot(figure.name, theme=theme, **params))
    title = html.escape(figure.title, quote=True)
    return f'<h2>{figure.name}</h2><p><code>{html.escape(command)}</code></p><img src="{source}" alt="{title}">'


def required(wh: OpenWarehouse, name: str) -> dict[str, Any]:
    """Return the parameters without which a figure cannot be drawn, or would show nothing in most warehouses."""
    if name == "depth-by-family":
        size = wh.sql("SELECT median(n_params) / 1e9 AS size FROM models")["size"][0]
        return {"size": round(size, 3), "within": 3}
    table = {"hidden-states": "projections", "prompt-story": "layer_scores", "lens-map": "lens_readouts"}.get(name)
    if table is None:
        return {}
    found = wh.sql(f"SELECT model, dataset, prompt_id AS prompt FROM {table} ORDER BY ALL LIMIT 1").to_dicts()
    first = found[0] if found else {"model": None, "dataset": None, "prompt": 0}
    return {key: value for key, value in first.items() if name != "hidden-states" or key != "prompt"}


def picture(chart: Any) -> str:
    """Return a chart as a data URI: an image of its own, because inline SVGs would mix up their clip paths."""
    kind, content = "svg+xml", to_svg(chart).encode()
    if len(content) > LARGE:
        kind, content = "png", to_png(chart)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def page(parts: list[str], missing: list[str]) -> str:
    """Return the whole page."""
    absent = "".join(f"<li>{html.escape(line)}</li>" for line in missing)
    style = "body{font-family:sans-serif;margin:2em}img{max-width:100%;border:1px solid #ddd}"
    head = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>kdb: gallery</title><style>{style}</style>'
    return f"{head}<h1>Gallery</h1>{''.join(parts)}<h2>Not drawn</h2><ul>{absent}</ul></html>"


if __name__ == "__main__":
    main()
