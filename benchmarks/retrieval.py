"""Times what metric learning rests on, each against its usual form: `python benchmarks/retrieval.py [--items 60000]`.

- SNR distances: 128 x 128 of 512 dimensions, against the variance of all differences (the broadcast form).
- RKD angle loss: 128 items of 512 dimensions, against unit differences and their products, as the loss is written.
- nearest: the k nearest of N items in N, 512 dimensions, against faiss.IndexFlatL2; values compared.
- MAP@R: classes of 60 items, k = 59, against pytorch-metric-learning's AccuracyCalculator with the same k.

Both ways run in fresh processes: the first two with one thread, one warm-up, median of 7 runs; the others with all
cores, once (twice where N is below 10,000, the better). Peak memory is that of the process above what it held before
the call. Clustered random rows of unit length stand for embeddings. Writes results/retrieval.json and .md.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, processor, write
from timing import in_fresh_process
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.metrics.retrieval import RetrievalMetrics
from fgvczoo.metrics.retrieval_search import nearest
from fgvczoo.models.dm2.relations import angle_loss
from fgvczoo.models.dsml.distance import snr_distance

RUNS, DIM, PER_CLASS = 7, 512, 60


def rows_of(items: int, classes: int) -> tuple[Tensor, Tensor]:
    """Unit rows (N, 512) around class centres, and their classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(items) % classes
    centres = torch.randn(classes, DIM, generator=generator)
    return F.normalize(centres[labels] + 1.5 * torch.randn(items, DIM, generator=generator), dim=1), labels


def snr_broadcast(anchors: Tensor, others: Tensor) -> Tensor:
    return (anchors[:, None] - others).var(2) / anchors.var(1)[:, None]


def angle_written(student: Tensor, teacher: Tensor) -> Tensor:
    def angles(rows: Tensor) -> Tensor:
        unit = F.normalize(rows - rows[:, None], dim=2)
        return unit @ unit.transpose(1, 2)

    return F.smooth_l1_loss(angles(student), angles(teacher))


def small(name: str, way: str, backward: bool) -> dict[str, Any]:
    """Seconds of a differentiable function, and the error of its result (or gradient) against float64."""
    torch.set_num_threads(1)
    rows, _ = rows_of(256, 16)
    first, second = rows[:128].clone(), rows[128:].clone()
    first[1] = first[0] + 1e-4 * first[2]  # a near duplicate
    broadcast = name == "SNR distances"
    written: Callable[..., Tensor] = snr_broadcast if broadcast else angle_written
    function = written if way == "usual" else snr_distance if broadcast else angle_loss

    def step(rows: Tensor, other: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
        leaf = rows.clone().requires_grad_(backward)
        value = function(leaf, leaf if broadcast else other)
        if backward:
            value.sum().backward()
        return value.detach(), leaf.grad

    truth = step(first.double(), second.double(), written)[int(backward)]
    found = step(first, second, function)[int(backward)]
    assert truth is not None and found is not None
    error = float((found.double() - truth).norm() / truth.norm())
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step(first, second, function)
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "best": min(times), "error": error}


class Peak:
    """The largest resident size while it runs, above that at its start."""

    def __enter__(self) -> Peak:
        self.start = self.most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def bytes(self) -> int:
        return self.most - self.start


def search(way: str, items: int, k: int) -> dict[str, Any]:
    rows, _ = rows_of(items, items // PER_CLASS)
    best = float("inf")
    nearest(rows[:8], rows[:4096], 8)  # what is loaded at first use
    for _ in range(2 if items < 10_000 else 1):
        with Peak() as peak:
            start = time.perf_counter()
            if way == "ours":
                distance, place = nearest(rows, rows, k)
                squared, found = distance.square().numpy(), place.numpy()
            else:
                import faiss

                index = faiss.IndexFlatL2(DIM)
                index.add(rows.numpy())
                squared, found = index.search(rows.numpy(), k)
            best = min(best, time.perf_counter() - start)
    some = slice(0, items, max(1, items // 50))
    truth = torch.cdist(rows[some].double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    truth, order = truth.sort(dim=1, stable=True)
    wrong = float((torch.from_numpy(found[some]) != order[:, :k]).double().mean())
    error = float((torch.from_numpy(squared[some]).double() - truth[:, :k]).abs().max())
    return {"seconds": best, "peak_bytes": peak.bytes, "largest_error": error, "places_unlike_float64": wrong}


def map_at_r(way: str, items: int) -> dict[str, Any]:
    rows, labels = rows_of(items, items // PER_CLASS)
    best = float("inf")
    nearest(rows[:8], rows[:4096], 8)
    for _ in range(2 if items < 10_000 else 1):
        with Peak() as peak:
            start = time.perf_counter()
            if way == "ours":
                metric = RetrievalMetrics([1])
                metric.update(rows, labels, torch.arange(items))
                value = float(metric.compute()["map_at_r"])
            else:
                from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

                calculator = AccuracyCalculator(
                    include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
                    k=PER_CLASS - 1,
                    device=torch.device("cpu"),
                )
                value = calculator.get_accuracy(rows, labels)["mean_average_precision_at_r"]
            best = min(best, time.perf_counter() - start)
    return {"seconds": best, "peak_bytes": peak.bytes, "value": value}


def both(function: Callable[..., dict[str, Any]], *arguments: Any, place: int = 0) -> dict[str, dict[str, Any]]:
    """The usual way and ours, each in a fresh process; the way is the argument at `place`."""
    before, after = arguments[:place], arguments[place:]
    return {way: in_fresh_process(function, *before, way, *after) for way in ("usual", "ours")}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Metric learning: distances, relations, search",
        "",
        f"{result['machine']}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        f"`{result['command']}` writes this file. Ratios above 1: here is faster.",
        "",
        "| one thread | usual, ms | here, ms | ratio | relative error, usual | here |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["small"].items():
        usual, ours = row["usual"], row["ours"]
        lines.append(
            f"| {name} | {1e3 * usual['seconds']:.2f} | {1e3 * ours['seconds']:.2f} | "
            f"{usual['seconds'] / ours['seconds']:.1f} | {usual['error']:.1e} | {ours['error']:.1e} |"
        )
    lines += ["", "Errors are against the usual form in float64, with one near duplicate among the rows.", ""]
    lines += [
        "| all cores | usual, s | here, s | ratio | peak memory, MiB, usual | here | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["large"].items():
        usual, ours = row["usual"], row["ours"]
        if "value" in ours:
            remark = f"MAP@R {usual['value']:.6f}, {ours['value']:.6f}"
        else:
            remark = (
                f"largest error of d^2 {usual['largest_error']:.1e}, {ours['largest_error']:.1e}; places unlike "
                f"float64 {usual['places_unlike_float64']:.2%}, {ours['places_unlike_float64']:.2%}"
            )
        lines.append(
            f"| {name} | {usual['seconds']:.1f} | {ours['seconds']:.1f} | {usual['seconds'] / ours['seconds']:.2f} | "
            f"{usual['peak_bytes'] / 2**20:.0f} | {ours['peak_bytes'] / 2**20:.0f} | {remark} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[6000, 60_000])
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/retrieval.py --items " + " ".join(map(str, options.items)),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "faiss-cpu", "pytorch-metric-learning")}
        | {"Python": platform.python_version()},
        "small": {},
        "large": {},
    }
    for name in ("SNR distances", "RKD angle loss"):
        for backward, what in ((False, "forward"), (True, "forward and backward")):
            result["small"][f"{name}, {what}"] = both(small, name, backward, place=1)
    for items in options.items:
        k = min(1000, items // 6)
        result["large"][f"nearest {k} of {items:,} in {items:,}"] = both(search, items, k)
        result["large"][f"MAP@R of {items:,}"] = both(map_at_r, items)
        write(RESULTS, "retrieval", result, markdown(result))


if __name__ == "__main__":
    main()
