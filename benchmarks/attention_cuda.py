"""`patch_attention` on a GPU, for `benchmarks/attention.py --device cuda`: first right, then timed.

1. Checks against float64 of what the kernels are given, every precision, forward and all gradients: PASS or FAIL.
2. Times by CUDA graph ("gpu") and from Python ("wall"), and peak memory, as `ops_cuda.py` takes them, of all rivals:
   the explicit formula, `torch.compile` of it, `scaled_dot_product_attention` on each of its backends, FlexAttention.

Needs torch, triton and numpy only: `PYTHONPATH=. python3 benchmarks/attention.py --device cuda`. Writes
results/attention_cuda.json and .md. `--checks`: the checks alone. `--tiles`: the kernels one by one, with other blocks;
writes attention_cuda_tiles.json. `--limit SECONDS`: stops in good time and writes what there is.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from attention import FORMULAS, TYPES, Formula, Size, heads, inputs, joined, label, slots, step_of, with_bias
from ops_cuda import DEVICE, HEAD, MODES, Check, run_checks, settings, table, timed
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fgvczoo.ops import patch_attention, use_backend
from fgvczoo.ops.patch_attention import reference

BF16, FP16 = torch.bfloat16, torch.float16

# -- 1. checks --------------------------------------------------------------------------------------------------------

# name: precision of float32 products, type of the inputs, error of results and of gradients (of their norm)
PRECISIONS: dict[str, tuple[str, torch.dtype, float, float]] = {
    "highest": ("highest", torch.float32, 2e-6, 1e-5),
    "high": ("high", torch.float32, 2e-3, 4e-3),
    "bf16": ("highest", BF16, 6e-3, 2e-2),
    "fp16": ("highest", FP16, 1e-3, 3e-3),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def kernel(*tensors: Tensor | None, normalize: str) -> Tensor:
    """Our kernels, also where `patch_attention` would call torch's."""
    query, key, value, bias = tensors
    return torch.ops.fgvczoo.patch_attention(query, key, value, bias, query.shape[3] ** -0.5, normalize, True)[0]


def against64(
    name: str, precision: str, normalize: str, sizes: tuple[int, ...], bias: bool = True, function: Any = kernel
) -> Iterator[Check]:
    """Output and gradients of one call against float64 of the same inputs. sizes: B, h, queries, patches, d, e."""
    setting, dtype, bound, gradient_bound = PRECISIONS[precision]
    B, h, queries, patches, d, e = sizes
    shapes = ((B, queries, h, d), (B, patches, h, d), (B, patches, h, e))
    given = [random(*shape, seed=n).transpose(1, 2).to(dtype) for n, shape in enumerate(shapes)]
    given += [random(h, queries, patches, seed=3)] if bias else []
    given = [tensor.detach().requires_grad_() for tensor in given]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    with settings(setting):
        output = function(*given, *([] if bias else [None]), normalize=normalize)
        grad = random(*output.shape, seed=4)
        found = torch.autograd.grad(output, given, grad.to(output.dtype))
    truth, _ = reference.attend(*exact[:3], exact[3] if bias else None, d**-0.5, normalize)
    truths = torch.autograd.grad(truth, exact, grad.to(output.dtype).double())
    for what, ours, theirs, limit in zip(
        ("output", "query", "key", "value", "bias"),
        (output, *found),
        (truth, *truths),
        (bound, *[gradient_bound] * 4),
    ):
        norm = theirs.detach().norm().clamp_min(1e-2)  # with one patch, some gradients are nothing but rounding
        error = float((ours.detach().double() - theirs.detach()).norm() / norm)
        good = error <= limit and bool(ours.isfinite().all())
        yield f"{name}, {precision}: {what}", good, f"{error:.1e} of the norm, may be {limit:.0e}"


def checks() -> Iterator[Check]:
    """All of them; each (what, passed, detail)."""
    for precision in PRECISIONS:
        yield from against64("stage 3", precision, "patches", (5, 8, 197, 197, 48, 48))
        yield from against64("stage 4, size 2", precision, "patches", (3, 8, 82, 82, 128, 128))
        yield from against64("slots", precision, "queries", (4, 1, 95, 196, 192, 192), bias=False)
    for precision in ("highest", "bf16"):
        yield from against64("no bias", precision, "patches", (2, 3, 70, 90, 20, 36), bias=False)
        yield from against64("one of each", precision, "patches", (2, 1, 1, 1, 1, 1))
        yield from against64("slots with a bias", precision, "queries", (3, 2, 13, 70, 33, 20))
        yield from against64("200 slots", precision, "queries", (2, 1, 200, 49, 1536, 1536), bias=False)
    yield from against64("384 px", "bf16", "patches", (2, 8, 609, 609, 64, 64))
    yield from against64("as dispatched", "bf16", "patches", (2, 8, 197, 197, 48, 48), False, patch_attention)
    yield from behaviour()


def behaviour() -> Iterator[Check]:
    """What is not finite, masks, layouts, determinism, synchronisation, graphs, compilation."""
    problem = [random(4, 3, 70, 24, seed=n) for n in range(3)] + [random(3, 70, 70, seed=3)]
    for normalize in ("patches", "queries"):
        for which in range(4):
            broken = [tensor.clone() for tensor in problem]
            broken[which][(0,) * broken[which].ndim] = float("nan")
            truth = reference.attend(*broken, 0.2, normalize)[0]
            ours = torch.ops.fgvczoo.patch_attention(*broken, 0.2, normalize, False)[0]
            yield f"{normalize}: NaN in, NaN out, input {which}", torch.equal(ours.isnan(), truth.isnan()), ""
        masked = [tensor.clone().requires_grad_() for tensor in problem[:3]] + [problem[3].clone()]
        masked[3][1, 2], masked[3][:, :, 5] = float("-inf"), float("-inf")
        masked[3].requires_grad_()
        output = kernel(*masked, normalize=normalize)
        found = [output, *torch.autograd.grad(output.sum(), masked)]
        exact = [tensor.detach().double().requires_grad_() for tensor in masked]
        truth = reference.attend(*exact, 24**-0.5, normalize)[0]
        truths = [truth, *torch.autograd.grad(truth.sum(), exact)]
        error = max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(found, truths))
        yield f"{normalize}: fully masked rows", error < 1e-4, f"{error:.1e}"

        def step(normalize: str = normalize) -> list[Tensor]:
            leaves = [tensor.detach().requires_grad_() for tensor in problem]
            output = patch_attention(*leaves, normalize=normalize)
            return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]

        first = step()
        same = all(all(map(torch.equal, first, step())) for _ in range(5))
        yield f"{normalize}: the same bits five times", same, ""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            yield f"{normalize}: no synchronisation", True, ""
        except RuntimeError as error_:
            yield f"{normalize}: no synchronisation", False, str(error_).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        graph.replay()
        yield f"{normalize}: a CUDA graph replays the same bits", all(map(torch.equal, first, results)), ""

        def doubled(*tensors: Tensor, normalize: str = normalize) -> Tensor:
            return patch_attention(*tensors, normalize=normalize) * 2

        leaves = [tensor.detach().requires_grad_() for tensor in problem]
        torch._dynamo.reset()
        compiled = torch.compile(doubled, fullgraph=True)
        gradients = [torch.autograd.grad(run(*leaves).square().sum(), leaves) for run in (doubled, compiled)]
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients))
        yield f"{normalize}: torch.compile(fullgraph=True)", error < 1e-4, f"{error:.1e}"
        arguments = (*(tensor[:, :, :5] for tensor in leaves[:3]), leaves[3][:, :5, :5], 0.2, normalize, True)
        torch.library.opcheck(torch.ops.fgvczoo.patch_attention.default, arguments)
        yield f"{normalize}: opcheck", True, ""
    with torch.autocast("cuda", BF16):
        yield "autocast", patch_attention(*problem).dtype == BF16, ""
    only_bias = patch_attention(*(t.to(BF16) for t in problem[:3]), problem[3].clone().requires_grad_())
    yield "only the bias trained", only_bias.requires_grad, ""
    mask = problem[3].clone()
    mask[1, 2] = float("-inf")
    yield "torch's attention: fully masked rows are 0", not patch_attention(*problem[:3], mask)[:, 1, 2].any(), ""
    empty = patch_attention(problem[0][:0], problem[1][:0], problem[2][:0], problem[3].clone().requires_grad_())
    yield "no images", empty.shape == (0, 3, 70, 24), ""


# -- 2. times ---------------------------------------------------------------------------------------------------------

# MetaFormer's stages at 224 and 384 pixels, and size 2 with 32 words; CCT's ViT-L, ViT-T and ViT-S.
SIZES = [
    with_bias(64, 197, 48, "bfloat16"),
    slots(64, 95, 196, 1024, "bfloat16"),
    with_bias(64, 50, 96, "bfloat16"),
    with_bias(32, 577, 48, "bfloat16"),
    slots(64, 100, 196, 192, "bfloat16"),
    with_bias(32, 609, 64, "bfloat16"),
    with_bias(64, 197, 48, "float32"),
    slots(64, 95, 196, 1024, "float32"),
    with_bias(32, 145, 96, "bfloat16"),
    slots(64, 50, 196, 384, "bfloat16"),
]


def bias_backend(backend: SDPBackend) -> Formula:
    def formula(qkv: Tensor, bias: Tensor) -> Tensor:
        query, key, value = heads(qkv)
        with sdpa_kernel(backend):
            mask = bias.to(query.dtype)[None].expand(len(query), -1, -1, -1)
            return joined(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))

    return formula


def bias_flex(qkv: Tensor, bias: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def add(score: Tensor, image: Tensor, head: Tensor, query: Tensor, patch: Tensor) -> Tensor:
        return score + bias[head, query, patch]

    return joined(flex_attention(*heads(qkv), score_mod=add))


def ways(size: Size) -> dict[str, tuple[Formula, bool]]:
    """By name: a formula, and whether to compile it."""
    own = FORMULAS[size.form]
    found = {"fused": (own["fused"], False), "explicit": (own["explicit"], False), "compiled": (own["explicit"], True)}
    if size.form == "bias":
        for name in ("MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            found[f"sdpa {name.split('_')[0].lower()}"] = (bias_backend(getattr(SDPBackend, name)), False)
        found["flex, compiled"] = (bias_flex, True)
    return found


def time_all(deadline: float) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        row: dict[str, Any] = {"size": asdict(size), "ways": {}}
        rows.append(row)
        item = TYPES[size.dtype].itemsize
        many = min(12, max(2, int(128e6 / (3 * size.B * size.patches * size.h * size.d * item)) + 1))
        for name, (formula, is_compiled) in ways(size).items():
            if is_compiled:
                torch._dynamo.reset()
                formula = torch.compile(formula, dynamic=False)
            for mode, backward in MODES.items():
                place = row["ways"].setdefault(name, {})
                if time.monotonic() > deadline:
                    place[mode] = {"left out": "out of time"}
                    continue
                sets = [inputs(size, backward, "cuda", seed) for seed in range(many)]
                try:
                    # float32 as it is trained on such GPUs: in tf32
                    with settings("high" if size.dtype == "float32" else "highest"):
                        place[mode] = timed(step_of(formula, backward), sets, 0.04)
                except Exception as error:
                    place[mode] = {"left out": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                torch.cuda.empty_cache()
        print("\n".join(table([row], lambda size: label(Size(**size)))), flush=True)
    return rows


def speedups(rows: list[dict[str, Any]]) -> list[str]:
    """How many times as long as the fused op each way takes on the GPU, forward and backward."""
    lines = ["| size | explicit | best other |", "| --- | --- | --- |"]
    for row in rows:
        times = {name: modes["forward+backward"].get("gpu") for name, modes in row["ways"].items()}
        fused = times.get("fused")
        others = {name: seconds for name, seconds in times.items() if seconds and name != "fused"}
        if fused and others:
            best = min(others, key=lambda name: others[name])
            explicit = f"{times['explicit'] / fused:.2f}" if times.get("explicit") else ""
            lines.append(f"| {label(Size(**row['size']))} | {explicit} | {others[best] / fused:.2f} ({best}) |")
    return lines


# -- 3. blocks --------------------------------------------------------------------------------------------------------

# kernel -> (queries, patches, depth, warps, stages) to try; competing queries are all in one block
OF_PATCHES = {
    "attend": [(64, 32, 64, 4, 2), (64, 32, 64, 4, 3), (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (128, 32, 64, 4, 3)],
    "patch_gradient": [(32, 64, 64, 4, 1), (64, 64, 64, 4, 1), (32, 64, 64, 4, 2), (16, 64, 64, 4, 2)],
    "query_gradient": [(128, 64, 64, 4, 2), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 2)],
}
OF_QUERIES = {
    "compete": [(0, 64, 64, 4, 3), (0, 64, 64, 8, 3), (0, 64, 128, 4, 2), (0, 64, 64, 4, 2), (0, 32, 64, 4, 2)],
    "compete_gradient": [(0, 64, 64, 4, 3), (0, 64, 128, 4, 2), (0, 64, 64, 4, 2), (0, 32, 64, 4, 2)],
}


def kernel_seconds(step: Callable[..., Any], given: tuple[Any, ...], runs: int = 8) -> dict[str, float]:
    """Seconds of each kernel in a call, by name, as the profiler has them."""
    for _ in range(2):
        step(*given)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            step(*given)
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:60]] = found.get(event.name[:60], 0.0) + 1e-6 * event.device_time / runs
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def tiles() -> list[dict[str, Any]]:
    """All kernels of a step with the blocks of the table, and each of ours with others."""
    from fgvczoo.ops.patch_attention import triton as gpu

    chosen, rows = gpu.choose, []
    for size in SIZES:
        step = step_of(FORMULAS[size.form]["fused"], True)
        given = inputs(size, True, "cuda")
        with settings("high" if size.dtype == "float32" else "highest"):
            row: dict[str, Any] = {"size": asdict(size), "kernels": kernel_seconds(step, given), "tried": {}}
            for kernel, candidates in (OF_PATCHES if size.form == "bias" else OF_QUERIES).items():
                for block in map(gpu.Blocks._make, candidates):

                    def choose(name: str, dtype: torch.dtype, shape: Any, kernel: str = kernel, b: Any = block) -> Any:
                        usual = chosen(name, dtype, shape)
                        return b._replace(queries=b.queries or usual.queries) if name == kernel else usual

                    gpu.choose = choose
                    try:
                        found: Any = kernel_seconds(step, given).get(kernel)
                    except Exception as error:  # too much memory or too many registers
                        found = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                    finally:
                        gpu.choose = chosen
                    row["tried"].setdefault(kernel, {})[str(tuple(block[:5]))] = found
        print(label(size), json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main(options: Namespace) -> int:
    if options.checks:
        return int(not all(check["passed"] for check in run_checks(checks)))
    began = time.monotonic()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiles:
        with use_backend("auto"):
            results["rows"] = tiles()
        (options.out / "attention_cuda_tiles.json").write_text(json.dumps(results, indent=1) + "\n")
        return 0

    def part(title: str, call: Callable[[], Any]) -> None:
        results[title] = call()
        results["seconds"] = time.monotonic() - began
        (options.out / "attention_cuda.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{title}: done after {results['seconds']:.0f} s", flush=True)

    part("checks", lambda: run_checks(checks))
    with use_backend("auto"):
        part("rows", lambda: time_all(began + options.limit))
    lines = ["# `patch_attention`, cuda", ""]
    lines += [
        f"{results['device']}; torch {results['torch']}, Triton {results['triton']}. B x h x queries x patches x d."
    ]
    lines += ["", *HEAD, *table(results["rows"], lambda size: label(Size(**size))), "", *speedups(results["rows"]), ""]
    (options.out / "attention_cuda.md").write_text("\n".join(lines))
    print("\n".join(lines))
    return int(not all(check["passed"] for check in results["checks"]))
