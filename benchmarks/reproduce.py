"""Trains a recipe and its baseline for several seeds and writes the comparison.

    python benchmarks/reproduce.py st-protopnet-synthbirds --seeds 3
    python benchmarks/reproduce.py st-protopnet-cub --data.root WHERE_CUB_IS

Writes benchmarks/results/RECIPE.json and .md: every seed's test metrics, mean and standard deviation, image passes,
time, top-1 of the mean probabilities of the first 3 and the first 5 seeds' models, and published numbers where the card
has them. Further options go to `fgvczoo fit` and `test` of both.
A seed whose run is finished is not trained again: an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write

from fgvczoo.files import write_text
from fgvczoo.models.ensemble import ProbabilityEnsemble
from fgvczoo.zoo.build import data_from_provenance
from fgvczoo.zoo.load import load
from fgvczoo.zoo.recipe import Recipe, read_recipe

ENSEMBLES = (3, 5)
# Metrics that are no shares.
PLAIN = ("test/path_length", "test/prototypes")


def train_and_test(recipe: Recipe, seed: int, runs: Path, options: list[str]) -> dict[str, Any]:
    """One seed: test metrics, seconds of training, image passes."""
    run = runs / f"{recipe.name}-seed{seed}"
    common = ["--config", str(recipe.path), "--run", str(run), "--seed_everything", str(seed), *options]
    record = run / "reproduce.json"
    if not record.exists():
        resume = ["--ckpt_path", "last"] if (run / "checkpoints" / "last.ckpt").exists() else []
        start = time.monotonic()
        fgvczoo("fit", *common, *resume)
        seconds = time.monotonic() - start
        fgvczoo("test", *common, "--ckpt_path", "last")
        metrics = {**fitted(run), **json.loads((run / "test.json").read_text())}
        provenance = json.loads((run / "weights" / "config.json").read_text())["provenance"]
        result = {
            "seed": seed,
            "metrics": metrics,
            "train_seconds": None if resume else round(seconds, 1),
            "epochs": provenance["epochs"],
            "dataset": provenance["dataset"],
        }
        write_text(record, json.dumps(result, indent=1) + "\n")
    return json.loads(record.read_text())


def fitted(run: Path) -> dict[str, float]:
    """Test metrics that the training logged itself: of the model before its last steps."""
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: float(row[name]) for row in rows for name in row if name.startswith("test/") and row[name]}


def ensembles(recipe: Recipe, seeds: int, runs: Path, options: list[str]) -> dict[str, float]:
    """Top-1 on the test images of the mean probabilities of several seeds' classifiers, by how many they are."""
    if recipe.card.task != "classification":
        return {}
    root = next((options[place + 1] for place, word in enumerate(options) if word == "--data.root"), None)
    found = {}
    for size in ENSEMBLES:
        if size <= seeds:
            models = [load(runs / f"{recipe.name}-seed{seed}") for seed in range(size)]
            if getattr(models[0], "metadata_groups", ()):
                return {}  # an ensemble is given pictures alone
            ensemble, hits, images = ProbabilityEnsemble(models).eval(), 0, 0
            for batch in data_from_provenance(models[0], root).loader("test"):
                with torch.inference_mode():
                    hits += int((ensemble(batch["image"]).argmax(1) == batch["label"]).sum())
                images += len(batch["label"])
            found[f"test/top1_{size}_models"] = hits / images
    return found


def fgvczoo(*args: str) -> None:
    """One command, as a user types it; stops everything when it fails."""
    print("fgvczoo", *args, flush=True)
    subprocess.run([sys.executable, "-m", "fgvczoo", *args], check=True)


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of the sample) of every metric over the seeds."""
    return {
        name: {
            "mean": statistics.mean(run["metrics"][name] for run in runs),
            "std": statistics.stdev(run["metrics"][name] for run in runs) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]["metrics"]
    }


def markdown(result: dict[str, Any], recipe: Recipe) -> str:
    """The table that docs show."""
    seeds = len(result["recipes"][recipe.name]["runs"])
    published = {f"test/{p.metric}": p for p in recipe.card.published if p.value is not None}
    lines = [
        f"# {recipe.name}",
        "",
        (
            f"Test metrics in percent on {result['dataset']}, mean ± standard deviation over {seeds} seed(s); numbers "
            "of prototypes and lengths of paths as they are; `top1_N_models`: the mean probabilities of N of them. "
            f"`{result['command']}` writes this file."
        ),
        "",
        "| recipe | metric | ours | published | epochs |",
        "|---|---|---|---|---|",
    ]
    for name, entry in result["recipes"].items():
        for metric, value in entry["summary"].items():
            unit = 1 if metric.startswith(PLAIN) else 100
            ours = f"{unit * value['mean']:.1f} ± {unit * value['std']:.1f}"
            lines.append(row(name, metric, ours, published if name == recipe.name else {}, entry))
        for metric, share in entry["ensembles"].items():
            lines.append(row(name, metric, f"{100 * share:.1f}", published if name == recipe.name else {}, entry))
    for each in published.values():
        lines += ["", f"Published {each.metric}: {each.source}; {each.note}."]
    lines += ["", f"{result['machine']}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()), ""]
    return "\n".join(lines)


def row(name: str, metric: str, ours: str, published: dict[str, Any], entry: dict[str, Any]) -> str:
    """A line of the table."""
    paper = f"{published[metric].value:g}" if metric in published else ""
    return f"| {name} | {metric.removeprefix('test/')} | {ours} | {paper} | {entry['runs'][0]['epochs']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    arguments, options = parser.parse_known_args()
    recipe = read_recipe(arguments.recipe)
    recipes = [recipe]
    while (baseline := recipes[-1].card.baseline) is not None:
        recipes.append(read_recipe(baseline))
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/reproduce.py", recipe.name, f"--seeds {arguments.seeds}", *options]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads",
        "versions": {name: version(name) for name in ("fgvczoo", "torch", "timm", "lightning")},
        "recipes": {},
    }
    for each in recipes:
        runs = [train_and_test(each, seed, arguments.runs, options) for seed in range(arguments.seeds)]
        result["recipes"][each.name] = {
            "runs": runs,
            "summary": summary(runs),
            "ensembles": ensembles(each, arguments.seeds, arguments.runs, options),
        }
    result["dataset"] = result["recipes"][recipe.name]["runs"][0]["dataset"]
    write(RESULTS, recipe.name, result, markdown(result, recipe))


if __name__ == "__main__":
    main()
