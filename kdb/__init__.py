"""Measure where a language model stores what it knows, and query the results in SQL.

    import kdb

    wh = kdb.open_demo()                       # measured results that come with kdb; kdb.open("folder") opens yours
    wh.models(), wh.datasets()                 # what is stored, as Polars frames
    wh.queries(), wh.figures()                 # what can be asked and drawn
    wh.query("concept-depth")                  # the rows of a saved query
    wh.sql("SELECT * FROM current.runs")       # the rows of any SELECT
    wh.plot("depth-curves")                    # an Altair chart, which a notebook shows

    kdb.ingest("smollm2-135m", "world-cities")                        # measure, and store the run
    model = kdb.load_model("smollm2-135m")
    kdb.attribute(model, "The capital of France is", "Paris")         # one prompt, without a warehouse

Errors that you can fix are of class ``kdb.errors.KdbError``. ``kdb --help`` lists the commands, and docs/python.md
explains these functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdb.ingest.attribution.one_prompt import PromptAttribution
    from kdb.ingest.call import ingest
    from kdb.ingest.models.find import LoadedModel
    from kdb.opened import OpenWarehouse

__all__ = ["attribute", "ingest", "load_model", "open", "open_demo"]


# Libraries are imported within the functions, so that `import kdb.errors` and `kdb --help` load neither DuckDB nor
# Polars, and a query loads no PyTorch.


def open(warehouse: str | Path | None = None) -> OpenWarehouse:  # noqa: A001  (kdb.open, as one opens a file)
    """Open the warehouse at a path or URL, which defaults to ``$KDB_WAREHOUSE``, then to ``./kdb-warehouse``.

    Raises kdb.errors.WarehouseError if there is none.
    """
    from kdb.opened import OpenWarehouse
    from kdb.warehouse import location_or_default
    from kdb.wording import python_words

    with python_words():
        return OpenWarehouse(location_or_default(warehouse))


def open_demo() -> OpenWarehouse:
    """Open the demo warehouse that comes with kdb: measured results to look at, without a model.

    It is a copy in a temporary folder, which is deleted with the returned object.
    """
    from kdb.demo import unpack_demo
    from kdb.opened import OpenWarehouse

    folder = unpack_demo()
    opened = OpenWarehouse(folder.name)
    opened.kept_with = folder
    return opened


def load_model(
    model: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
) -> LoadedModel:
    """Load a model once, for many calls of ``kdb.attribute`` and ``kdb.ingest``.

    ``model`` is a name (``kdb models`` lists them), a hub id, a folder or a .gguf file. ``device`` defaults to CUDA if
    available, else to the CPU. Raises kdb.errors.ModelError for a model that cannot be found or loaded.
    """
    from kdb.wording import python_words

    with python_words():
        from kdb.ingest.call import check_option
        from kdb.ingest.models import find, load

        check_option("dtype", dtype)
        check_option("quantize", quantize)
        source = find.find_model(str(model), name=name, revision=revision)
        return load.load_model(source, device=load.pick_device(device), dtype=dtype, quantize=quantize)


def attribute(
    model: str | Path | LoadedModel,
    prompt: str,
    answer: str,
    *,
    rival: str | None = None,
    corrupt: str | None = None,
    exact: bool = False,
    top_k: int = 100,
) -> PromptAttribution:
    """Attribute a model's answer to its layers, heads and neurons, in one prompt and without a warehouse.

    ``model`` is what ``load_model`` returned, or its argument. The answer's first token is explained; the prompt is
    used as it is, without a chat template. ``rival`` is another answer, whose logit is compared. Effects are those of
    replacing each head and layer by its value in the ``corrupt`` prompt, which has as many tokens, or else by zero.
    They are estimated (attribution patching); ``exact`` measures them as well, with a forward pass for each part.
    ``top_k`` is the number of neurons of each component. The frames of the result are Polars; scores and effects are in
    nats of log-probability, see docs/python.md.

    Raises kdb.errors.DatasetError for an answer or prompt that cannot be used, kdb.errors.ModelError for a model that
    cannot be taken apart.
    """
    from kdb.wording import python_words

    loaded = load_model(model) if isinstance(model, str | Path) else model
    with python_words():
        from kdb.ingest.attribution import one_prompt

        return one_prompt.attribute(loaded, prompt, answer, rival=rival, corrupt=corrupt, exact=exact, top_k=top_k)


def __getattr__(name: str) -> Any:
    """Return the version, or the package ``kdb.ingest``, which can be called, when they are first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("kdb-lm")
    if name == "ingest":
        from importlib import import_module

        return import_module("kdb.ingest")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names for completion, with those that are made when they are first asked for."""
    return sorted({*globals(), "ingest", "__version__"})
