"""Times the fused ops against other ways to the same numbers: `python benchmarks/ops.py [--repeat 3] [--compile]`; on a
GPU, by other means: `--device cuda`, see `ops_cuda.py`.

Sizes are those of the papers. Every row runs in a fresh process: one warm-up, 7 timed runs; loss = sum of the result,
gradients of features and prototypes; inputs uniform in [0, 1) from a seed. Peak memory is the growth of the resident
set from before the warm-up, but after a call on a tiny input, which pays for what libraries load on first use.
`--repeat` goes over all rows again and pools the runs: other load on the machine comes in spells. Then all ways of a
size take turns in one process, whose allocator has the memory that they want: fresh memory costs the others most.
Writes results/ops_cpu.json and .md beside this file (ops_cpu_2_threads with `--threads 2`).

- fused: `fgvczoo.ops.nearest_patch`.
- authors: the formulation of the authors' code (ProtoPNet: two convolutions, ReLU, max-pooling of the negative
  distance; ST-ProtoPNet: normalisation, convolution, max-pooling).
- compiled: `torch.compile` of that, with `--compile`.
- matmul: what one would write by hand: one matrix product and `amax`.
- product: the bare matrix product of all patches and prototypes, its result stored whole; no selection.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write
from timing import RUNS, TURNS, compare, timed, turns
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.ops import nearest_patch

Formula = Callable[[Tensor, Tensor], Tensor]  # features (B, D, H, W), prototypes (P, D, 1, 1) -> (B, P) or two of them


def log_similarity(distance: Tensor) -> Tensor:
    return torch.log((distance + 1) / (distance + 1e-4))


def pool(maps: Tensor) -> Tensor:
    return F.max_pool2d(maps, maps.shape[2:]).flatten(1)


def products(features: Tensor, prototypes: Tensor) -> Tensor:
    return prototypes.flatten(1) @ features.flatten(2)


def protopnet_authors(features: Tensor, prototypes: Tensor) -> Tensor:
    square = F.conv2d(features**2, torch.ones_like(prototypes))
    norm = (prototypes**2).sum((1, 2, 3)).view(-1, 1, 1)
    distance = F.relu(square + (norm - 2 * F.conv2d(features, prototypes)))
    return log_similarity(-pool(-distance))


def protopnet_matmul(features: Tensor, prototypes: Tensor) -> Tensor:
    half = products(features, prototypes) - features.flatten(2).square().sum(1, keepdim=True) / 2
    return log_similarity((prototypes.flatten(1).square().sum(1) - 2 * half.amax(2)).clamp_min(0))


def protopnet_fused(features: Tensor, prototypes: Tensor) -> Tensor:
    return nearest_patch(features, prototypes, "l2", activation="log")[2]


def prototree_authors(features: Tensor, prototypes: Tensor) -> Tensor:
    square = F.conv2d(features**2, torch.ones_like(prototypes))
    norm = (prototypes**2).sum((1, 2, 3)).view(-1, 1, 1)
    distance = torch.sqrt(torch.abs(square + norm - 2 * F.conv2d(features, prototypes)) + 1e-14)
    return torch.exp(pool(-distance))


def prototree_matmul(features: Tensor, prototypes: Tensor) -> Tensor:
    half = products(features, prototypes) - features.flatten(2).square().sum(1, keepdim=True) / 2
    distance = (prototypes.flatten(1).square().sum(1) - 2 * half.amax(2)).clamp_min(0)
    return torch.exp(-torch.sqrt(distance + 1e-14))


def prototree_fused(features: Tensor, prototypes: Tensor) -> Tensor:
    return nearest_patch(features, prototypes, "l2", activation="exp")[2]


def full_authors(features: Tensor, prototypes: Tensor) -> Tensor:
    return pool(F.relu(F.conv2d(F.normalize(features, dim=1), F.normalize(prototypes, dim=1))))


def full_matmul(features: Tensor, prototypes: Tensor) -> Tensor:
    return F.relu(products(F.normalize(features, dim=1), F.normalize(prototypes, dim=1)).amax(2))


def full_fused(features: Tensor, prototypes: Tensor) -> Tensor:
    return F.relu(nearest_patch(features, prototypes, "cosine")[0])


def cropped_authors(features: Tensor, prototypes: Tensor) -> Tensor:
    unit = F.normalize(prototypes, dim=1)
    return torch.stack([pool(F.conv2d(features, unit)), pool(F.conv2d(F.normalize(features, dim=1), unit))])


def cropped_matmul(features: Tensor, prototypes: Tensor) -> Tensor:
    projection = products(features, F.normalize(prototypes, dim=1))
    cosine = projection / features.flatten(2).norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.stack([projection.amax(2), cosine.amax(2)])


def cropped_fused(features: Tensor, prototypes: Tensor) -> Tensor:
    unit = F.normalize(prototypes.flatten(1), dim=1)
    return nearest_patch(features, unit, ("dot", "cosine"))[0]


FORMULAS: dict[str, dict[str, Formula]] = {
    "protopnet": {"fused": protopnet_fused, "authors": protopnet_authors, "matmul": protopnet_matmul},
    "prototree": {"fused": prototree_fused, "authors": prototree_authors, "matmul": prototree_matmul},
    "st-protopnet full": {"fused": full_fused, "authors": full_authors, "matmul": full_matmul},
    "st-protopnet cropped": {"fused": cropped_fused, "authors": cropped_authors, "matmul": cropped_matmul},
}


@dataclass(frozen=True)
class Size:
    """B images, P prototypes of D channels (in one branch), a map of `side` x `side` cells."""

    formula: str
    B: int
    P: int
    D: int
    side: int


SIZES = [
    Size("protopnet", 16, 2000, 128, 7),
    Size("protopnet", 16, 2000, 128, 14),
    Size("protopnet", 80, 2000, 128, 7),
    Size("st-protopnet full", 16, 1000, 64, 7),
    Size("st-protopnet full", 16, 1000, 64, 14),
    Size("st-protopnet full", 80, 1000, 64, 14),
    Size("st-protopnet cropped", 16, 1000, 64, 7),
    Size("st-protopnet cropped", 16, 1000, 64, 14),
    Size("st-protopnet cropped", 80, 1000, 64, 7),
]


def inputs(size: Size, backward: bool) -> tuple[Tensor, Tensor]:
    """Features (B, D, side, side) and prototypes (P, D, 1, 1)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((size.B, size.D, size.side, size.side), (size.P, size.D, 1, 1))
    features, prototypes = (torch.rand(shape, generator=generator).requires_grad_(backward) for shape in shapes)
    return features, prototypes


def step_of(size: Size, variant: str, backward: bool) -> Callable[[Tensor, Tensor], None]:
    """One step of a way: forward, and with `backward` the gradients of the result's sum."""
    name = "authors" if variant == "compiled" else variant
    formula = products if name == "product" else FORMULAS[size.formula][name]
    if variant == "compiled":
        formula = torch.compile(formula)

    def step(features: Tensor, prototypes: Tensor) -> None:
        features.grad = prototypes.grad = None
        result = formula(features, prototypes)
        if backward:
            result.sum().backward()

    return step


def measure(size: Size, variant: str, backward: bool, threads: int) -> dict[str, Any]:
    """One row: the 7 times in seconds and the peak extra memory in bytes. For a fresh process."""
    torch.set_num_threads(threads)
    step, given = step_of(size, variant, backward), inputs(size, backward)
    return timed(partial(step, *inputs(replace(size, B=1, P=2, side=2), backward)), partial(step, *given))


def take_turns(size: Size, variants: Sequence[str], backward: bool, threads: int) -> dict[str, float]:
    """Median seconds of each way when all of them take turns in one process, memory warm for all."""
    torch.set_num_threads(threads)
    given = inputs(size, backward)
    return turns({variant: partial(step_of(size, variant, backward), *given) for variant in variants})


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = f"{results['processor']}, {results['threads']} thread(s)"
    versions = f"torch {results['torch']}, Python {results['python']}"
    runs = f"median (best) of {RUNS * results['repeat']} runs"
    text = [
        f"# `nearest_patch`, {results['device']}",
        "",
        f"{machine}; {versions}; {runs}. Ratio and memory: forward / forward + backward; ratio = authors' over fused.",
        "",
        "| formula, B x P x D, map | way | forward, ms | forward + backward, ms | extra memory, MiB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rows in results["rows"]:
        size = Size(**rows["size"])
        label = f"{size.formula}, {size.B} x {size.P} x {size.D}, {size.side} x {size.side}"
        for variant, modes in rows["variants"].items():
            forward, both = modes["forward"], modes["forward+backward"]
            ratio = ""
            if variant == "fused":
                authors = rows["variants"]["authors"]
                ratio = " / ".join(f"{authors[mode]['median'] / modes[mode]['median']:.1f}" for mode in modes)
            cells = [f"{1e3 * m['median']:.1f} ({1e3 * m['best']:.1f})" for m in (forward, both)]
            memory = " / ".join(f"{m['memory'] / 2**20:.0f}" for m in (forward, both))
            text.append(f"| {label} | {variant} | {cells[0]} | {cells[1]} | {memory} | {ratio} |")
            label = ""
    text += [
        "",
        f"In one process, in turns; median of {TURNS}, ms; ratios to fused.",
        "",
        "| formula, B x P x D, map | step | fused | authors | matmul | product |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rows in results["turns"]:
        size, times = Size(**rows["size"]), rows["seconds"]
        cells = [f"{1e3 * times['fused']:.1f}"]
        for variant in ("authors", "matmul", "product"):
            cells.append(f"{1e3 * times[variant]:.1f} ({times[variant] / times['fused']:.2f})")
        label = f"{size.formula}, {size.B} x {size.P} x {size.D}, {size.side} x {size.side}"
        text.append(f"| {label} | {rows['mode']} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="times over all rows")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the authors' formulation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--checks", action="store_true", help="cuda: checks, nothing timed")
    parser.add_argument("--quick", action="store_true", help="cuda: checks, one size, a sweep of tiles")
    parser.add_argument("--sanitize", action="store_true", help="cuda: one small launch of every kernel, nothing timed")
    parser.add_argument("--limit", type=float, default=360, help="cuda: seconds after which no more is timed")
    options = parser.parse_args()
    if options.device == "cuda":
        import ops_cuda

        return ops_cuda.main(options)

    variants = ("fused", "authors", *(("compiled",) if options.compile else ()), "matmul", "product")
    ways = dict.fromkeys(SIZES, variants)
    results = compare(options.device, ways, measure, take_turns, options.threads, options.repeat)
    name = "ops_cpu" if options.threads == 1 else f"ops_cpu_{options.threads}_threads"
    write(options.out, name, results, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
