"""Room for what the fused `patch_attention` returns; what its fake kernels return."""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def results(query: Tensor, key: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Output (B, h, Nq, e), the heads of a query side by side as the next layer takes them; and what to keep."""
    images, heads, count, _ = query.shape
    output = value.new_empty(images, count, heads, value.shape[3]).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty((images, heads, count, key.shape[2]) if keep else 0, dtype=dtype)


def gradients(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, of_bias: bool) -> Gradients:
    """Of all inputs; that of the bias is empty if it is not wanted."""
    with_bias = bias is not None and of_bias
    bias_gradient = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if with_bias else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), bias_gradient
