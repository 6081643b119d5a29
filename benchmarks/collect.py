"""Takes what was measured into the package, where `fgvczoo info` reads it: `python benchmarks/collect.py`.

Reads results/RECIPE.json (`reproduce.py`) and results/memory_*.json (`memory.py`), counts parameters, and writes
fgvczoo/recipes/measured.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fgvczoo.files import write_text
from fgvczoo.zoo.build import build_model
from fgvczoo.zoo.info import MEASURED
from fgvczoo.zoo.recipe import list_recipes, read_recipe

RESULTS = Path(__file__).parent / "results"


def collect() -> dict[str, Any]:
    """Recipe -> parameters, test metrics (mean and standard deviation over seeds) and peak memory by device."""
    memories = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("memory_*.json"))]
    measured = {}
    for name in list_recipes():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(read_recipe(name)).parameters())
        peaks = [
            {
                "device": memory["device"],
                "torch": memory["torch"],
                **{key: row[key] for key in ("train_bytes", "train_batch", "predict_1_bytes", "predict_32_bytes")},
            }
            for memory in memories
            if (row := memory["recipes"].get(name)) is not None
        ]
        measured[name] = {"parameters": parameters, "metrics": metrics(name), "memory": peaks}
    return measured


def metrics(name: str) -> dict[str, Any]:
    """Those of the recipe's own comparison, else of the first one that it is a part of."""
    results = [path for path in sorted(RESULTS.glob("*-*.json")) if not path.name.startswith("memory_")]
    for path in sorted(results, key=lambda path: path.stem != name):
        entry = json.loads(path.read_text()).get("recipes", {}).get(name)
        if entry is not None:
            seeds = len(entry["runs"])
            return {
                metric.removeprefix("test/"): {**values, "seeds": seeds}
                for metric, values in entry["summary"].items()
                if not metric.startswith(("test/path_length", "test/prototypes"))  # `info` shows shares
            }
    return {}


if __name__ == "__main__":
    write_text(MEASURED, json.dumps(collect(), indent=1) + "\n")
    print(MEASURED.name, "written")
