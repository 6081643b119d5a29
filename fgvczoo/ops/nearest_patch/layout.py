"""Room for what the fused `nearest_patch` returns; what its fake kernels return."""

from __future__ import annotations

import torch
from torch import Tensor


def results(patches: Tensor, prototypes: Tensor, slots: int, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value, index and activated, (B, slots, P) each; activated is empty where there is no activation."""
    dtype = torch.float64 if torch.float64 in (patches.dtype, prototypes.dtype) else torch.float32
    value = patches.new_empty(patches.shape[0], slots, prototypes.shape[0], dtype=dtype)
    activated = torch.empty_like(value) if activation else value.new_empty(0)
    return value, torch.empty_like(value, dtype=torch.int64), activated


def gradients(patches: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both: the patches' in their layout, contiguous or channels-last; on the CPU channels-last."""
    rows = patches.device.type == "cpu" or (
        patches.is_contiguous(memory_format=torch.channels_last) and not patches.is_contiguous()
    )
    layout = torch.channels_last if rows else torch.contiguous_format
    return (
        torch.empty(patches.shape, dtype=patches.dtype, device=patches.device, memory_format=layout),
        torch.empty_like(prototypes, memory_format=torch.contiguous_format),
    )
