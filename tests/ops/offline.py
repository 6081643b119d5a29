"""Triton kernels without a GPU: in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def interpret(file: str) -> None:
    """Runs this file of tests in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when a
    kernel is defined."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 fails in loops with numpy 2.4")
    # One thread: numpy's pool costs more than it gives on small blocks.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/ops/{file}"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def resources(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the assembler allotted them."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", binary], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def check(kernels: list[Any], folder: Path) -> None:
    """No stack, which is where spilled registers go; and room for eight warps, two a scheduler, on a multiprocessor."""
    assert kernels
    for kernel in {kernel.hash: kernel for kernel in kernels}.values():
        registers, stack = resources(kernel, folder)
        assert stack == 0, kernel.name
        shared = {80: 164, 90: 228, 100: 228}[kernel.metadata.target.arch] * 1024
        programs = min(65536 // (registers * 32 * kernel.metadata.num_warps), shared // (kernel.metadata.shared + 1024))
        assert programs * kernel.metadata.num_warps >= 8, (kernel.name, registers, kernel.metadata.shared)
