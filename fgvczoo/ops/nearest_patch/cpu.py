"""`nearest_patch` in tiles that stay in the cache: no B x P x N map is ever stored, backward touches winners only.

Shapes and metrics as in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.ops.nearest_patch.reference import not_finite

# Entries of a tile per thread: 1 MiB of float32, half of a common second-level cache (2**15 costs half as much again).
TILE = 2**18
# Images of a tile of (image, prototype) pairs: a few share the prototypes that are in the cache.
IMAGES = 4


def forward(rows: Tensor, vectors: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """As `reference.nearest`, without autograd."""
    images, count, _ = rows.shape
    rows = rows.contiguous()
    value = rows.new_empty(images, len(vectors))
    index = torch.empty(images, len(vectors), dtype=torch.int64)
    left, right = rows, vectors
    if metric == "l2":
        # The nearest row has the largest x.p - |x|^2 / 2; one more channel brings the norm into the product.
        left = torch.cat([rows, rows.square().sum(2, keepdim=True) / -2], dim=2)
        right = F.pad(vectors, (0, 1), value=1.0)
    columns = min(len(vectors), max(64, tile() // count))  # fewer than 64 columns starve the matrix product
    for b in blocks(images, tile() // max(1, columns * count)):
        for p in blocks(len(vectors), columns):
            product = left[b].flatten(0, 1) @ right[p].T
            value[b, p], index[b, p] = column_max(product.view(-1, count, product.shape[1]))
    if metric == "l2":
        # From the difference: the expanded square leaves noise of 1e-5 where a prototype is a patch.
        for b, p in pairs(rows, vectors):
            difference = gather(rows[b], index[b, p]).sub_(vectors[p])
            value[b, p] = difference.square_().sum(2)
    poison = not_finite(rows, vectors)
    return value.add_(poison), index.masked_fill_(poison.isnan(), 0)


def backward(grad: Tensor, rows: Tensor, vectors: Tensor, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients of rows and vectors from the gradient of the values (B, P). Deterministic."""
    rows = rows.contiguous()
    grad_rows = torch.zeros_like(rows)
    grad_vectors = torch.zeros_like(vectors)
    for b, p in pairs(rows, vectors):
        weight = grad[b, p].unsqueeze(2)
        winners = gather(rows[b], index[b, p])
        if metric == "l2":
            to_rows = winners.sub_(vectors[p]).mul_(2 * weight)
            grad_vectors[p] -= to_rows.sum(0)
        else:
            to_rows = vectors[p] * weight
            grad_vectors[p] += winners.mul_(weight).sum(0)
        place = numbers(index[b, p], rows.shape[1])
        grad_rows[b].flatten(0, 1).index_add_(0, place, to_rows.flatten(0, 1))
    return grad_rows, grad_vectors


def column_max(tile: Tensor) -> tuple[Tensor, Tensor]:
    """(n, N, c) contiguous -> the largest value over N and the first row that has it, both (n, c).

    Max-pooling a channels-last map is the one reduction with indices that torch vectorises on the CPU: 5 to 10 times
    faster than `Tensor.max`.
    """
    value, index = F.max_pool2d(tile.unsqueeze(2).permute(0, 3, 1, 2), (tile.shape[1], 1), return_indices=True)
    return value.flatten(1), index.flatten(1)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows (n, N, K), index (n, c) -> the chosen rows (n, c, K), a copy."""
    chosen = rows.flatten(0, 1).index_select(0, numbers(index, rows.shape[1]))
    return chosen.view(*index.shape, rows.shape[2])


def numbers(index: Tensor, count: int) -> Tensor:
    """Row numbers (n, c) within each of n images of `count` rows -> row numbers (n * c,) among all their rows."""
    return (index + count * torch.arange(len(index))[:, None]).flatten()


def pairs(rows: Tensor, vectors: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of images and of prototypes, together all pairs, whose (n, c, K) arrays fit the cache."""
    for b in blocks(len(rows), IMAGES):
        for p in blocks(len(vectors), tile() // (IMAGES * vectors.shape[1])):
            yield b, p


def blocks(length: int, size: int) -> Iterator[slice]:
    """0..length in slices of about equal size, `size` at most, one at least."""
    count = -(-length // max(1, size))
    for k in range(count):
        yield slice(k * length // count, (k + 1) * length // count)


def tile() -> int:
    return TILE * torch.get_num_threads()
