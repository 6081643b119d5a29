"""Training with fewer stored activations: what a layer can cheaply make again is not kept for its gradient.

The gradients are those of the plain layers to rounding; second derivatives are not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

Activation = Literal["relu", "silu"]
Rebuild = Callable[[], Tensor]
Norm = nn.BatchNorm2d | nn.SyncBatchNorm
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu_, "silu": lambda x: F.silu(x, inplace=True)}


def rebuilding(value: Tensor, rebuild: Rebuild | None) -> Any:
    """A context in which operations that would store `value` for their gradient store how it is made instead.

    rebuild: makes it again, without gradient; None: nothing changes.
    """
    if rebuild is None:
        return saved_tensors_hooks(lambda stored: stored, lambda stored: stored)
    place, shape = value.data_ptr(), value.shape

    def pack(stored: Tensor) -> Tensor | Rebuild:
        return rebuild if stored.data_ptr() == place and stored.shape == shape else stored

    return saved_tensors_hooks(pack, lambda packed: packed if isinstance(packed, Tensor) else packed())


def norm_activation(x: Tensor, norm: Norm, activation: Activation) -> tuple[Tensor, Rebuild | None]:
    """activation(norm(x)) of maps (B, C, H, W), of which training stores x only, and how to make it again.

    In eval mode, under `torch.compile`, and for synchronised norms, the layers run as they are (no way to rebuild).
    """
    lean = norm.training and torch.is_grad_enabled() and type(norm) is nn.BatchNorm2d and len(x) * x[0, 0].numel() > 1
    if not lean or torch.compiler.is_compiling():
        return _ACTIVATIONS[activation](norm(x)), None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    out, mean, inverse_std = _NormActivation.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps, activation
    )
    kept, weight, bias = x.detach(), norm.weight.detach(), norm.bias.detach()
    return out, lambda: _ACTIVATIONS[activation](_normalised(kept, weight, bias, mean, inverse_std))


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    scale = weight * inverse_std
    shift = bias - mean * scale
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


class _NormActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, bias, running_mean, running_var, mean, inverse_std)
        ctx.mark_non_differentiable(mean, inverse_std)
        ctx.eps, ctx.activation = eps, activation
        return _ACTIVATIONS[activation](normed), mean, inverse_std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, running_mean, running_var, mean, inverse_std = ctx.saved_tensors
        normed = _normalised(x, weight, bias, mean, inverse_std)
        if ctx.activation == "silu":
            gradient = torch.ops.aten.silu_backward(gradient, normed)
        else:
            gradient = torch.ops.aten.threshold_backward(gradient, normed, 0)
        del normed
        gradients = torch.ops.aten.native_batch_norm_backward(
            *(gradient, x, weight, running_mean, running_var, mean, inverse_std, True, ctx.eps),
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]],
        )
        return *gradients, None, None, None, None, None
