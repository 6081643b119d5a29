"""Relations between the items of a batch, and how two networks differ in them (Park et al., "Relational Knowledge
Distillation", CVPR 2019, arXiv 1904.05068, section 3.2).

N items, D dimensions; networks of a cohort may differ in D. Everything is computed from the N x N squared distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fgvczoo.nn.embeddings import squared_distances

TILE = 2**17  # cells of the angle tensor that are in work at once


def relative_distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances between items, by their mean over all pairs: (N, D) -> (N, N), diagonal 0.

    Squared distances are clamped at 1e-12: coincident items are 1e-6 apart, and count in the mean."""
    return _relative(squared_distances(embeddings)).to(embeddings.dtype)


def _relative(squared: Tensor) -> Tensor:
    diagonal = torch.eye(len(squared), dtype=torch.bool, device=squared.device)
    distance = squared.clamp(min=1e-12).sqrt().masked_fill(diagonal, 0.0)
    pairs = max(1, distance.numel() - len(distance))
    return distance / (distance.sum() / pairs).clamp(min=torch.finfo(torch.float32).tiny)


def vertex_angles(embeddings: Tensor, vertex: int) -> Tensor:
    """Cosines of the angles at one item between all others: (N, D) -> (N, N) [i, k]; 0 where i or k is the vertex or
    coincides with it."""
    squared = squared_distances(embeddings)
    return _cosines(squared, slice(vertex, vertex + 1))[0][0]


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D: smooth L1 between relative distances, mean over all N x N; no gradient to the teacher (N, D')."""
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher.detach()))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: smooth L1 between the cosines of all angles, mean over all N^3; no gradient to the teacher (N, D')."""
    return mutual_losses([student, teacher.detach()])[1][0]


def mutual_losses(embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What each of K networks has to learn from the others: RKD-D and RKD-A against every peer, averaged over the
    peers, two (K,). embeddings: K of (N, D_i), of the same items in the same order. No gradient flows to a peer.

    Each network's relations are computed once, each pair of networks is compared once: the value is the same for both,
    the gradients are opposite. Of the N^3 angles only tiles exist at any time.
    """
    count = len(embeddings)
    squared = [squared_distances(embedding) for embedding in embeddings]
    if count < 2:
        nothing = torch.stack([0 * s.sum() for s in squared])
        return nothing.float(), nothing.float()
    relative = [_relative(s) for s in squared]
    distance = [
        torch.stack([F.smooth_l1_loss(own, peer.detach()) for j, peer in enumerate(relative) if j != i]).mean()
        for i, own in enumerate(relative)
    ]
    return torch.stack(distance).float(), _AngleLosses.apply(*squared).float()


class _AngleLosses(Function):
    """K squared distance matrices (N, N) float64 -> K losses, each with a gradient to its own matrix alone."""

    @staticmethod
    def forward(ctx: Any, *squared: Tensor) -> Tensor:
        count, items = len(squared), len(squared[0])
        value = squared[0].new_zeros(count, count)
        gradients = [torch.zeros_like(s) for s in squared]
        step = max(1, TILE // items**2)
        wanted = any(ctx.needs_input_grad)
        scale = 1 / (items**3 * (count - 1))
        for start in range(0, items, step):
            vertices = slice(start, min(start + step, items))
            tiles = [_cosines(s, vertices) for s in squared]
            slopes = [torch.zeros_like(tile) for tile, _ in tiles]
            for i in range(count):
                for j in range(i + 1, count):
                    difference = tiles[i][0] - tiles[j][0]
                    slope = difference.clamp(-1.0, 1.0)
                    # Smooth L1 is slope * (difference - slope / 2), within and beyond 1.
                    value[i, j] += torch.dot(slope.flatten(), (difference - slope / 2).flatten())
                    if wanted:
                        slopes[i] += slope
                        slopes[j] -= slope
            for gradient, slope, (cosine, inverse) in zip(gradients, slopes, tiles) if wanted else ():
                _backward(gradient, slope, cosine, inverse, vertices)
        ctx.save_for_backward(*(gradient.mul_(scale) for gradient in gradients))
        return (value + value.T).sum(1) * scale

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (weights,) = upstream
        return tuple(weight * gradient for weight, gradient in zip(weights, ctx.saved_tensors))


def _cosines(squared: Tensor, vertices: slice) -> tuple[Tensor, Tensor]:
    """Cosines [j, i, k] at some vertices j, float32 (n, N, N); and inverse distances [j, i] to them, float64, 0 where
    an item coincides with the vertex."""
    rows = squared[vertices]
    inverse = torch.where(rows > 0, rows.rsqrt(), 0.0)
    # (e_i - e_j).(e_k - e_j) by the law of cosines; in float64, where it does not cancel.
    numerator = (rows[:, :, None] - squared).add_(rows[:, None, :])
    return numerator.mul_(inverse[:, :, None]).mul_(inverse[:, None, :] / 2).float(), inverse


def _backward(gradient: Tensor, slope: Tensor, cosine: Tensor, inverse: Tensor, vertices: slice) -> None:
    """Adds what a tile gives to the gradient of the squared distances. slope: of the loss by the cosines, symmetric."""
    inner = slope.double().mul_(inverse[:, :, None]).mul_(inverse[:, None, :])  # by the numerator, halved
    turned = torch.einsum("jik,jik->ji", slope, cosine).double() * inverse.square()  # by the lengths of the two legs
    gradient[vertices] += inner.sum(2) - turned
    gradient -= inner.sum(0) / 2
