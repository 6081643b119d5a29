"""What `nearest_patch` computes, in plain torch. Every other implementation is held against this one.

patches (B, D, H, W); prototypes (P, D, h, w), or (B, P, D, h, w): a set of them for each image. N places of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The smallest norm that a vector is divided by: zero vectors stay zero (the default of F.normalize).
EPS = 1e-12

# Bounds the log activation at a distance of 0, where it is ln(1 / EPSILON) = 9.21 (ProtoPNet).
EPSILON = 1e-4

# Keeps the root's slope finite at a distance of 0 (ProtoTree).
ROOT_EPSILON = 1e-14

# Products with fewer vectors run other code (seen up to 11), which sums some rows in another order: equal patches would
# no longer tie.
FEWEST = 16


def nearest(patches: Tensor, prototypes: Tensor, metric: str, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """The best windows of every image for every prototype, best first: value and place, both (B, ranks, P)."""
    rows, vectors = rows_and_vectors(patches, prototypes, metric)
    count = vectors.shape[-2]
    padded = F.pad(vectors, (0, 0, 0, FEWEST - count)) if 0 < count < FEWEST else vectors
    score = rows @ padded.mT  # (B, N, P), the larger the better
    if metric == "l2":
        score = 2 * score - rows.square().sum(2, keepdim=True) - padded.square().sum(-1)[..., None, :]
    score = score[..., :count]
    # Both give the first of equal ones.
    best = score.argmax(1, keepdim=True)
    if ranks > 1:
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :ranks]
    winners = rows.gather(1, best.flatten(1)[:, :, None].expand(-1, -1, rows.shape[2])).view(*best.shape, rows.shape[2])
    each = vectors.unsqueeze(-3)
    # From the difference, not from the expanded square: a prototype that is a patch is at distance 0, not 1e-5.
    value = (winners - each).square().sum(3) if metric == "l2" else (winners * each).sum(3)
    poison = not_finite(rows, vectors).unsqueeze(1)
    return value + poison, best.masked_fill(poison.isnan(), 0)


def activate(distance: Tensor, activation: str) -> Tensor:
    """Squared distances >= 0 -> similarities of the same shape, which fall with the distance.

    log: ln((d + 1) / (d + EPSILON)), in (0, 9.21] (ProtoPNet). exp: e^-sqrt(d), in (0, 1) (ProtoTree).
    """
    if activation == "exp":
        return torch.exp(-torch.sqrt(distance + ROOT_EPSILON))
    # The same number as the quotient's logarithm, which would round large distances to equal similarities.
    return torch.log1p((1 - EPSILON) / (distance + EPSILON))


def rows_and_vectors(patches: Tensor, prototypes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Windows as rows (B, N, D h w) and prototypes as (P, D h w) or (B, P, D h w), float32 or float64; of length 1 for
    "cosine", which then is their dot product."""
    dtype = torch.float64 if torch.float64 in (patches.dtype, prototypes.dtype) else torch.float32
    window = prototypes.shape[-2:]
    columns = patches.to(dtype).flatten(2) if window == (1, 1) else F.unfold(patches.to(dtype), window)
    rows, vectors = columns.transpose(1, 2), prototypes.to(dtype).flatten(-3)
    if metric == "cosine":
        # Norms along memory are five times faster than across it.
        rows, vectors = F.normalize(rows.contiguous(), dim=2, eps=EPS), F.normalize(vectors, dim=-1, eps=EPS)
    return rows, vectors


@torch.no_grad()
def not_finite(rows: Tensor, vectors: Tensor) -> Tensor:
    """(B, P): NaN where the image or the prototype has a NaN or infinite entry, else 0."""
    return rows.mul(0).sum((1, 2))[:, None] + vectors.mul(0).sum(-1)
