"""What the result files of benchmarks share: where they are, who measured, how they are written."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from fgvczoo.files import write_text

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def one_thread(*libraries: str) -> str:
    """The processor and the versions of torch, more libraries ("OpenCV 4.10") and Python."""
    versions = ", ".join([f"torch {torch.__version__}", *libraries, f"Python {platform.python_version()}"])
    return f"{processor()}, 1 thread; {versions}"


def two_ways(name: str, theirs: dict[str, float], ours: dict[str, float], digits: tuple[int, int]) -> str:
    """A row of a table: name, both medians (and bests) in ms, their ratio, extra memory in MiB, its ratio.

    digits: of times and of memory.
    """
    times = [f"{1e3 * way['seconds']:.{digits[0]}f} ({1e3 * way['best']:.{digits[0]}f})" for way in (theirs, ours)]
    memory = [way["memory"] / 2**20 for way in (theirs, ours)]
    return (
        f"| {name} | {times[0]} | {times[1]} | {theirs['seconds'] / ours['seconds']:.1f} | "
        f"{memory[0]:.{digits[1]}f} / {memory[1]:.{digits[1]}f} | {memory[0] / max(memory[1], 1):.1f} |"
    )


def write(out: Path, name: str, result: Any, text: str) -> None:
    """out/name.json and, of the same measurement, out/name.md, which is printed."""
    write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_text(out / f"{name}.md", text)
    print(text, flush=True)
