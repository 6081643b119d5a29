"""Room for what the fused `patch_attention` returns, and what its fake kernels return; which cases it serves."""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

# On GPUs: the most queries that compete; the longest vectors where they do not, of which the kernels hold whole tiles.
QUERIES, LONGEST = 256, 128


def is_served(query: Tensor, value: Tensor, normalize: str) -> bool:
    if on_cpu(query):
        return True
    if query.dtype == torch.float64:
        return False
    return query.shape[2] <= QUERIES if normalize == "queries" else max(query.shape[3], value.shape[3]) <= LONGEST


def results(query: Tensor, key: Tensor, value: Tensor, normalize: str, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, h, Nq, e); shares, the softmax of the scores, to keep for the gradient, else empty; and on GPUs totals
    (B, h, Nq)."""
    images, heads, queries, _ = query.shape
    dtype = accumulated(query)
    kept = query.new_empty(0, dtype=dtype)
    if train and keeps(query, value, normalize):
        kept = shares(query, key)
    totals = query.new_empty(0 if on_cpu(query) else (images, heads, queries), dtype=dtype)
    return _by_head(value, queries, value.shape[3]), kept, totals


def keeps(query: Tensor, value: Tensor, normalize: str) -> bool:
    """Whether shares are kept, not made again: on the CPU where they take no more room than keys and values."""
    return query.shape[2] <= query.shape[3] + value.shape[3] if on_cpu(query) else normalize == "queries"


def shares(query: Tensor, key: Tensor) -> Tensor:
    """On the CPU (B, h, Nq, Nk), float32 or float64; on a GPU (B, h, Nk, Nq padded to a power of two), as the query."""
    images, heads, queries, _ = query.shape
    if on_cpu(query):
        return query.new_empty(images, heads, queries, key.shape[2], dtype=accumulated(query))
    return query.new_empty(images, heads, key.shape[2], max(16, 1 << (queries - 1).bit_length()))


def slopes(query: Tensor, key: Tensor, normalize: str, most: int) -> Tensor:
    """Room on a GPU for the slopes of as many images as `most` bytes hold, as of shares; one at least."""
    if normalize == "queries":
        return shares(query, key)
    images, heads, queries, _ = query.shape
    pitch = -(-queries // 16) * 16
    parts = -(-images // max(1, most // (heads * key.shape[2] * pitch * query.element_size())))
    return query.new_empty(-(-images // parts), heads, key.shape[2], pitch)


def gradients(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, of_bias: bool) -> Gradients:
    """Of all inputs; that of the bias is empty if it is not wanted."""
    of_query, of_key, of_value = (_by_head(tensor, *tensor.shape[2:]) for tensor in (query, key, value))
    if bias is None or not of_bias:
        return of_query, of_key, of_value, query.new_empty(0)
    return of_query, of_key, of_value, bias.new_empty(bias.shape)


def _by_head(like: Tensor, count: int, width: int) -> Tensor:
    """(B, h, count, width), the heads of a token side by side in memory, as the layers around attention have them."""
    return like.new_empty(like.shape[0], count, like.shape[1], width).transpose(1, 2)


def accumulated(tensor: Tensor) -> torch.dtype:
    """The type of scores and sums."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
