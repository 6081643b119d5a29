"""Which implementation the ops run on."""

from __future__ import annotations

import functools
import warnings
from types import TracebackType

import torch

from fgvczoo.errors import FgvczooError, did_you_mean

BACKENDS = ("auto", "cpu", "reference", "triton")
# The backends that serve one type of device only.
DEVICES = {"cpu": "cpu", "triton": "cuda"}

_chosen = "auto"


class use_backend:
    """Chooses the implementation of all ops: from now on as a plain call, for one block as a context manager.

    - `"auto"` (the default): the fused op where the tensors' device has one, else, with one warning, the reference;
      while `torch.export` traces, the reference, so that an exported program holds plain torch operators only.
    - `"cpu"`: the fused CPU op; tensors on another device raise `FgvczooError`.
    - `"triton"`: the fused op on NVIDIA GPUs (compute capability 8.0 or more, Triton installed); else `FgvczooError`.
    - `"reference"`: a few lines of plain torch, on any device.

    The choice holds for the whole process, all threads. Raises `FgvczooError` for another name.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in BACKENDS:
            raise FgvczooError(
                f"unknown ops backend {name!r}: one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}"
            )
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def is_plain(device: torch.device) -> bool:
    """Whether plain torch is asked for, on any device. Raises `FgvczooError` where the choice cannot serve this one."""
    if _chosen in DEVICES and device.type != DEVICES[_chosen]:
        raise FgvczooError(f"ops backend {_chosen!r} was chosen but the tensors are on {device}: use_backend('auto')")
    # Not `torch.compiler.is_exporting()`, which torch 2.11 takes for true whenever it compiles.
    return _chosen == "reference" or (_chosen == "auto" and torch.compiler._is_exporting_flag)


def is_fused(device: torch.device) -> bool:
    """Whether an op on tensors of this device runs fused now. Raises `FgvczooError` where the choice cannot serve."""
    if is_plain(device):
        return False
    return device.type == "cpu" or (device.type != "meta" and _has_kernels(device, must=_chosen == "triton"))


def _has_kernels(device: torch.device, must: bool) -> bool:
    reason = _missing(device)
    if reason and must:
        raise FgvczooError(f"ops backend 'triton' was chosen but {reason}: use_backend('auto')")
    if reason:
        _warn(f"fgvczoo.ops: {reason}; plain torch runs instead, with more time and memory")
    return not reason


# Nothing to trace: what torch.compiler.assume_constant_result does, which would import the compiler for it (a second).
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _missing(device: torch.device) -> str:
    """Why the Triton kernels cannot run on this device; empty if they can."""
    if device.type != "cuda" or torch.version.hip:
        return f"there are no kernels for {'ROCm' if device.type == 'cuda' else device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"there are no kernels for {torch.cuda.get_device_name(device)}, older than compute capability 8.0"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return ""


@functools.cache
def _warn(message: str) -> None:
    """Once."""
    warnings.warn(message, stacklevel=2)
