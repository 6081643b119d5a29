"""Scores the explanations of the runs that `benchmarks/reproduce.py` left, for each recipe given:

    python benchmarks/reproduce.py st-protopnet-synthbirds --seeds 3
    python benchmarks/reproduce.py protopnet-synthbirds --seeds 3
    python benchmarks/interpretability.py st-protopnet-synthbirds protopnet-synthbirds

Writes benchmarks/results/interpretability.json and .md: mean and standard deviation over the seeds. docs/metrics.md
defines the scores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write

from fgvczoo.explain.interpretability import interpretability
from fgvczoo.zoo.build import data_from_provenance
from fgvczoo.zoo.load import load

BETTER = {
    "content_heatmap": "higher",
    "oirr": "lower",
    "iou": "higher",
    "deletion_auc": "lower",
    "consistency": "higher",
    "stability": "higher",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for recipe in arguments.recipes:
        found[recipe] = []
        for run in sorted(arguments.runs.glob(f"{recipe}-seed*")):
            model = load(run)
            data = data_from_provenance(model, keys=["mask", "parts"])
            found[recipe].append({"run": run.name, **interpretability(model, data)})
            print(found[recipe][-1], flush=True)
    lines = [
        "# Explanations scored",
        "",
        "Mean ± standard deviation over the seeds, on the test images; consistency and stability in percent.",
        f"`python benchmarks/interpretability.py {' '.join(arguments.recipes)}` writes this file.",
        f"Torch {torch.__version__}.",
        "",
        "| score | better | " + " | ".join(f"{recipe} ({len(found[recipe])} seeds)" for recipe in found) + " |",
        "|---" * (2 + len(found)) + "|",
    ]
    for score, better in BETTER.items():
        cells = []
        for runs in found.values():
            values = [run[score] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3g} ± {spread:.2g}")
        lines.append(f"| {score} | {better} | " + " | ".join(cells) + " |")
    write(RESULTS, "interpretability", found, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
