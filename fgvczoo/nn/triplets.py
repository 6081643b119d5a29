"""Triplets of an anchor, a positive and a negative within a batch: which there are, and which to take.

N items, T triplets as rows (anchor, positive, negative) of an int64 (T, 3), ordered by anchor, then positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.embeddings import euclidean_distances

SAMPLERS = ("all", "hard", "semihard", "random", "distance_weighted")


def same_class(labels: Tensor) -> Tensor:
    """(N,) -> (N, N) bool, true also on the diagonal. Of tags (N, C): whether there is a common one."""
    if labels.ndim == 2:
        return labels.float() @ labels.float().T > 0
    return labels[:, None] == labels


def positive_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different items of a class: anchors, positives (P,)."""
    same = same_class(labels).fill_diagonal_(False)
    anchor, positive = same.nonzero(as_tuple=True)
    return anchor, positive


def all_triplets(labels: Tensor) -> Tensor:
    """Every anchor, positive, negative."""
    anchor, positive = positive_pairs(labels)
    pair, negative = (~same_class(labels)[anchor]).nonzero(as_tuple=True)
    return torch.stack([anchor[pair], positive[pair], negative], dim=1)


def hard_triplets(distance: Tensor, labels: Tensor) -> Tensor:
    """For each positive pair the anchor's nearest negative; of equal ones the first. distance: (N, N), row = anchor."""
    anchor, positive = positive_pairs(labels)
    negative = distance.masked_fill(same_class(labels), torch.inf).argmin(1)[anchor]
    return _with_negatives(anchor, positive, negative, labels)


def semihard_triplets(distance: Tensor, labels: Tensor) -> Tensor:
    """For each positive pair the nearest negative that is farther than the positive; where there is none, the farthest
    negative."""
    anchor, positive = positive_pairs(labels)
    same, rows = same_class(labels)[anchor], distance[anchor]
    farther = (rows > rows.gather(1, positive[:, None])) & ~same
    nearest = rows.masked_fill(~farther, torch.inf).argmin(1)
    farthest = rows.masked_fill(same, -torch.inf).argmax(1)
    return _with_negatives(anchor, positive, torch.where(farther.any(1), nearest, farthest), labels)


def distance_weights(
    distance: Tensor, labels: Tensor, dim: int, *, cutoff: float = 0.5, upper_cutoff: float | None = 1.4
) -> tuple[Tensor, Tensor]:
    """The distribution of negatives of each anchor under distance-weighted sampling: (N, N), rows sum to 1 or, where an
    anchor has no negative, are 0; and which rows fell back to uniform (N,) bool.

    Weights are inverse to the density of distances on the unit sphere, d^(2 - D) (1 - d^2 / 4)^((3 - D) / 2) (Wu et
    al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, section 4), with d at least `cutoff`, and 0 for d of
    `upper_cutoff` or more. A row without any weight is uniform over the anchor's negatives: at the start of training in
    many dimensions that is most of them, all being about sqrt(2) apart.

    Args:
        distance: (N, N) Euclidean distances of unit rows. dim: D, at least 3. upper_cutoff: None: no such limit.
    """
    if dim < 3:
        raise FgvczooError(f"distance-weighted sampling needs at least 3 dimensions, got {dim}")
    negative = ~same_class(labels)
    d = distance.float().clamp(min=cutoff)
    # Antipodes have a density of 0: kept just off it.
    log_weight = (2 - dim) * d.log() - (dim - 3) / 2 * torch.log1p(-(d.square() / 4).clamp(max=1 - 1e-6))
    weight = (log_weight - log_weight.max(dim=1, keepdim=True).values).exp() * negative
    if upper_cutoff is not None:
        weight = weight * (d < upper_cutoff)
    total = weight.sum(1, keepdim=True)
    uniform = (total <= 0) & negative.any(1, keepdim=True)
    weight = torch.where(uniform, negative.float(), weight)
    return weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny), uniform[:, 0]


def draw_negatives(probability: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each positive pair one negative, drawn from the anchor's row of `probability` (N, N).

    The numbers drawn depend on the generator (on the CPU) and the batch alone: processes that see the same batch draw
    the same triplets.
    """
    anchor, positive = positive_pairs(labels)
    uniform = torch.rand(len(anchor), generator=generator, dtype=torch.float64).to(probability.device)
    cumulative = probability.double().cumsum(1)[anchor]
    negative = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    # Rounding may end on an item of weight 0 behind the last.
    last = (probability > 0).float().mul(torch.arange(1, len(labels) + 1, device=labels.device)).argmax(1)
    return _with_negatives(anchor, positive, torch.minimum(negative, last[anchor]), labels)


def sample_triplets(
    sampler: str,
    embeddings: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    cutoff: float = 0.5,
    upper_cutoff: float | None = 1.4,
) -> Tensor:
    """Triplets by the name of a sampler: "all"; for each positive pair one negative, "hard", "semihard", "random" or
    "distance_weighted". embeddings: (N, D) unit rows, whose Euclidean distances decide; without gradient."""
    with torch.no_grad():
        if sampler == "all":
            return all_triplets(labels)
        distance = euclidean_distances(embeddings)
        if sampler == "hard":
            return hard_triplets(distance, labels)
        if sampler == "semihard":
            return semihard_triplets(distance, labels)
        if sampler == "random":
            return draw_negatives((~same_class(labels)).float(), labels, generator)
        if sampler == "distance_weighted":
            probability, _ = distance_weights(
                distance, labels, embeddings.shape[1], cutoff=cutoff, upper_cutoff=upper_cutoff
            )
            return draw_negatives(probability, labels, generator)
    raise FgvczooError(f"sampler={sampler!r}; expected {', '.join(SAMPLERS)}")


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU for one step of one run: the same on every process, and in a resumed run."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)


def _with_negatives(anchor: Tensor, positive: Tensor, negative: Tensor, labels: Tensor) -> Tensor:
    """The triplets of pairs whose anchor has a negative at all."""
    has = (~same_class(labels)).any(1)[anchor]
    return torch.stack([anchor, positive, negative], dim=1)[has]


def plain_distance(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of rows (T, D), of the difference plus 1e-6 a component, as PyTorch's triplet loss has it."""
    return torch.linalg.vector_norm(first - second + 1e-6, dim=1)
