"""`nearest_patch` in tiles that stay in the cache: no B x P x N map is ever stored, backward touches winners only.

Arguments as of the operators in `__init__.py`; rows (B, N, K) and vectors (P, K) as in `reference.py`.
"""

from __future__ import annotations

import functools
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
from fgvczoo.ops.tiles import blocks, tile

# Most rows of a tile, if an image has fewer: with as many, and the rest of the tile for columns, products run best.
ROWS = 1024
# A product of rows in multiples of this, as a convolution of so many images, is left to oneDNN by torch.
IMAGES = 16


def forward(
    patches: Tensor, prototypes: Tensor, metrics: Sequence[str], ranks: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, index and, if there is an activation, activated: (B, S, P) each."""
    rows, vectors = rows_and_vectors(patches, prototypes, "dot")
    rows = rows.contiguous()
    value, index = search(rows, vectors, metrics, ranks)
    for slot in range(value.shape[1]):
        if metrics[slot // ranks] == "l2":
            # From the difference: the expanded square leaves noise of 1e-5 where a prototype is a patch.
            for b, p, _, chosen in winners(rows, vectors, index[:, slot]):
                torch.sum(chosen.sub_(vectors[p]).square_(), 2, out=value[b, slot, p])
    poison = not_finite(rows, vectors)[:, None]
    value.add_(poison)
    index.masked_fill_(poison.isnan(), 0)
    return value, index, activate(value, activation) if activation else value.new_empty(0)


def search(rows: Tensor, vectors: Tensor, metrics: Sequence[str], ranks: int) -> tuple[Tensor, Tensor]:
    """Scores, the larger the better, and places of the winners: (B, S, P).

    Cosine and dot product are scores themselves; that of "l2" is x.p - |x|^2 / 2.
    """
    images, count, depth = rows.shape
    flat, right, length = rows.flatten(0, 1), vectors, vectors.norm(dim=1).clamp_min(EPS)
    # All rows one below the other, with some more that fill up the last product. Where there is one metric only, its
    # part of a row is done here, before the product; else to the products.
    alone = metrics[0] if len(metrics) == 1 else ""
    left = rows.new_zeros(len(flat) + IMAGES - 1, depth + (alone == "l2"))
    body = left[: len(flat)]
    square = torch.mul(flat, flat, out=body[:, :depth]).sum(1, keepdim=True).view(images, count, 1)
    row_length = square.sqrt().clamp_min(EPS)
    if alone == "l2":
        torch.cat([flat, square.view(-1, 1) / -2], dim=1, out=body)
        right = F.pad(vectors, (0, 1), value=1.0)
    elif alone == "cosine":
        torch.div(flat, row_length.view(-1, 1), out=body)
        right = vectors / length[:, None]
    else:
        body.copy_(flat)
    if 0 < len(vectors) < FEWEST:
        right = F.pad(right, (0, 0, 0, FEWEST - len(vectors)))

    value = rows.new_empty(images, len(metrics) * ranks, len(right))
    index = torch.empty_like(value, dtype=torch.int64)
    parts = list(blocks(images, ROWS * torch.get_num_threads() // count))
    most = max((b.stop - b.start for b in parts), default=1) * count
    for p in blocks(len(right), max(64, tile() // most)):  # fewer than 64 starve the product
        for b in parts:
            products = multiply(left, b.start * count, b.stop * count, right[p]).view(-1, count, p.stop - p.start)
            for number, metric in enumerate(metrics):
                score = products
                if not alone and metric == "l2":
                    score = products - square[b] / 2
                elif not alone and metric == "cosine":
                    score = products / row_length[b]
                for slot in range(number * ranks, (number + 1) * ranks):
                    value[b, slot, p], index[b, slot, p] = column_max(score)
                    if ranks > 1:  # the next rank is without this winner
                        score = score.scatter(1, index[b, slot, p].unsqueeze(1), -torch.inf)
            del products, score  # or the next tile would take fresh memory beside it
    value, index = (result[..., : len(vectors)].contiguous() for result in (value, index))
    for slot in range(value.shape[1] if not alone else 0):
        if metrics[slot // ranks] == "cosine":
            value[:, slot] /= length
    return value, index


def multiply(left: Tensor, start: int, stop: int, right: Tensor) -> Tensor:
    """Rows start..stop of `left`, which has `IMAGES` - 1 more, times `right` (c, K) transposed: (stop - start, c).

    Torch leaves float32 matrix products to MKL, which does not use AVX-512 on AMD's processors, but convolutions of 16
    images and more to oneDNN, which does: more than twice as fast.
    """
    if left.dtype != torch.float32 or not convolutions_are_fast():
        return left[start:stop] @ right.T
    side = -(-(stop - start) // IMAGES)
    image = left[start : start + IMAGES * side].view(IMAGES, 1, side, left.shape[1]).permute(0, 3, 1, 2)
    products = F.conv2d(image, right[:, :, None, None]).permute(0, 2, 3, 1)  # channels last, as the image
    return products.reshape(IMAGES * side, len(right))[: stop - start]


@functools.cache
def convolutions_are_fast() -> bool:
    """Whether torch has oneDNN, on an x86 processor."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.backends.cpu.get_cpu_capability().startswith("AVX")


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
    for slot in range(value.shape[1]):
        add = {"l2": distance_gradients, "dot": product_gradients, "cosine": cosine_gradients}[metrics[slot // ranks]]
        add(grad[:, slot], rows, vectors, value[:, slot], index[:, slot], grad_rows, grad_vectors)
    window = prototypes.shape[2:]
    columns = grad_rows.transpose(1, 2)
    grad_patches = columns if window == (1, 1) else F.fold(columns, patches.shape[2:], window)
    grad_patches = grad_patches.view_as(patches).to(patches.dtype, memory_format=torch.channels_last)
    return grad_patches, grad_vectors.view_as(prototypes).to(prototypes.dtype)


def distance_gradients(
    grad: Tensor, rows: Tensor, vectors: Tensor, _: Tensor, index: Tensor, grad_rows: Tensor, grad_vectors: Tensor
) -> None:
    """Adds those of |x - p|^2 times grad (B, P). Exactly 0 where a prototype is its patch, whatever grad."""
    for b, p, place, chosen in winners(rows, vectors, index):
        pull = chosen.sub_(vectors[p]).mul_(2 * grad[b, p].unsqueeze(2))
        for of_image in pull:
            grad_vectors[p].sub_(of_image)
        grad_rows.flatten(0, 1).index_add_(0, place, pull.flatten(0, 1))


def product_gradients(
    grad: Tensor, rows: Tensor, vectors: Tensor, _: Tensor, index: Tensor, grad_rows: Tensor, grad_vectors: Tensor
) -> None:
    """Adds those of x.p times grad (B, P)."""
    for b, p, place, chosen in winners(rows, vectors, index):
        weight = grad[b, p].unsqueeze(2)
        for of_image, of_weight in zip(chosen, weight):
            grad_vectors[p].addcmul_(of_image, of_weight)
        torch.mul(vectors[p], weight, out=chosen)
        grad_rows.flatten(0, 1).index_add_(0, place, chosen.flatten(0, 1))


def cosine_gradients(
    grad: Tensor, rows: Tensor, vectors: Tensor, value: Tensor, index: Tensor, grad_rows: Tensor, grad_vectors: Tensor
) -> None:
    """Adds those of c = x.p / (|x| |p|) times grad (B, P): p / (|x| |p|) - c x / |x|^2 to x, and likewise to p. A norm
    below `EPS` is a constant."""
    row_norm, vector_norm = rows.norm(dim=2), vectors.norm(dim=1)
    row_length, vector_length = row_norm.clamp_min(EPS), vector_norm.clamp_min(EPS)
    weight = grad / (row_length.gather(1, index) * vector_length)
    product_gradients(weight, rows, vectors, value, index, grad_rows, grad_vectors)
    share = grad * value
    of_rows = torch.zeros_like(row_norm).scatter_add_(1, index, share) / row_length.square()
    of_vectors = share.sum(0) / vector_length.square()
    grad_rows.addcmul_(rows, of_rows.where(row_norm > EPS, 0).unsqueeze(2), value=-1)
    grad_vectors.addcmul_(vectors, of_vectors.where(vector_norm > EPS, 0).unsqueeze(1), value=-1)


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


def winners(rows: Tensor, vectors: Tensor, index: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of images and prototypes, together all pairs of index (B, P): numbers of the chosen rows among all rows
    (n * c,), and the rows (n, c, K), a copy that the next block overwrites."""
    (images, count, depth), flat = rows.shape, rows.flatten(0, 1)
    columns = max(1, min(len(vectors), tile() // depth))
    together = max(1, min(images, tile() // (columns * depth)))
    room = rows.new_empty(together * columns, depth)
    for b in blocks(images, together):
        for p in blocks(len(vectors), columns):
            place = (index[b, p] + count * torch.arange(b.start, b.stop)[:, None]).flatten()
            chosen = torch.index_select(flat, 0, place, out=room[: len(place)])
            yield b, p, place, chosen.view(b.stop - b.start, p.stop - p.start, depth)
