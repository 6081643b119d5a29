"""`nearest_patch` in tiles that stay in the cache: no B x P x N map is ever stored, backward touches winners only.

Arguments as of the operators in `__init__.py`; rows (B, N, K) and vectors (P, K) as in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.ops.nearest_patch.reference import (
    EPS,
    EPSILON,
    FEWEST,
    ROOT_EPSILON,
    activate,
    not_finite,
    rows_and_vectors,
)

# Entries of a tile per thread: 1 MiB of float32, half of a common second-level cache (2**15 costs half as much again).
TILE = 2**18
# Images of a tile of (image, prototype) pairs: a few share the prototypes that are in the cache.
IMAGES = 4


def forward(
    patches: Tensor, prototypes: Tensor, metrics: Sequence[str], ranks: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, index and, if there is an activation, activated: (B, S, P) each."""
    rows, vectors = rows_and_vectors(patches, prototypes, "dot")
    rows, count = rows.contiguous(), len(vectors)
    if 0 < count < FEWEST:
        vectors = F.pad(vectors, (0, 0, 0, FEWEST - count))
    value, index = search(rows, vectors, metrics, ranks)
    for number, metric in enumerate(metrics):
        slots = slice(number * ranks, (number + 1) * ranks)
        if metric == "l2":
            # From the difference: the expanded square leaves noise of 1e-5 where a prototype is a patch.
            for b, p in pairs(rows, vectors):
                for slot in range(slots.start, slots.stop):
                    difference = gather(rows[b], index[b, slot, p]).sub_(vectors[p])
                    value[b, slot, p] = difference.square_().sum(2)
    poison = not_finite(rows, vectors)[:, None]
    value, index = value.add_(poison)[..., :count], index.masked_fill_(poison.isnan(), 0)[..., :count]
    return value.contiguous(), index.contiguous(), activate(value, activation) if activation else value.new_empty(0)


def search(rows: Tensor, vectors: Tensor, metrics: Sequence[str], ranks: int) -> tuple[Tensor, Tensor]:
    """Scores, the larger the better, and places of the winners: (B, S, P). The score of "l2" is not its distance."""
    images, count, _ = rows.shape
    value = rows.new_empty(images, len(metrics) * ranks, len(vectors))
    index = torch.empty_like(value, dtype=torch.int64)
    half_square = rows.square().sum(2, keepdim=True) / -2
    left, right = rows, vectors
    if metrics == ["l2"]:
        # The nearest row has the largest x.p - |x|^2 / 2; one more channel brings the norm into the product.
        left, right = torch.cat([rows, half_square], dim=2), F.pad(vectors, (0, 1), value=1.0)
    elif metrics == ["cosine"]:
        left, right = F.normalize(rows, dim=2, eps=EPS), F.normalize(vectors, dim=1, eps=EPS)
    columns = min(len(vectors), max(64, tile() // count))  # fewer than 64 columns starve the matrix product
    for b in blocks(images, tile() // max(1, columns * count)):
        for p in blocks(len(vectors), columns):
            product = (left[b].flatten(0, 1) @ right[p].T).view(-1, count, p.stop - p.start)
            for number, metric in enumerate(metrics):
                score = product
                if len(metrics) > 1 and metric == "l2":
                    score = product + half_square[b]
                elif len(metrics) > 1 and metric == "cosine":
                    lengths = vectors[p].norm(dim=1).clamp_min(EPS)
                    score = product / (-2 * half_square[b]).sqrt().clamp_min(EPS) / lengths
                for slot in range(number * ranks, (number + 1) * ranks):
                    value[b, slot, p], index[b, slot, p] = column_max(score)
                    if ranks > 1:
                        score = score.scatter(1, index[b, slot, p].unsqueeze(1), -torch.inf)
    return value, index


def backward(
    grad: Tensor,
    grad_activated: Tensor,
    patches: Tensor,
    prototypes: Tensor,
    value: Tensor,
    index: Tensor,
    metrics: Sequence[str],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of patches and prototypes from those of value and activated. Deterministic."""
    rows, vectors = rows_and_vectors(patches, prototypes, "dot")
    rows = rows.contiguous()
    grad_rows, grad_vectors = torch.zeros_like(rows), torch.zeros_like(vectors)
    ranks = value.shape[1] // len(metrics)
    if activation:
        grad = grad + grad_activated * slope(value, activation)
    for b, p in pairs(rows, vectors):
        for slot in range(value.shape[1]):
            weight = grad[b, slot, p].unsqueeze(2)
            winners = gather(rows[b], index[b, slot, p])
            metric = metrics[slot // ranks]
            if metric == "l2":
                to_rows = winners.sub_(vectors[p]).mul_(2 * weight)
                grad_vectors[p] -= to_rows.sum(0)
            elif metric == "dot":
                to_rows = vectors[p] * weight
                grad_vectors[p] += winners.mul_(weight).sum(0)
            else:
                x, y = winners.norm(dim=2, keepdim=True), vectors[p].norm(dim=1, keepdim=True)
                weight = weight / (x.clamp_min(EPS) * y.clamp_min(EPS))
                ratio = value[b, slot, p].unsqueeze(2) * (y.clamp_min(EPS) / x.clamp_min(EPS))
                to_rows = weight * (vectors[p] - ratio.where(x > EPS, 0) * winners)
                ratio = value[b, slot, p].unsqueeze(2) * (x.clamp_min(EPS) / y.clamp_min(EPS))
                grad_vectors[p] += (weight * (winners - ratio.where(y > EPS, 0) * vectors[p])).sum(0)
            place = numbers(index[b, slot, p], rows.shape[1])
            grad_rows[b].flatten(0, 1).index_add_(0, place, to_rows.flatten(0, 1))
    window = prototypes.shape[2:]
    columns = grad_rows.transpose(1, 2)
    grad_patches = columns if window == (1, 1) else F.fold(columns, patches.shape[2:], window)
    grad_patches = grad_patches.view_as(patches).to(patches.dtype, memory_format=torch.channels_last)
    return grad_patches, grad_vectors.view_as(prototypes).to(prototypes.dtype)


def slope(distance: Tensor, activation: str) -> Tensor:
    """The derivative of `activate`."""
    if activation == "exp":
        root = torch.sqrt(distance + ROOT_EPSILON)
        return torch.exp(-root) / (-2 * root)
    return (EPSILON - 1) / ((distance + 1) * (distance + EPSILON))


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
