"""Attention to patches: by a bias that all images share, or with the queries competing for the patches."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.ops.autocast import half_type, no_autocast
from fgvczoo.ops.backend import is_fused, is_plain
from fgvczoo.ops.patch_attention import cpu, layout, reference

__all__ = ["NORMALIZATIONS", "patch_attention"]

NORMALIZATIONS = ("patches", "queries")


@overload
def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "patches",
    return_weights: Literal[False] = False,
) -> Tensor: ...


@overload
def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "patches",
    *,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "patches",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What every query sees in the patches: weights @ value, weights from softmax(scale query @ key^T + bias).

    Args:
        query: (B, h, Nq, d), or (B, Nq, d) for one head; any strides; B may be 0, and 1 stands for the others' B.
        key: (B, h, Nk, d), or (B, Nk, d): of the patches.
        value: (B, h, Nk, e), or (B, Nk, e).
        bias: added to the scores, broadcastable to (h, Nq, Nk), the same for all images; any floating-point type.
            -inf keeps a query from a patch.
        scale: a factor of the products, d^-0.5 unless given.
        normalize: "patches": softmax over the patches, the usual attention. "queries": softmax over the queries, which
            so compete for each patch; then (share + 1e-8) is divided by its sum over the patches (slot attention).
        return_weights: also return the weights, whose rows sum to 1 over the patches.

    Returns:
        output: (B, h, Nq, e), or (B, Nq, e), of the inputs' type, under autocast of its half type.
        weights: (B, h, Nq, Nk), or (B, Nq, Nk), float32, or float64 if the inputs are; with `return_weights`.

    Gradients flow to all four inputs and are deterministic; no (B, h, Nq, Nk) array is kept for them unless the weights
    are asked for. Sums are float32 at least. Where all scores of a softmax are -inf it gives 0: "patches": the query's
    output is 0; "queries": the patch goes to no query, and a query without any patch takes the mean of all. NaN passes
    as it would through the formula.

    Raises:
        FgvczooError: shapes or types that do not fit each other, an empty dimension other than B, unknown `normalize`.

    Source: MetaFormer (arXiv 2203.02751): attention with relative position bias; Slot Attention (arXiv 2006.15055),
    algorithm 1: competing queries.

    Example:
        >>> query, key, value = (torch.randn(2, 8, 50, 48) for _ in range(3))
        >>> bias = torch.zeros(8, 50, 50, requires_grad=True)
        >>> patch_attention(query, key, value, bias).shape
        torch.Size([2, 8, 50, 48])
        >>> slots, tokens = torch.randn(2, 13, 64), torch.randn(2, 196, 64)
        >>> output, weights = patch_attention(slots, tokens, tokens, normalize="queries", return_weights=True)
        >>> output.shape, weights.shape
        (torch.Size([2, 13, 64]), torch.Size([2, 13, 196]))
    """
    if half := half_type(query.device):
        query, key, value = (tensor.to(half) if _is_cast(tensor) else tensor for tensor in (query, key, value))
    _check(query, key, value, bias, normalize)
    one_head = query.ndim == 3
    if one_head:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    images = _images(query, key, value)
    query, key, value = (tensor.expand(images, -1, -1, -1) for tensor in (query, key, value))
    if bias is not None:
        bias = bias.expand(query.shape[1], query.shape[2], key.shape[2])
    factor = query.shape[3] ** -0.5 if scale is None else float(scale)
    with no_autocast(query.device):
        if return_weights:
            output, weights = reference.attend(query, key, value, bias, factor, normalize)
            output = output.to(query.dtype)
            return (output.squeeze(1), weights.squeeze(1)) if one_head else (output, weights)
        output = _output(query, key, value, bias, factor, normalize)
    return output.squeeze(1) if one_head else output


def _output(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str) -> Tensor:
    """By the way that serves the case best; arguments as of the operator below."""
    device, wanted = query.device, torch.is_grad_enabled()
    of_bias = bias is not None and bias.requires_grad and wanted
    if not is_plain(device):
        served = is_fused(device) and layout.is_served(query, value, normalize)
        # torch's is as fast where there is no bias. On the CPU it loses NaN in rows shorter than 16; for a bias's
        # gradient it turns to plain operations.
        if device.type != "cpu" and normalize == "patches" and (bias is None or not (served or of_bias)):
            mask = bias if bias is None else bias.to(query.dtype).unsqueeze(0)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        if served:
            train = wanted and (of_bias or any(tensor.requires_grad for tensor in (query, key, value)))
            output: Tensor = _attend(query, key, value, bias, scale, normalize, train)[0]
            return output
    return reference.attend(query, key, value, bias, scale, normalize)[0].to(query.dtype)


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast would."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _images(*operands: Tensor) -> int:
    return next((tensor.shape[0] for tensor in operands if tensor.shape[0] != 1), 1)


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normalize: str) -> None:
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    given = f"patch_attention: query {shapes[0]}, key {shapes[1]}, value {shapes[2]}"
    if normalize not in NORMALIZATIONS:
        names = ", ".join(NORMALIZATIONS)
        raise FgvczooError(f"{given}: normalize {normalize!r}: one of {names}{did_you_mean(normalize, NORMALIZATIONS)}")
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        raise FgvczooError(f"{given}: expected (B, h, N, d) each, or (B, N, d) each for one head")
    types = {tensor.dtype for tensor in (query, key, value)}
    if len(types) > 1 or not query.is_floating_point():
        raise FgvczooError(f"{given}: expected one floating-point type, got {', '.join(sorted(map(str, types)))}")
    if query.ndim == 4 and not query.shape[1] == key.shape[1] == value.shape[1]:
        raise FgvczooError(f"{given}: expected the same number of heads (dimension 1)")
    if query.shape[-1] != key.shape[-1]:
        raise FgvczooError(f"{given}: query and key need the same last dimension")
    if key.shape[-2] != value.shape[-2]:
        raise FgvczooError(f"{given}: key and value need the same number of patches")
    images = _images(query, key, value)
    if any(tensor.shape[0] != 1 and tensor.shape[0] != images for tensor in (query, key, value)):
        raise FgvczooError(f"{given}: expected the same number of images (dimension 0), or 1")
    if 0 in query.shape[1:] + key.shape[1:] + value.shape[1:]:
        raise FgvczooError(f"{given}: only the number of images may be 0")
    if bias is not None:
        full = (query.shape[1] if query.ndim == 4 else 1, query.shape[-2], key.shape[-2])
        ends = zip(reversed(bias.shape), reversed(full))
        if bias.ndim > 3 or any(side not in (1, whole) for side, whole in ends):
            raise FgvczooError(f"{given}: bias {tuple(bias.shape)} does not broadcast to (h, Nq, Nk) = {full}")
        if not bias.is_floating_point():
            raise FgvczooError(f"{given}: expected a floating-point bias, got {bias.dtype}")


# -- the operator -----------------------------------------------------------------------------------------------------
#
# query (B, h, Nq, d), key (B, h, Nk, d), value (B, h, Nk, e), bias (h, Nq, Nk). Results as `layout.results` says, the
# last two for the gradient, if `train`.


@torch.library.custom_op("fgvczoo::patch_attention", mutates_args=(), device_types="cpu")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.forward(query, key, value, bias, scale, normalize, train)


@torch.library.custom_op("fgvczoo::patch_attention_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    shares: Tensor,
    totals: Tensor,
    scale: float,
    normalize: str,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpu.backward(grad, query, key, value, bias, output, shares, totals, scale, normalize, of_bias)


@_attend.register_kernel("cuda")
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fgvczoo.ops.patch_attention import triton  # not before it is needed: not every machine has Triton

    return triton.forward(query, key, value, bias, scale, normalize, train)


@_attend_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    shares: Tensor,
    totals: Tensor,
    scale: float,
    normalize: str,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fgvczoo.ops.patch_attention import triton

    return triton.backward(grad, query, key, value, bias, output, shares, totals, scale, normalize, of_bias)


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return layout.results(query, key, value, normalize, train)


@_attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    shares: Tensor,
    totals: Tensor,
    scale: float,
    normalize: str,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layout.gradients(query, key, value, bias, of_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, bias, ctx.scale, ctx.normalize, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, value, bias, *output)


def _gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    of_bias = ctx.needs_input_grad[3]
    found = _attend_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.normalize, of_bias)
    return *found[:3], found[3] if of_bias else None, None, None, None


_attend.register_autograd(_gradients, setup_context=_save)
