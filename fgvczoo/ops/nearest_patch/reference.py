"""What `nearest_patch` computes, in plain torch. Every other implementation is held against this one.

rows (B, N, K): the patches of B images, one a row. vectors (P, K): the prototypes, or (B, P, K): a set of them for each
image. metric: "l2" or "dot".
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(rows: Tensor, vectors: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The best row of every image for every vector: value and row number, both (B, P); the first of equal ones."""
    product = rows @ vectors.mT
    if metric == "l2":
        distance = rows.square().sum(2, keepdim=True) - 2 * product + vectors.square().sum(-1)[..., None, :]
        index = distance.argmin(1)
    else:
        index = product.argmax(1)
    winners = rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
    # From the difference, not from the expanded square: a prototype that is a patch is at distance 0, not 1e-5.
    value = (winners - vectors).square().sum(2) if metric == "l2" else (winners * vectors).sum(2)
    poison = not_finite(rows, vectors)
    return value + poison, index.masked_fill(poison.isnan(), 0)


@torch.no_grad()
def not_finite(rows: Tensor, vectors: Tensor) -> Tensor:
    """(B, P): NaN where the image or the prototype has a NaN or infinite entry, else 0."""
    return rows.mul(0).sum((1, 2))[:, None] + vectors.mul(0).sum(-1)
