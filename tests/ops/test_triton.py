"""The Triton path of `nearest_patch` without a GPU: what it computes, in Triton's interpreter; that its kernels compile
for the GPUs they were made for, without spilled registers; and what runs where Triton or such a GPU is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fgvczoo.errors import FgvczooError
from fgvczoo.ops import backend, nearest_patch, use_backend
from tests.ops.offline import ROOT, check, interpret


def test_in_the_interpreter() -> None:
    interpret("interpreted.py")


# -- compiled for GPUs that are not here ------------------------------------------------------------------------------


@pytest.fixture
def compiled(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from triton.runtime.driver import driver

    from fgvczoo.ops.nearest_patch import triton as gpu

    monkeypatch.setattr(gpu, "operands_in_shared_memory", lambda device: driver.active.architecture >= 90)
    # They compile no faster for fewer prototypes, but take less to allocate; tiles as for many.
    monkeypatch.setattr(gpu, "FEW", 0)
    return launched


def forward(dtype: torch.dtype, shape: tuple[int, ...], window: int, metrics: list[str], ranks: int, act: str) -> Any:
    from fgvczoo.ops.nearest_patch import triton as gpu

    patches, prototypes = torch.empty(shape, dtype=dtype), torch.empty(130, shape[1], window, window, dtype=dtype)
    return patches, prototypes, *gpu.forward(patches, prototypes, metrics, ranks, act, None)


FORWARDS: list[tuple[str, torch.dtype, list[tuple[Any, ...]]]] = [
    (
        "highest",
        torch.bfloat16,
        [
            ((1, 64, 14, 14), 1, ["l2"], 1, "log"),
            ((1, 128, 7, 7), 1, ["l2"], 1, ""),
            ((1, 128, 14, 14), 1, ["l2"], 1, ""),
            ((1, 128, 14, 14), 1, ["dot", "cosine"], 1, ""),
            ((1, 128, 14, 14), 1, ["l2"], 5, ""),
            ((1, 128, 14, 14), 2, ["cosine"], 1, ""),
            ((1, 256, 14, 14), 1, ["l2"], 1, ""),
            ((1, 512, 14, 14), 1, ["l2"], 1, "exp"),
        ],
    ),
    (
        "high",
        torch.float32,
        [
            ((1, 128, 14, 14), 1, ["l2"], 1, ""),
            ((1, 64, 7, 7), 1, ["cosine"], 1, ""),
            ((1, 512, 14, 14), 1, ["l2"], 1, ""),
        ],
    ),
    (
        "highest",
        torch.float32,
        [
            ((1, 128, 14, 14), 1, ["l2"], 1, ""),
            ((1, 128, 7, 7), 1, ["cosine"], 1, ""),
            ((1, 128, 14, 14), 1, ["l2"], 5, ""),
        ],
    ),
]


@pytest.mark.parametrize(
    "precision, dtype, calls", FORWARDS, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_forward_compiles_without_spills(
    compiled: list[Any], precision: str, dtype: torch.dtype, calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for call in calls:
            forward(dtype, *call)
    finally:
        torch.set_float32_matmul_precision(before)
    check(compiled, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [1, 2])
def test_backward_compiles_without_spills(compiled: list[Any], dtype: torch.dtype, window: int, tmp_path: Path) -> None:
    from fgvczoo.ops.nearest_patch import triton as gpu

    patches, prototypes = torch.empty(1, 128, 14, 14, dtype=dtype), torch.empty(30, 128, window, window, dtype=dtype)
    value, index = torch.zeros(1, 2, 30), torch.zeros(1, 2, 30, dtype=torch.int64)
    for metrics, activation in ((["l2"], "log"), (["dot", "cosine"], "")):
        gpu.backward(value, value, patches, prototypes, value, index, metrics, activation, None)
    check(compiled, tmp_path)


# -- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out about devices, and warned of, is forgotten before and after."""
    for function in (backend._missing, backend._warn):
        function.cache_clear()
    yield
    for function in (backend._missing, backend._warn):
        function.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    """A machine with such an NVIDIA GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return torch.device("cuda", 0)


def test_without_triton_plain_torch_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    device = pretend(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="Triton is not installed; plain torch runs instead") as caught:
        assert not any(backend.is_fused(device) for _ in range(3))
    assert len(caught) == 1
    with use_backend("triton"), pytest.raises(FgvczooError, match="Triton is not installed"):
        backend.is_fused(device)


def test_unknown_devices_run_plain_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    old = pretend(monkeypatch, (7, 5))
    for device, words in (
        (old, "a GPU, older than compute capability 8.0"),
        (torch.device("mps"), "no kernels for mps"),
    ):
        with pytest.warns(UserWarning, match=words) as caught:
            assert not any(backend.is_fused(device) for _ in range(3))
        assert len(caught) == 1
    with use_backend("triton"), pytest.raises(FgvczooError, match="tensors are on cpu"):
        nearest_patch(torch.rand(1, 3, 2, 2), torch.rand(2, 3))


def test_known_devices_run_fused_without_a_warning(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    device = pretend(monkeypatch, (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.is_fused(device)
        # also where the compiler asks
        count = torch.compile(lambda x: x + int(backend.is_fused(device)), fullgraph=True, backend="eager")
        assert count(torch.zeros(1)) == 1
        with use_backend("triton"):
            assert backend.is_fused(device)
        with use_backend("reference"):
            assert not backend.is_fused(device)


def test_ops_need_torch_alone() -> None:
    """Imported, they pull in nothing large; and they run where Triton is missing."""
    code = """
import sys, fgvczoo.ops, torch
print(*{"triton", "torch._dynamo", "lightning", "timm", "albumentations", "jsonargparse"} & set(sys.modules))
sys.modules["triton"] = None
prototypes = torch.rand(2, 3, requires_grad=True)
fgvczoo.ops.nearest_patch(torch.rand(1, 3, 2, 2), prototypes)[0].sum().backward()
print(prototypes.grad.shape)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["", "torch.Size([2, 3])"]


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    """The benchmark's checks: values, winners and gradients against float64 in every precision; graphs; compilation."""
    command = [sys.executable, "benchmarks/ops.py", "--device", "cuda", "--checks"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
