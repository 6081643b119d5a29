"""`patch_attention` in tiles that stay in the cache: scores of a few heads of a few images at a time.

Arguments as of the operators in `__init__.py`. *Shares* are the softmax of the scores, what `weights` are made of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fgvczoo.ops.patch_attention import layout
from fgvczoo.ops.patch_attention.reference import EPSILON
from fgvczoo.ops.tiles import blocks, tile

DIMS = {"patches": -1, "queries": -2}


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `layout.results`."""
    output, kept, totals = layout.results(query, key, value, normalize, train)
    addend = Addend(bias, normalize, layout.accumulated(query))
    for images, heads in tiles(query, key):
        room = kept[images, heads].flatten(0, 1) if kept.numel() else None
        shares = softmax(query, key, images, heads, addend, scale, room)
        weights = shares if normalize == "patches" else renormalised(shares)[0]
        values = rows(value, images, heads)
        part = output[images, heads]
        part.copy_((weights.to(values.dtype) @ values).view_as(part))
    return output, kept, totals


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    kept: Tensor,
    totals: Tensor,
    scale: float,
    normalize: str,
    of_bias: bool,
) -> layout.Gradients:
    """Gradients of all four; `kept` are the shares, or empty. Output and totals are the GPU's."""
    found = layout.gradients(query, key, value, bias, of_bias)
    dtype = layout.accumulated(query)
    bias_gradient = found[3] if found[3].dtype == dtype else found[3].to(dtype)
    bias_gradient.zero_()
    addend = Addend(bias, normalize, dtype)
    shares = slopes = query.new_empty(0, dtype=dtype)
    for images, heads in tiles(query, key):
        if kept.numel():
            shares = kept[images, heads].flatten(0, 1)
        else:
            shares = softmax(query, key, images, heads, addend, scale, shares)
        given, values = rows(grad, images, heads), rows(value, images, heads)
        # Slopes: of the weights, then of the shares, then of the scores.
        slopes = multiply(given, values.mT, slopes)
        weights = shares
        if normalize == "queries":
            weights, sums = renormalised(shares)
            slopes.sub_((slopes * weights).sum(-1, keepdim=True)).div_(sums)
        of_value = weights.to(values.dtype).mT @ given
        torch.ops.aten._softmax_backward_data.out(slopes, shares, DIMS[normalize], dtype, grad_input=slopes)
        if of_bias:
            bias_gradient[heads] += slopes.view(-1, *bias_gradient[heads].shape).sum(0)
        part = slopes.mul_(scale).to(values.dtype)
        of_query, of_key = part @ rows(key, images, heads), part.mT @ rows(query, images, heads)
        for gradient, part in zip(found, (of_query, of_key, of_value)):
            gradient[images, heads] = part.view_as(gradient[images, heads])
    return *found[:3], bias_gradient.to(found[3].dtype)


def tiles(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and heads of every tile of scores."""
    size = query.shape[2] * key.shape[2]
    for heads in blocks(query.shape[1], tile() // size):
        for images in blocks(len(query), tile() // (size * (heads.stop - heads.start))):
            yield images, heads


class Addend:
    """The bias as it is added to scores: `bias` has 0 where a softmax would see -inf only; `alive` is a factor 0 for
    what it then gives, None if there is no such place."""

    def __init__(self, bias: Tensor | None, normalize: str, dtype: torch.dtype) -> None:
        self.dim = DIMS[normalize]
        self.bias = bias if bias is None else bias.to(dtype)
        self.alive = None
        if self.bias is not None:
            dead = self.bias.amax(self.dim, keepdim=True) == -torch.inf
            if dead.any():
                self.bias, self.alive = self.bias.masked_fill(dead, 0), (~dead).to(dtype)


def softmax(
    query: Tensor, key: Tensor, images: slice, heads: slice, addend: Addend, scale: float, room: Tensor | None
) -> Tensor:
    """The shares of a tile, (images x heads, Nq, Nk), in this room if they fit there."""
    dtype = layout.accumulated(query)
    left, right = (tensor[images, heads].flatten(0, 1).to(dtype) for tensor in (query, key))
    scores = multiply(left * scale, right.mT, room)
    by_head = scores.view(-1, heads.stop - heads.start, *scores.shape[1:])
    if addend.bias is not None:
        by_head.add_(addend.bias[heads])
    torch.softmax(scores, addend.dim, out=scores)
    if addend.alive is not None:
        by_head.mul_(addend.alive[heads])
    return scores


def multiply(left: Tensor, right: Tensor, room: Tensor | None) -> Tensor:
    """Matrix products in the type that is accumulated, in this room if they fit there."""
    fits = room is not None and room.dtype == left.dtype and room.shape == (*left.shape[:2], right.shape[2])
    return torch.bmm(left, right, out=room) if fits else (left @ right).to(layout.accumulated(left))


def renormalised(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the queries as weights whose rows sum to 1, and the sums that they had."""
    weights = shares + EPSILON
    sums = weights.sum(-1, keepdim=True)
    return weights.div_(sums), sums


def rows(tensor: Tensor, images: slice, heads: slice) -> Tensor:
    """Some heads of some images, one after the other, in a type whose products are fast."""
    part = tensor[images, heads].flatten(0, 1)
    return part.float() if part.dtype == torch.float16 else part
