"""Attention to patches: by a bias that all images share, or with the queries competing for the patches."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.ops.autocast import half_type, no_autocast
from fgvczoo.ops.patch_attention import reference

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
    device = query.device
    if half := half_type(device):
        query, key, value = (tensor.to(half) for tensor in (query, key, value) if tensor.is_floating_point())
    _check(query, key, value, bias, normalize)
    heads = query.ndim == 4
    if not heads:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    images = max(len(query), len(key), len(value)) if min(len(query), len(key), len(value)) else 0
    query, key, value = (tensor.expand(images, -1, -1, -1) for tensor in (query, key, value))
    factor = query.shape[3] ** -0.5 if scale is None else scale
    with no_autocast(device):
        output, weights = reference.attend(query, key, value, bias, factor, normalize)
        output = output.to(query.dtype)
    if not heads:
        output, weights = output.squeeze(1), weights.squeeze(1)
    return (output, weights) if return_weights else output


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
    if len({len(tensor) for tensor in (query, key, value)} - {1}) > 1:
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
