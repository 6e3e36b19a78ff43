"""A small run whose numbers are given, committed as a measured one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdb.warehouse.manifest import RunFolder, run_id
from kdb.warehouse.store import Warehouse
from kdb.warehouse.vectors import activation_groups


def measure(folder: Path, *, model: str = "own", accuracy: float = 0.5, seed: int = 1, **row: Any) -> RunFolder:
    """A small run that was measured here: the rows of its tables say ``accuracy``."""
    import numpy as np

    lake = Warehouse.create(folder).storage
    identity = {"study": "concept", "model": model, "dataset": "d", "seed": seed}
    with lake.stage(run_id(identity), model, "d", identity=identity) as staged:
        staged.write_rows("models", "part", [{"revision": "r", "n_layers": 2, "hidden_size": 4}])
        staged.write_rows("datasets", "part", [{"study": "concept", "n_prompts": 4}])
        staged.write_rows("prompts", "part", [{"prompt_id": i, "text": f"t{i}", "label": i % 2} for i in range(4)])
        scores = [
            {"layer": i, "depth": i / 2, "site": "resid_post", "classifier": "logistic", "split": "paper"}
            | {"accuracy": accuracy, "n_test": 4, "is_default": True}
            for i in range(2)
        ]
        staged.write_rows("probe_scores", "part", scores)
        for part in range(2):
            vectors = np.ones((2, 2, 1, 4), dtype=np.float32)
            ids = [2 * part, 2 * part + 1]
            staged.write("activations", f"part-{part}", activation_groups(ids, ["resid_post"], vectors))
        staged.commit({"study": "concept", "variant": "default", "settings": json.dumps(identity), **row})
    return lake.find(run_id(identity))
