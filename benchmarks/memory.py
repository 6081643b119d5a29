"""Peak memory of every recipe, and that it trains at all: `python benchmarks/memory.py [--device cuda] [RECIPE...]`.

Each recipe runs as a user's command does: `fgvczoo fit` for two steps of its widest stage at its own batch size, its
projection where it has one, one step of its last stage, then `predict` of one picture and of a batch. The pictures are
SynthBirds with as many classes as the recipe is for; weights start at random. On a GPU the peak is what torch's
allocator held for tensors, on the CPU the growth of the resident set (the libraries themselves come on top). Writes
results/memory_DEVICE.json and .md; `benchmarks/collect.py` takes it into the package, where `fgvczoo info` reads it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fgvczoo.files import write_text
from fgvczoo.zoo.recipe import Recipe, list_recipes, read_recipe

RESULTS = Path(__file__).parent / "results"


class Peak:
    """The peak of memory since `reset`, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._status("VmRSS")

    def bytes(self) -> int:
        import torch

        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(0, self._status("VmHWM") - self._before)

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def short_plan(recipe: Recipe) -> list[Any]:
    """The stage that trains the most groups, with the actions of the plan, and the last stage: one epoch each."""
    arguments = recipe.config["model"]["init_args"]
    stages, plan = arguments.get("stages"), arguments.get("plan")
    if not stages or not plan:
        from fgvczoo.zoo.build import build_model

        model = build_model(recipe)
        stages = {name: {"groups": stage.groups} for name, stage in model.plan.stages.items()}
        plan = model._plan_entries
    names = [next(iter(entry)) for entry in plan if isinstance(entry, dict)]
    widest = max(
        dict.fromkeys(names), key=lambda name: ("backbone" in stages[name]["groups"], len(stages[name]["groups"]))
    )
    actions = list(dict.fromkeys(entry for entry in plan if isinstance(entry, str)))
    return [{widest: 1}, *actions, *([{names[-1]: 1}] if names[-1] != widest else [])]


def measure(name: str, device: str, root: str, folder: str) -> dict[str, Any]:
    """One recipe, in a fresh process: its training starts from the memory that imports take."""
    import torch

    from fgvczoo.cli import main
    from fgvczoo.zoo.load import load

    recipe = read_recipe(name)
    arguments, data = recipe.config["model"]["init_args"], recipe.config["data"]["init_args"]
    run = Path(folder) / name
    options: dict[str, Any] = {
        "--config": name,
        "--run": run,
        "--data": "cub",
        "--data.root": root,
        "--data.num_workers": 0 if device == "cpu" else 8,
        "--model.plan": json.dumps(short_plan(recipe)),
        "--trainer.accelerator": "gpu" if device == "cuda" else "cpu",
        "--trainer.limit_train_batches": 2,
        "--trainer.enable_progress_bar": "false",
    }
    if arguments.get("backbone_weights"):
        options["--model.backbone_weights"] = "null"
    peak = Peak(device)
    peak.reset()
    start = time.monotonic()
    if main(["fit", *(str(word) for pair in options.items() for word in pair)]) != 0:
        raise RuntimeError("does not train")
    result: dict[str, Any] = {"train_bytes": peak.bytes(), "train_batch": data["batch_size"]}
    result["seconds"] = round(time.monotonic() - start, 1)
    model = load(run).to(device)
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    picture = torch.rand(3, *model.preprocess.size)
    for batch in (1, 32):
        peak.reset()
        model.predict([picture] * batch)
        result[f"predict_{batch}_bytes"] = peak.bytes()
    shutil.rmtree(run)
    return result


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"# Peak memory, {results['device']}",
        "",
        f"MiB; torch {results['torch']}. `{results['command']}` writes this file.",
        "",
        "| recipe | parameters, M | training (batch) | predicting 1 | predicting 32 |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["recipes"].items():
        train = f"{row['train_bytes'] / 2**20:.0f} ({row['train_batch']})"
        predict = " | ".join(f"{row[f'predict_{batch}_bytes'] / 2**20:.0f}" for batch in (1, 32))
        lines.append(f"| {name} | {row['parameters'] / 1e6:.1f} | {train} | {predict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="globs; default: all, on the CPU those of SynthBirds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time; memory is counted for each process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    globs = options.recipes or (["*"] if options.device == "cuda" else ["*-synthbirds"])
    names = sorted({name for glob in globs for name in list_recipes(glob)})

    import torch

    from fgvczoo.data.synthbirds import Size, make

    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "command": " ".join(["python benchmarks/memory.py", f"--device {options.device}", *options.recipes]),
        "recipes": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh,
    ):
        runs = {}
        for name in names:
            classes, data = read_recipe(name).card.num_classes, read_recipe(name).config["data"]["init_args"]
            images = -(-2 * data["batch_size"] // classes)
            if data.get("protocol") == "metric-learning":  # trains on half of the classes
                classes *= 2
            size = Size(pairs=classes // 2, train_per_class=max(2, images), test_per_class=1)
            root = make(Path(folder) / f"birds-{classes}-{size.train_per_class}", size, progress=False)
            runs[fresh.submit(measure, name, options.device, str(root), folder)] = name
        for run in as_completed(runs):
            name = runs[run]
            try:
                found = run.result()
            except RuntimeError as error:
                failed.append(f"{name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            print(name, json.dumps(found), file=sys.stderr, flush=True)
            results["recipes"] = dict(sorted({**results["recipes"], name: found}.items()))
            write_text(options.out / f"memory_{options.device}.json", json.dumps(results, indent=1) + "\n")
            write_text(options.out / f"memory_{options.device}.md", markdown(results))
    print(markdown(results))
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
