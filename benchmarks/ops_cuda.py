"""`nearest_patch` on a GPU, for `benchmarks/ops.py --device cuda`: first right, then timed.

1. Checks against float64, every precision, forward and both gradients: PASS or FAIL with the error found.
2. Ceilings measured on the spot: device copy, matrix products in bf16, tf32 and float32.
3. Times. "gpu": a CUDA graph of the step on several sets of inputs, together larger than the cache, replayed; median.
   "wall": the same calls from Python, one after another. Peak memory: what the allocator hands out during one call.

Needs torch, triton and numpy only: `PYTHONPATH=. python3 benchmarks/ops.py --device cuda`. `--quick`: the checks, the
size B=80, P=2000, D=128, 14 x 14, its kernels one by one, and a sweep of tiles. `--sanitize`: one small launch of every
kernel, for `compute-sanitizer`. `--limit SECONDS`: stops in good time and writes what there is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import statistics
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ops import FORMULAS, Formula, Size
from torch import Tensor

from fgvczoo.ops import nearest_patch, use_backend
from fgvczoo.ops.nearest_patch import reference

DEVICE = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16

# -- how float32 is multiplied ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def settings(
    precision: str = "highest", half: torch.dtype | None = None, tf32_convolutions: bool = True
) -> Iterator[None]:
    """torch's settings for a way: precision of float32 products, autocast's type, cuDNN's tf32 (on unless told)."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32_convolutions
    cast = torch.autocast("cuda", half, cache_enabled=False) if half else contextlib.nullcontext()
    try:
        with cast:
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


# -- 1. checks --------------------------------------------------------------------------------------------------------

Check = tuple[str, bool, str]

# name: settings, type of the inputs, type that is multiplied (None: not rounded), tolerance of values (of the scale)
PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype, torch.dtype | None, float]] = {
    "highest": ({}, torch.float32, None, 2e-6),
    "high": ({"precision": "high"}, torch.float32, None, 1e-5),
    "medium": ({"precision": "medium"}, torch.float32, BF16, 2e-6),
    "autocast bf16": ({"half": BF16}, torch.float32, BF16, 2e-6),
    "bf16 inputs": ({}, BF16, BF16, 2e-6),
    "fp16 inputs": ({}, FP16, FP16, 2e-6),
}


def maps64(patches: Tensor, prototypes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """All pairs in float64 (B, N, P), the larger the better, and the scale of each number's rounding."""
    rows, vectors = reference.rows_and_vectors(patches.double(), prototypes.double(), metric)
    product = rows @ vectors.mT
    x2, p2 = rows.square().sum(2, keepdim=True), vectors.square().sum(1)
    if metric == "l2":
        return 2 * product - x2 - p2, x2 + p2
    return product, (x2 * p2).sqrt() + 1e-30


def against64(
    name: str,
    precision: str,
    patches: Tensor,
    prototypes: Tensor,
    metric: str | tuple[str, str] = "l2",
    k: int | None = None,
    activation: str | None = None,
) -> Iterator[Check]:
    """Values, winners and gradients of one call against float64 of the vectors as they are rounded."""
    context, given, rounded, tolerance = PRECISIONS[precision]
    patches, prototypes = (t.detach().to(given).requires_grad_() for t in (patches, prototypes))
    options = {"activation": activation} if activation else {}
    with settings(**context):
        results = nearest_patch(patches, prototypes, metric, k=k, **options)
    metrics = [metric] if isinstance(metric, str) else list(metric)
    shape = (len(metrics), len(patches), len(prototypes), k or 1)
    value, index = results[0].detach().view(shape), results[1].view(shape)
    exact = [t.detach().to(rounded or t.dtype).double().requires_grad_() for t in (patches, prototypes)]
    windows = exact[1] if prototypes.ndim == 4 else exact[1][..., None, None]
    worst, regret, agreed, chosen = 0.0, 0.0, 1.0, []
    for number, one in enumerate(metrics):
        score, scale = maps64(exact[0], windows, one)
        best = score.sort(dim=1, descending=True, stable=True)
        at = index[number].transpose(1, 2)  # (B, k, P)
        size = scale.gather(1, at)
        ours = score.gather(1, at)
        truth = best.values[:, : k or 1].detach()
        sign = -1 if one == "l2" else 1
        worst = max(worst, float(((sign * value[number].transpose(1, 2) - truth).abs() / size.detach()).max()))
        regret = max(regret, float(((truth - ours.detach()) / size.detach()).max()))
        agreed = min(agreed, float((at == best.indices[:, : k or 1]).double().mean()))
        chosen.append(sign * ours.transpose(1, 2))
    picked = torch.stack(chosen).view(results[0].shape)
    label = f"{name}, {precision}"
    yield f"{label}: values", worst <= tolerance, f"{worst:.1e} of the scale, may be {tolerance:.0e}"
    yield f"{label}: winners", regret <= tolerance, f"worse by {regret:.1e}; {100 * agreed:.2f} % as in float64"
    outputs, truths = [results[0]], [picked]
    if activation:
        outputs.append(results[2])
        truths.append(reference.activate(picked.clamp_min(0), activation))
        error = float((results[2] - truths[1]).detach().abs().max())
        yield f"{label}: activated", error <= 1e-3, f"{error:.1e}"
    grads = [torch.randn(o.shape, device=DEVICE, generator=generator()) for o in outputs]
    if activation:
        grads[1] = grads[1] * 1e-3  # its slope is steep
    with settings(**context):
        ours = torch.autograd.grad(outputs, (patches, prototypes), grads)
    theirs = torch.autograd.grad(truths, exact, [g.double() for g in grads])
    for what, mine, truth in zip(("patches", "prototypes"), ours, theirs):
        bound = 5e-3 if mine.dtype != torch.float32 else 2e-5
        error = float((mine.double() - truth).norm() / truth.norm().clamp_min(1e-30))
        yield f"{label}: gradient of {what}", error <= bound and bool(mine.isfinite().all()), f"{error:.1e}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, device=DEVICE, generator=generator(seed))


def checks() -> Iterator[Check]:
    """All of them; each (what, passed, detail)."""
    small, count = random(3, 20, 7, 7), random(70, 20, seed=1)
    large, many = random(2, 128, 14, 14), random(300, 128, seed=1)
    for precision in PRECISIONS:
        yield from against64("l2, 14 x 14", precision, large, many)
        if precision in ("highest", "high", "bf16 inputs"):
            yield from against64("l2, 7 x 7", precision, small, count)
            yield from against64("cosine", precision, large - 0.5, many - 0.5, "cosine")
            yield from against64("windows 2 x 3", precision, random(2, 40, 6, 9), random(33, 40, 2, 3, seed=1))
    yield from against64("dot", "highest", large - 0.5, many - 0.5, "dot")
    yield from against64("dot and cosine", "autocast bf16", large - 0.5, many - 0.5, ("dot", "cosine"))
    yield from against64("3 best", "highest", small, count, k=3)
    yield from against64("3 best, exp", "autocast bf16", small / 4, count / 4, k=3, activation="exp")
    yield from against64("log", "high", large, many, activation="log")
    yield from against64("D = 200, 9 x 5", "bf16 inputs", random(2, 200, 9, 5), random(33, 200, seed=1))
    yield from against64("D = 512", "autocast bf16", random(2, 512, 6, 6), random(130, 512, seed=1))
    yield from against64("D = 512", "high", random(2, 512, 6, 6), random(130, 512, seed=1))
    yield from against64("one of everything", "highest", random(1, 1, 1, 1), random(1, 1, seed=1))
    yield from against64("many winners sorted", "highest", small, random(2000, 20, seed=1), k=3)
    yield from near_zero()
    yield from ties_and_nan()
    yield from behaviour()


def near_zero() -> Iterator[Check]:
    """Prototypes that are patches, or nearly so."""
    patches = random(2, 128, 14, 14)
    copies = patches[1].flatten(1).T.contiguous()
    near = (patches[0].flatten(1).T.repeat(10, 1) + 1e-2 * random(1960, 128, seed=2)).contiguous()
    centre = random(1, 128, 1, 1, seed=3)
    clustered = centre + 5e-2 * random(4, 128, 14, 14, seed=4)
    close = (centre + 5e-2 * random(1, 128, 1000, 1, seed=5))[0, :, :, 0].T.contiguous()
    for precision, (context, given, rounded, _) in PRECISIONS.items():
        x, p = patches[1:].to(given).requires_grad_(), copies.to(given).requires_grad_()
        with settings(**context):
            value, index, log = nearest_patch(x, p, "l2", activation="log")
            gradients = torch.autograd.grad(log.sum(), (x, p))
        own = torch.arange(196, device=DEVICE)
        error = float((value[0] / p.detach().double().square().sum(1)).max())
        yield f"copies are at distance 0, {precision}", error <= 1e-6, f"{error:.1e} of the squared norm"
        exact = p if rounded is None else p.to(rounded)  # rounding may make two patches equal
        same = exact[index[0]] == exact[own]
        yield f"copies are found, {precision}", bool(same.all()), f"{float(same.all(1).double().mean()):.3f}"
        most = max(float(g.abs().max()) for g in gradients)
        yield f"no gradient at distance 0, {precision}", most == 0, f"{most:.1e}"
        for name, x, p in (("near-duplicates", patches, near), ("clustered patches", clustered, close)):
            x, p = x.to(given), p.to(given)
            with settings(**context):
                index = nearest_patch(x, p)[1]
            with use_backend("reference"):
                if rounded is not None:
                    x, p = x.to(rounded), p.to(rounded)
                theirs = nearest_patch(x.float(), p.float())[1]
                truth = nearest_patch(x.double(), p.double())[1]
            wrong, wrong_there = int((index != truth).sum()), int((theirs != truth).sum())
            # In half precision both see the same rounded vectors. Three bf16 products round 5 times as much as float32.
            allowed = 2 + (10 if precision == "high" else 1.5) * wrong_there
            detail = f"{wrong} of {truth.numel()} other winners than float64; the reference {wrong_there}"
            yield f"{name}, {precision}", wrong <= allowed, detail


def ties_and_nan() -> Iterator[Check]:
    for precision, (context, given, _, _) in PRECISIONS.items():
        constant = random(2, 128, 1, 1).expand(2, 128, 14, 14).to(given)
        with settings(**context):
            found = [
                nearest_patch(constant, random(n, 128, seed=n).to(given), m)[1]
                for n in (1, 300)
                for m in ("l2", "cosine")
            ]
        yield f"equal patches give the first, {precision}", not any(i.any() for i in found), ""
    patches, prototypes = random(3, 20, 7, 7), random(70, 20, seed=1)
    for bad in (float("nan"), float("inf")):
        x, p = patches.clone(), prototypes.clone()
        x[1, 2, 6, 6] = p[30, 0] = bad
        expected = torch.zeros(3, 70, dtype=torch.bool, device=DEVICE)
        expected[1], expected[:, 30] = True, True
        clean, places = nearest_patch(patches, prototypes)
        value, index = nearest_patch(x, p)
        right = torch.equal(value.isnan(), expected) and not index[expected].any()
        right &= torch.equal(value[~expected], clean[~expected]) and torch.equal(index[~expected], places[~expected])
        yield f"{bad} in, NaN out, for its pairs only", right, ""


def behaviour() -> Iterator[Check]:
    """Layouts, determinism, synchronisation, graphs, compilation."""
    x, p = random(8, 128, 14, 14), random(300, 128, seed=1)
    grad = torch.randn(8, 300, device=DEVICE, generator=generator())

    def step(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        x, p = x.detach().requires_grad_(), p.detach().requires_grad_()
        value, index, log = nearest_patch(x, p, "l2", activation="log")
        return value.detach(), index, log.detach(), *torch.autograd.grad((value, log), (x, p), (grad, grad))

    first = step(x, p)
    yield "the same bits five times", all(all(map(torch.equal, first, step(x, p))) for _ in range(5)), ""
    # Norms are summed in another order where another dimension lies side by side.
    last = step(x.contiguous(memory_format=torch.channels_last), p)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(last, first))
    right = torch.equal(last[1], first[1]) and error < 1e-5
    yield "channels-last patches", right, f"{error:.1e}"
    yield "their gradient is channels-last", last[3].is_contiguous(memory_format=torch.channels_last), ""
    wide = random(8, 128, 14, 28)
    yield (
        "patches that are a slice",
        all(map(torch.equal, step(wide[..., ::2].contiguous(), p), step(wide[..., ::2], p))),
        "",
    )
    empty = nearest_patch(x[:0], p)[0].shape == (0, 300) and nearest_patch(x, p[:0])[0].shape == (8, 0)
    yield "nothing in, nothing out", empty, ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, p)
        yield "no synchronisation", True, ""
    except RuntimeError as error:
        yield "no synchronisation", False, str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph, static = torch.cuda.CUDAGraph(), (torch.zeros_like(x), torch.zeros_like(p))
    with torch.cuda.graph(graph):
        results = step(*static)
    for target, source in zip(static, (x, p)):
        target.copy_(source)
    graph.replay()
    yield "a CUDA graph replays the same bits", all(map(torch.equal, first, results)), ""

    for half in (None, BF16):
        with settings(half=half):
            leaves = [t.clone().requires_grad_() for t in (x, p)]
            way = "inductor" if half is None else "aot_eager"  # once is enough of the slow one
            function = torch.compile(
                lambda x, p: nearest_patch(x, p, "l2", activation="log")[2] * 2, fullgraph=True, backend=way
            )
            eager = torch.autograd.grad((nearest_patch(*leaves, "l2", activation="log")[2] * 2).sum(), leaves)
            compiled = torch.autograd.grad(function(*leaves).sum(), leaves)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(compiled, eager))
        yield f"torch.compile(fullgraph=True), autocast {half}", error < 1e-5, f"{error:.1e}"
    double = nearest_patch(x.double(), p.double())[0]
    yield "float64 runs as the reference", double.dtype == torch.float64, ""
    arguments = (
        x[:2, :, :3, :3].clone().requires_grad_(),
        p.clone().requires_grad_()[..., None, None],
        "l2",
        1,
        "",
        None,
    )
    torch.library.opcheck(torch.ops.fgvczoo.nearest_patch.default, arguments)
    yield "opcheck", True, ""


def run_checks(all_checks: Callable[[], Iterator[Check]] = checks) -> list[dict[str, Any]]:
    found = []
    try:
        for what, passed, detail in all_checks():
            found.append({"check": what, "passed": bool(passed), "detail": detail})
            print(f"{'PASS' if passed else 'FAIL'} {what}{': ' if detail else ''}{detail}", flush=True)
    except Exception as error:  # what was found until here is worth as much
        found.append({"check": "all checks run", "passed": False, "detail": f"{type(error).__name__}: {error}"})
        print(f"FAIL all checks run: {traceback.format_exc()}", flush=True)
    failed = [check["check"] for check in found if not check["passed"]]
    print(
        f"{len(found) - len(failed)} of {len(found)} checks passed{'; failed: ' if failed else ''}{', '.join(failed)}"
    )
    return found


# -- 2. ceilings ------------------------------------------------------------------------------------------------------


def event_seconds(call: Callable[[], Any], most: float = 0.1) -> float:
    """Median time on the GPU of a call that fills it, for about `most` seconds."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < most and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Bytes and floating-point operations a second."""
    source = random(2**29)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / event_seconds(lambda: target.copy_(source))}
    for name, dtype, precision, n in (
        ("bf16", BF16, "highest", 8192),
        ("tf32", torch.float32, "high", 8192),
        ("ieee", torch.float32, "highest", 4096),
    ):
        a, b = random(n, n).to(dtype), random(n, n, seed=1).to(dtype)
        with settings(precision):
            found[name] = 2 * n**3 / event_seconds(lambda a=a, b=b: a @ b)
    return found


# -- 3. times ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to the numbers: a formula of `ops.py`, torch's settings, the features' type; compiled or not."""

    formula: str
    settings: tuple[tuple[str, Any], ...] = ()
    features: torch.dtype = torch.float32
    compiled: bool = False


def ways(size: Size, quick: bool = False) -> dict[str, Way]:
    """By name. The authors' convolutions use tf32 unless "ieee" says otherwise; "bf16" is autocast on bf16 features."""
    ieee, tf32, bf16 = (("tf32_convolutions", False),), (("precision", "high"),), (("half", BF16),)
    found = {
        "fused bf16": Way("fused", bf16, BF16),
        "fused high": Way("fused", tf32),
        "fused highest": Way("fused"),
        "authors tf32": Way("authors"),
        "authors ieee": Way("authors", ieee),
        "authors bf16": Way("authors", bf16, BF16),
        "matmul bf16": Way("matmul", bf16, BF16),
        "matmul tf32": Way("matmul", tf32),
        "matmul ieee": Way("matmul"),
        "product bf16": Way("product", bf16, BF16),
        "product tf32": Way("product", tf32),
        "product ieee": Way("product"),
    }
    # Compilation takes its time: for three sizes, all precisions for one.
    if size in COMPILED:
        found["compiled tf32"] = Way("authors", compiled=True)
    if size == BOLD and not quick:
        found["compiled ieee"] = Way("authors", ieee, compiled=True)
        found["compiled bf16"] = Way("authors", bf16, BF16, compiled=True)
    return found


def product(features: Tensor, prototypes: Tensor) -> Tensor:
    """The bare product, which writes the map: one matrix product per image, as `torch.matmul` would do it best."""
    return torch.bmm(prototypes.flatten(1).expand(len(features), -1, -1), features.flatten(2))


def step_of(way: Way, size: Size, backward: bool) -> Callable[[Tensor, Tensor], Any]:
    formula: Formula = product if way.formula == "product" else FORMULAS[size.formula][way.formula]
    if way.compiled:
        torch._dynamo.reset()  # earlier sizes and settings count against its limit of recompilations
        formula = torch.compile(formula, dynamic=False)
    ones: list[Tensor] = []

    def step(features: Tensor, prototypes: Tensor) -> Any:
        if not backward:
            with torch.no_grad():
                return formula(features, prototypes)
        result = formula(features, prototypes)
        if not ones:
            ones.append(torch.ones_like(result))
        return torch.autograd.grad(result, (features, prototypes), ones[0])

    return step


def inputs(size: Size, features: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Sets of inputs that together are larger than any cache; up to 12, at least 2."""
    bytes_each = size.B * size.D * size.side**2 * features.itemsize
    many = min(12, max(2, int(128e6 / bytes_each) + 1))
    return [
        (
            random(size.B, size.D, size.side, size.side, seed=2 * n).to(features).requires_grad_(),
            random(size.P, size.D, 1, 1, seed=2 * n + 1).requires_grad_(),
        )
        for n in range(many)
    ]


def measure(way: Way, size: Size, backward: bool, seconds: float = 0.06) -> dict[str, Any]:
    """Seconds of a step on the GPU and from Python, extra bytes; `graph` says whether a graph could be captured."""
    with settings(**dict(way.settings)):
        return _measure(way, size, backward, seconds)


def _measure(way: Way, size: Size, backward: bool, seconds: float) -> dict[str, Any]:
    return timed(step_of(way, size, backward), inputs(size, way.features), seconds)


def timed(step: Callable[..., Any], sets: Sequence[tuple[Any, ...]], seconds: float = 0.06) -> dict[str, Any]:
    """A step on several sets of inputs: see `measure`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for given in sets:
                step(*given)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step(*sets[0])
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before
    del kept
    start = time.perf_counter()
    for n in range(20):
        step(*sets[n % len(sets)])
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / 20

    def all_sets() -> None:
        for given in sets:
            step(*given)

    graph, captured = torch.cuda.CUDAGraph(), True
    try:
        with torch.cuda.graph(graph):
            all_sets()
        run = graph.replay
    except RuntimeError:
        captured, run = False, all_sets
        torch.cuda.synchronize()
    gpu = event_seconds(run, seconds) / len(sets)
    return {"gpu": gpu, "wall": wall, "memory": memory, "graph": captured}


SIZES = [
    Size("protopnet", 80, 2000, 128, 14),
    Size("protopnet", 80, 2000, 128, 7),
    Size("protopnet", 16, 2000, 128, 14),
    Size("protopnet", 16, 200, 128, 7),
    Size("st-protopnet full", 80, 2000, 64, 14),
    Size("st-protopnet cropped", 80, 1000, 64, 7),
    Size("protopnet", 80, 2000, 256, 14),
    Size("protopnet", 80, 2000, 512, 14),
    Size("protopnet", 80, 2000, 128, 28),
    Size("protopnet", 128, 4000, 256, 14),
    Size("prototree", 64, 511, 256, 7),
]
BOLD = SIZES[0]
FUSED = ("fused bf16", "fused high", "fused highest")
COMPILED = (BOLD, SIZES[1], SIZES[4])
MODES = {"forward": False, "forward+backward": True}


def time_all(sizes: list[Size], quick: bool, deadline: float) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"size": asdict(size), "ways": {}}
        rows.append(row)
        for name, way in ways(size, quick).items():
            for mode, backward in MODES.items():
                if time.monotonic() > deadline:
                    row["ways"].setdefault(name, {})[mode] = {"left out": "out of time"}
                    continue
                try:
                    row["ways"].setdefault(name, {})[mode] = measure(way, size, backward)
                except Exception as error:
                    row["ways"].setdefault(name, {})[mode] = {"left out": f"{type(error).__name__}: {error}"[:200]}
                torch.cuda.empty_cache()
        print("\n".join(table([row])), flush=True)
    return rows


def label(size: Size) -> str:
    return f"{size.formula}, {size.B} x {size.P} x {size.D}, {size.side} x {size.side}"


def table(
    rows: list[dict[str, Any]], name_of: Callable[[dict[str, Any]], str] = lambda size: label(Size(**size))
) -> list[str]:
    """Markdown, without a head."""
    lines = []
    for row in rows:
        first = name_of(row["size"])
        for name, modes in row["ways"].items():
            cells = []
            for mode in MODES:
                found = modes[mode]
                if "left out" in found:
                    cells += [found["left out"], "", ""]
                    continue
                star = "" if found["graph"] else " (events)"
                cells += [
                    f"{1e6 * found['gpu']:.1f}{star}",
                    f"{1e6 * found['wall']:.0f}",
                    f"{found['memory'] / 2**20:.1f}",
                ]
            lines.append(f"| {first} | {name} | {' | '.join(cells)} |")
            first = ""
    return lines


HEAD = [
    "| size | way | forward: gpu, us | wall, us | memory, MiB | forward + backward: gpu, us | wall, us | memory, MiB |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


def shares(rows: list[dict[str, Any]], found: dict[str, float]) -> list[str]:
    """What part of the measured ceiling of its arithmetic each fused forward reaches; 3 products for "high"."""
    lines = ["| size | forward: bf16 | high (three bf16 products) | highest |", "| --- | --- | --- | --- |"]
    for row in rows:
        size, cells = Size(**row["size"]), []
        work = 2 * size.B * size.P * size.D * size.side**2
        for name, ceiling, products in (("bf16", "bf16", 1), ("high", "bf16", 3), ("highest", "ieee", 1)):
            gpu = row["ways"].get(f"fused {name}", {}).get("forward", {}).get("gpu")
            cells.append(f"{100 * products * work / gpu / found[ceiling]:.0f} %" if gpu and found else "")
        lines.append(f"| {label(size)} | {' | '.join(cells)} |")
    return lines


# -- tuning -----------------------------------------------------------------------------------------------------------


def kernels_of(way: Way, size: Size) -> dict[str, float]:
    """Seconds of every kernel of a step, forward and backward, by name, as the profiler sees them."""
    step, sets = step_of(way, size, True), inputs(size, way.features)
    with settings(**dict(way.settings)):
        for given in sets:
            step(*given)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for given in sets:
                step(*given)
            torch.cuda.synchronize()
    averages = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    return {event.key[:60]: event.self_device_time_total / 1e6 / len(sets) for event in averages}


def sweep(deadline: float) -> list[dict[str, Any]]:
    """Forward of the bold size with other tiles; its backward with other blocks."""
    from fgvczoo.ops.nearest_patch import triton as gpu

    candidates: dict[str, list[tuple[Any, ...]]] = {
        "fused bf16": [
            (128, 64, 128, 4, 2), (128, 64, 128, 4, 3), (64, 64, 128, 4, 2), (128, 64, 64, 4, 3), (128, 32, 128, 4, 2),
        ],
        "fused high": [(64, 64, 128, 4, 2), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2), (64, 64, 64, 4, 3)],
        "fused highest": [
            (64, 64, 16, 4, 3), (128, 64, 16, 4, 3, 255), (128, 64, 16, 4, 2, 255), (128, 64, 32, 4, 2, 255),
            (128, 64, 16, 8, 3, 128), (64, 128, 16, 4, 3, 255), (128, 128, 16, 8, 3, 255), (64, 64, 32, 4, 3),
            (64, 32, 16, 2, 3), (64, 64, 16, 2, 3, 255),
        ],
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    chosen = gpu.choose
    for name, tiles in candidates.items():
        for tile in tiles:
            if time.monotonic() > deadline:
                return found
            gpu.choose = lambda *_, tile=tile: gpu.Tile(*tile)
            try:
                seconds = measure(ways(BOLD)[name], BOLD, False, 0.03)["gpu"]
            except Exception as error:
                found.append({"way": name, "tile": tile, "error": str(error)[:80]})
                continue
            finally:
                gpu.choose = chosen
            found.append({"way": name, "tile": tile, "gpu": seconds})
            print(f"sweep: {name} forward {tile}: {1e6 * seconds:.1f} us", flush=True)
    names = ("PAIRS_OF_PROTOTYPE", "PAIRS_OF_CELL", "BYTES", "GROUP")
    usual = {name: getattr(gpu, name) for name in names}
    for name in ("fused bf16", "fused highest"):
        for blocks in itertools.product((32, 64), (8, 16), (128, 256), (2, 4, 8)):
            if time.monotonic() > deadline:
                break
            vars(gpu).update(zip(names, blocks))
            try:
                times = kernels_of(ways(BOLD)[name], BOLD)
            except Exception as error:
                found.append({"way": name, "blocks": blocks, "error": str(error)[:80]})
                continue
            finally:
                vars(gpu).update(usual)
            parts = {key: value for key, value in times.items() if key.endswith("_gradient")}
            found.append({"way": name, "blocks": blocks, "kernels": parts})
            print(
                f"sweep: {name} {blocks}: " + ", ".join(f"{k} {1e6 * v:.1f} us" for k, v in parts.items()), flush=True
            )
    return found


def sanitize() -> int:
    """One small launch of every kernel, in every form."""
    for context, given, _, _ in (PRECISIONS[name] for name in ("highest", "high", "autocast bf16")):
        for shape, window, metric, k, activation in (
            ((2, 24, 5, 5), (), "l2", None, "log"),
            ((2, 24, 5, 7), (2, 3), "cosine", None, None),
            ((1, 130, 9, 9), (), ("dot", "cosine"), 2, None),
        ):
            x = random(*shape).to(given).requires_grad_()
            p = random(40, shape[1], *window, seed=1).to(given).requires_grad_()
            options = {"activation": activation} if activation else {}
            with settings(**context):
                results = nearest_patch(x, p, metric, k=k, **options)
                torch.autograd.grad(results[0].sum() + results[-1].sum() * bool(activation), (x, p))
    torch.cuda.synchronize()
    print("sanitize: every kernel ran")
    return 0


def main(options: Namespace) -> int:
    if options.sanitize:
        return sanitize()
    if options.checks:
        return int(not all(check["passed"] for check in run_checks()))
    began = time.monotonic()
    deadline = began + options.limit
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "quick": options.quick,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = "ops_cuda_quick" if options.quick else "ops_cuda"

    def part(title: str, call: Callable[[], Any]) -> None:
        """One part of the results, written at once; what fails is noted and the rest goes on."""
        try:
            results[title] = call()
        except Exception as error:
            results[title] = []
            results.setdefault("failed", {})[title] = f"{type(error).__name__}: {error}"[:500]
            print(f"FAIL {title}: {traceback.format_exc()}", flush=True)
        results["seconds"] = time.monotonic() - began
        (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{title}: done after {results['seconds']:.0f} s", flush=True)

    print(f"{results['device']}, torch {results['torch']}, triton {results['triton']}", flush=True)
    part("checks", run_checks)
    part("ceilings", ceilings)
    part("kernels", lambda: {way: kernels_of(ways(BOLD)[way], BOLD) for way in FUSED})
    part("rows", lambda: time_all([BOLD] if options.quick else SIZES, options.quick, deadline))
    if options.quick:
        part("sweep", lambda: sweep(deadline))
    text = report(results)
    (options.out / f"{name}.md").write_text(text)
    print(text)
    failed = [check["check"] for check in results["checks"] if not check["passed"]] + list(results.get("failed", {}))
    print(f"{len(results['checks'])} checks; failed: {', '.join(failed) or 'none'}; {results['seconds']:.0f} s")
    return 1 if failed else 0


def report(results: dict[str, Any]) -> str:
    """All results but the sweep, as Markdown."""
    lines = ["# `nearest_patch`, cuda", ""]
    lines += [f"{results['device']}; torch {results['torch']}, Triton {results['triton']}; B x P x D, map.", ""]
    limits = [f"{key} {value / 1e12:.2f}" for key, value in dict(results["ceilings"]).items()]
    lines += [f"Measured ceilings, in 10^12 bytes or operations a second: {', '.join(limits)}.", ""]
    lines += [*HEAD, *table(results["rows"]), "", *shares(results["rows"], dict(results["ceilings"])), ""]
    for way, kernels in dict(results["kernels"]).items():
        parts = sorted(kernels.items(), key=lambda item: -item[1])
        lines += [
            f"Kernels of {way}, forward and backward, in us: {', '.join(f'{k} {1e6 * t:.1f}' for k, t in parts)}.",
            "",
        ]
    return "\n".join(lines)
