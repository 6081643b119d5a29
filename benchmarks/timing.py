"""How benchmarks take time and memory: in fresh processes, after a warm-up, many runs, or in turns."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from report import processor
from torch.nn import functional as F

RUNS, TURNS = 7, 15
MODES = ("forward", "forward+backward")
Found = dict[Any, list[Any]]  # results by row


class CPU:
    """How time and memory are taken."""

    name = "cpu"

    def reset_memory(self) -> None:
        """From here on `extra_memory` counts."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
        self.before = self._status("VmRSS")

    def extra_memory(self) -> int:
        """Bytes."""
        return self._status("VmHWM") - self.before

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def timed(tiny: Callable[[], Any], call: Callable[[], Any]) -> dict[str, Any]:
    """The times and the extra memory of a call, after a tiny one and a warm-up."""
    device = CPU()
    tiny()
    device.reset_memory()
    call()
    times = [device.seconds(call) for _ in range(RUNS)]
    return {"times": times, "memory": device.extra_memory()}


def timed_with_result(step: Callable[[], Any], runs: int = RUNS) -> dict[str, Any]:
    """The result of a step, which is the warm-up, then the times of `runs` more, and the extra memory of all."""
    device = CPU()
    # What autograd loads on first use.
    F.cross_entropy(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, dtype=torch.int64)).backward()
    device.reset_memory()
    result = step()
    times = [device.seconds(step) for _ in range(runs)]
    return {"result": result, "seconds": statistics.median(times), "best": min(times), "memory": device.extra_memory()}


def turns(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call when all of them take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 1):
        for name, call in calls.items():
            seconds = CPU().seconds(call)
            if turn:  # the first one warms up
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function says in a new process, which starts from nothing that this one has loaded."""
    with multiprocessing.get_context("spawn").Pool(1) as worker:
        return worker.apply(function, arguments)


def in_fresh_processes(function: Callable[..., Any], rows: Sequence[Any], *others: Any, repeat: int = 1) -> Found:
    """What the function says of every row, each time in a new process; `repeat` times over all of them."""
    found: Found = {row: [] for row in rows}
    fresh = multiprocessing.get_context("fork")  # this process runs no op, so that its copies start clean
    for turn in range(repeat):
        for number, row in enumerate(rows):
            print(f"\r{turn + 1}/{repeat}: {number + 1}/{len(rows)}  ", end="", file=sys.stderr, flush=True)
            with fresh.Pool(1) as worker:
                found[row].append(worker.apply(function, (*row, *others)))
    print(file=sys.stderr)
    return found


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of one row, over its processes."""
    times = [seconds for result in results for seconds in result["times"]]
    memory = statistics.median(result["memory"] for result in results)
    return {"median": statistics.median(times), "best": min(times), "memory": memory}


def compare(
    device: str,
    variants: dict[Any, tuple[str, ...]],
    measure: Callable[..., Any],
    take_turns: Callable[..., Any],
    threads: int,
    repeat: int,
) -> dict[str, Any]:
    """All ways of all sizes (a dataclass), forward and with backward: each in fresh processes, then in turns.

    measure: of size, way, backward, threads, as `timed`. take_turns: of size, ways, backward, threads, as `turns`.
    """
    rows = [(size, name, backward) for size in variants for name in variants[size] for backward in (False, True)]
    found = in_fresh_processes(measure, rows, threads, repeat=repeat)
    pairs = [(size, variants[size], backward) for size in variants for backward in (False, True)]
    seconds = in_fresh_processes(take_turns, pairs, threads)
    return {
        "device": device,
        "processor": processor(),
        "threads": threads,
        "repeat": repeat,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": [
            {
                "size": asdict(size),
                "variants": {
                    name: {MODES[backward]: summary(found[size, name, backward]) for backward in (False, True)}
                    for name in variants[size]
                },
            }
            for size in variants
        ],
        "turns": [
            {"size": asdict(size), "mode": MODES[backward], "seconds": seconds[size, names, backward][0]}
            for size, names, backward in pairs
        ],
    }
