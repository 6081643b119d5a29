"""The losses of a cohort: each member's triplet loss, and what it takes over from its peers.

    L_i = triplet(e_i) + w_D mean over peers of L_D(e_i, e_j) + w_A mean over peers of L_A(e_i, e_j)

without gradient to e_j. Averaging over the peers keeps the weights independent of their number (our choice; the
paper's own equations could not be read).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.models.dm2.relations import mutual_losses
from fgvczoo.nn.triplets import plain_distance


def triplet_loss(embeddings: Tensor, triplets: Tensor, margin: float = 0.2) -> Tensor:
    """Mean over triplets (T, 3), those at 0 included, of max(0, d_ap - d_an + margin) with plain Euclidean distances of
    unit rows (N, D); 0 without triplets."""
    if not len(triplets):
        return 0 * embeddings.sum()
    anchor, positive, negative = (embeddings[column] for column in triplets.unbind(1))
    return F.relu(plain_distance(anchor, positive) - plain_distance(anchor, negative) + margin).mean()


@dataclass(frozen=True)
class CohortLosses:
    """Terms of K members, each (K,)."""

    triplet: Tensor
    distance: Tensor
    angle: Tensor

    def total(self, distance_weight: float, angle_weight: float) -> Tensor:
        """Each member's loss: (K,)."""
        return self.triplet + distance_weight * self.distance + angle_weight * self.angle


def cohort_losses(
    embeddings: Sequence[Tensor],
    triplets: Sequence[Tensor],
    *,
    margin: float = 0.2,
    relation_on: Sequence[Tensor] | None = None,
) -> CohortLosses:
    """All terms of K members on the same N items.

    embeddings: K of (N, D_i), unit rows. triplets: K of (T, 3). relation_on: K of (N, D_i) whose relations are compared
    instead.
    """
    triplet = torch.stack([triplet_loss(e, t, margin) for e, t in zip(embeddings, triplets)])
    distance, angle = mutual_losses(relation_on if relation_on is not None else embeddings)
    return CohortLosses(triplet, distance, angle)
