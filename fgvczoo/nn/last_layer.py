"""The convex last step of prototype networks: cross entropy with a sparse last layer, everything before it fixed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LastLayer(NamedTuple):
    """A solution: weight (C, P), its objective, and how many iterations it took."""

    weight: Tensor
    objective: float
    iterations: int


def objective(weight: Tensor, similarity: Tensor, labels: Tensor, penalised: Tensor, l1: float) -> Tensor:
    """Mean cross entropy of similarity @ weight^T plus l1 times the sum of |weight| where `penalised` holds.

    weight (C, P), similarity (N, P), labels (N,), penalised (C, P) bool (ProtoPNet, section 2.2: the connections of
    prototypes to classes that are not theirs).
    """
    return F.cross_entropy(similarity @ weight.T, labels) + l1 * (weight.abs() * penalised).sum()


@torch.no_grad()
def solve_last_layer(
    similarity: Tensor,
    labels: Tensor,
    weight: Tensor,
    penalised: Tensor,
    *,
    l1: float = 1e-4,
    tolerance: float = 1e-6,
    max_iterations: int = 2000,
    target: float | None = None,
) -> LastLayer:
    """Minimises `objective` from `weight` on by accelerated proximal gradient steps (FISTA with restarts).

    Unlike gradient steps it gives exact zeros, and it needs the similarities (N, P) once instead of passes over images.
    Stops when a step improves the objective by less than `tolerance` of it, after `max_iterations`, or as soon as the
    objective is at most `target`. Never ends above where it began.
    """
    onehot = F.one_hot(labels, len(weight)).to(similarity.dtype)
    # Largest curvature of the mean cross entropy: half the largest eigenvalue of S^T S / N.
    step = 1.0 / (0.5 * _largest_eigenvalue(similarity) / len(similarity) + 1e-12)
    threshold = penalised.to(weight.dtype) * (l1 * step)
    current, previous, momentum = weight.clone(), weight.clone(), 1.0
    value = float(objective(current, similarity, labels, penalised, l1))
    for iteration in range(1, max_iterations + 1):
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = current + ((momentum - 1) / following) * (current - previous)
        gradient = (torch.softmax(similarity @ point.T, dim=1) - onehot).T @ similarity / len(similarity)
        moved = point - step * gradient
        candidate = moved.sign() * (moved.abs() - threshold).clamp_min(0)
        found = float(objective(candidate, similarity, labels, penalised, l1))
        if found > value:  # the momentum overshot: begin again without it
            if momentum == 1.0:
                return LastLayer(current, value, iteration)
            previous, momentum = current, 1.0
            continue
        previous, current, momentum = current, candidate, following
        gain, value = value - found, found
        if gain <= tolerance * abs(value) or (target is not None and value <= target):
            return LastLayer(current, value, iteration)
    return LastLayer(current, value, max_iterations)


def _largest_eigenvalue(similarity: Tensor, rounds: int = 30) -> float:
    """Of S^T S, from above within a few percent, by power iteration from a fixed start."""
    vector = torch.ones(similarity.shape[1], dtype=similarity.dtype, device=similarity.device)
    for _ in range(rounds):
        vector = F.normalize(similarity.T @ (similarity @ vector), dim=0)
    return float((similarity @ vector).square().sum()) * 1.05
