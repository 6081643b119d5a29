"""Which implementation the ops run on."""

from __future__ import annotations

from types import TracebackType

import torch

from fgvczoo.errors import FgvczooError, did_you_mean

BACKENDS = ("auto", "cpu", "reference")

_chosen = "auto"


class use_backend:
    """Chooses the implementation of all ops: from now on as a plain call, for one block as a context manager.

    - `"auto"` (the default): the fused op where the tensors' device has one, else the reference; while `torch.export`
      traces, the reference, so that an exported program holds plain torch operators only.
    - `"cpu"`: the fused CPU op; tensors on another device raise `FgvczooError`.
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


def is_fused(device: torch.device) -> bool:
    """Whether an op on tensors of this device runs fused now. Raises `FgvczooError` where the choice cannot serve."""
    if _chosen == "cpu" and device.type != "cpu":
        raise FgvczooError(f"ops backend 'cpu' was chosen but the tensors are on {device}: use_backend('auto')")
    return device.type == "cpu" and _chosen != "reference" and (_chosen == "cpu" or not torch.compiler.is_exporting())
