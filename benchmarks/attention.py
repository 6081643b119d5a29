"""Times `patch_attention` against other ways to the same numbers: `python benchmarks/attention.py [--repeat 3]
[--compile]`; on a GPU, by other means: `--device cuda`, see `attention_cuda.py`.

Sizes are MetaFormer's, with its relative bias and its gradient, and those of slot attention in Concept-Centric
Transformers. "bias": from one linear layer's queries, keys and values (B, N, 3, h, d) to the next layer's input (B, N,
h d). How times and memory are taken: see `ops.py`. Writes results/attention_cpu.json and .md beside this file
(attention_cpu_2_threads with `--threads 2`).

- fused: `fgvczoo.ops.patch_attention`.
- explicit: products, softmax and sums one after another, as the papers' formulas stand.
- compiled: `torch.compile` of that, with `--compile`.
- sdpa: `scaled_dot_product_attention` with the bias as its mask, which for the bias's gradient falls back to plain
  operations; not for slots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write
from timing import RUNS, TURNS, compare, timed, turns
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.ops import patch_attention

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """B images, h heads, queries and patches, d numbers each; of "bias" or "slots", in this type."""

    form: str
    B: int
    h: int
    queries: int
    patches: int
    d: int
    dtype: str = "float32"


def with_bias(B: int, patches: int, d: int, dtype: str) -> Size:
    return Size("bias", B, 8, patches, patches, d, dtype)


def slots(B: int, queries: int, patches: int, d: int, dtype: str = "float32") -> Size:
    return Size("slots", B, 1, queries, patches, d, dtype)


# MetaFormer sizes 0 and 1: stages 3 and 4 at 224 and 384 pixels, with the class token; CCT: ViT-L, ViT-T and ViT-S.
SIZES = [
    *(with_bias(8, n, d, dtype) for dtype in TYPES for n, d in ((197, 48), (50, 96), (577, 48), (145, 96))),
    slots(16, 95, 196, 1024),
    slots(64, 100, 196, 192),
    slots(32, 50, 196, 384),
]

Inputs = tuple[Tensor, ...]
Formula = Callable[..., Tensor]


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def joined(output: Tensor) -> Tensor:
    return output.transpose(1, 2).flatten(2)


def bias_fused(qkv: Tensor, bias: Tensor) -> Tensor:
    return joined(patch_attention(*heads(qkv), bias))


def bias_explicit(qkv: Tensor, bias: Tensor) -> Tensor:
    query, key, value = heads(qkv)
    scores = (query * query.shape[3] ** -0.5) @ key.mT + bias.to(query.dtype)
    return joined(scores.softmax(-1) @ value)


def bias_sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
    query, key, value = heads(qkv)
    return joined(F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype)[None]))


def slots_fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return patch_attention(query, key, value, normalize="queries")


def slots_explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shares = ((query * query.shape[2] ** -0.5) @ key.mT).softmax(-2) + 1e-8
    return (shares / shares.sum(-1, keepdim=True)) @ value


FORMULAS: dict[str, dict[str, Formula]] = {
    "bias": {"fused": bias_fused, "explicit": bias_explicit, "sdpa": bias_sdpa},
    "slots": {"fused": slots_fused, "explicit": slots_explicit},
}


def inputs(size: Size, backward: bool, device: str = "cpu", seed: int = 0) -> tuple[Inputs, Tensor]:
    """The inputs, and a gradient of the output."""
    generator, dtype = torch.Generator(device).manual_seed(seed), TYPES[size.dtype]

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if size.form == "bias":
        given = (
            random(size.B, size.patches, 3, size.h, size.d),
            random(size.h, size.queries, size.patches, dtype=torch.float32),
        )
    else:
        given = (random(size.B, size.queries, size.d), *(random(size.B, size.patches, size.d) for _ in range(2)))
    grad = random(size.B, size.queries, size.h * size.d)
    return tuple(tensor.requires_grad_(backward) for tensor in given), grad


def step_of(formula: Formula, backward: bool) -> Callable[[Inputs, Tensor], Any]:
    def step(given: Inputs, grad: Tensor) -> Any:
        if backward:
            return torch.autograd.grad(formula(*given), given, grad)
        with torch.no_grad():
            return formula(*given)

    return step


def way(size: Size, variant: str) -> Formula:
    formula = FORMULAS[size.form]["explicit" if variant == "compiled" else variant]
    return torch.compile(formula, dynamic=False) if variant == "compiled" else formula


def measure(size: Size, variant: str, backward: bool, threads: int) -> dict[str, Any]:
    """One row, for a fresh process."""
    torch.set_num_threads(threads)
    step, small = step_of(way(size, variant), backward), replace(size, B=1, queries=4, patches=4)
    return timed(partial(step, *inputs(small, backward)), partial(step, *inputs(size, backward)))


def take_turns(size: Size, variants: tuple[str, ...], backward: bool, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    given = inputs(size, backward)
    return turns({variant: partial(step_of(way(size, variant), backward), *given) for variant in variants})


def label(size: Size) -> str:
    count = f"{size.queries} x {size.patches}"
    return f"{size.form}, {size.B} x {size.h} x {count} x {size.d}, {size.dtype}"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = f"{results['processor']}, {results['threads']} thread(s)"
    versions = f"torch {results['torch']}, Python {results['python']}"
    runs = f"median (best) of {RUNS * results['repeat']} runs"
    text = [
        f"# `patch_attention`, {results['device']}",
        "",
        f"{machine}; {versions}; {runs}. Memory and ratios: forward / forward + backward; ratio = explicit over fused.",
        "",
        "| form, B x h x queries x patches x d | way | forward, ms | forward + backward, ms | memory, MiB | ratio of times | of memory |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rows in results["rows"]:
        first, explicit = label(Size(**rows["size"])), rows["variants"]["explicit"]
        for variant, modes in rows["variants"].items():
            cells = [f"{1e3 * m['median']:.1f} ({1e3 * m['best']:.1f})" for m in modes.values()]
            cells.append(" / ".join(f"{m['memory'] / 2**20:.0f}" for m in modes.values()))
            for key in ("median", "memory"):
                least = 2**20 if key == "memory" else 0  # what the system's pages resolve
                both = [(max(explicit[mode][key], least), max(modes[mode][key], least)) for mode in modes]
                ratio = " / ".join(f"{theirs / ours:.2f}" for theirs, ours in both)
                cells.append(ratio if variant == "fused" else "")
            text.append(f"| {first} | {variant} | {' | '.join(cells)} |")
            first = ""
    text += [
        "",
        f"In one process, in turns; median of {TURNS}, ms; ratios to fused.",
        "",
        "| form, B x h x queries x patches x d | step | fused | others |",
        "| --- | --- | --- | --- |",
    ]
    for rows in results["turns"]:
        times = dict(rows["seconds"])
        fused = times.pop("fused")
        others = ", ".join(f"{name} {1e3 * each:.1f} ({each / fused:.2f})" for name, each in times.items())
        text.append(f"| {label(Size(**rows['size']))} | {rows['mode']} | {1e3 * fused:.1f} | {others} |")
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="times over all rows")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the explicit formula")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--checks", action="store_true", help="cuda: checks, nothing timed")
    parser.add_argument("--tiles", action="store_true", help="cuda: the kernels one by one, with other blocks")
    parser.add_argument("--limit", type=float, default=150, help="cuda: seconds after which no more is timed")
    options = parser.parse_args()
    if options.device == "cuda":
        import attention_cuda

        return attention_cuda.main(options)

    more = ("compiled",) if options.compile else ()
    ways = {size: (*FORMULAS[size.form], *more) for size in SIZES}
    results = compare(options.device, ways, measure, take_turns, options.threads, options.repeat)
    name = "attention_cpu" if options.threads == 1 else f"attention_cpu_{options.threads}_threads"
    write(options.out, name, results, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
