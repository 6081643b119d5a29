"""The losses of DSML: contrastive, triplet, lifted structure and N-pair under any distance, and the regulariser.

The paper's loss equations could not be read; these are the standard structures with d_ij in place of the Euclidean
distance, row i the anchor. N items, d (N, N), labels (N,). A batch without a positive pair, or of one class, gives 0
and gradients of 0.

`reduction` of a set of tuples: "mean" over all, or "mean_nonzero" over those with a positive value, 0 if there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.triplets import positive_pairs, same_class

REDUCTIONS = ("mean_nonzero", "mean")


def reduce(values: Tensor, reduction: str) -> Tensor:
    """Values of tuples, none negative -> a scalar."""
    if reduction not in REDUCTIONS:
        raise FgvczooError(f"reduction={reduction!r}; expected {' or '.join(REDUCTIONS)}")
    counted = torch.ones_like(values) if reduction == "mean" else values > 0
    return values.sum() / counted.sum().clamp(min=1)


def contrastive(
    distance: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    reduction: str = "mean_nonzero",
) -> Tensor:
    """Over positive pairs max(0, d - positive_margin), over negative pairs max(0, negative_margin - d), each set
    reduced on its own."""
    same = same_class(labels)
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives = F.relu(distance[same & other] - positive_margin)
    negatives = F.relu(negative_margin - distance[~same])
    return reduce(positives, reduction) + reduce(negatives, reduction)


def triplet(distance: Tensor, labels: Tensor, *, margin: float = 0.2, reduction: str = "mean_nonzero") -> Tensor:
    """Over all triplets max(0, d_ap - d_an + margin); both distances have the anchor's variance below the line."""
    anchor, positive = positive_pairs(labels)
    rows = distance[anchor]  # (positive pairs, N): no N x N x N
    values = F.relu(rows.gather(1, positive[:, None]) - rows + margin)
    return reduce(values[~same_class(labels)[anchor]], reduction)


def triplet_of(distance: Tensor, triplets: Tensor, *, margin: float = 0.2, reduction: str = "mean_nonzero") -> Tensor:
    """Over given triplets (T, 3) of places."""
    anchor, positive, negative = triplets.unbind(1)
    return reduce(F.relu(distance[anchor, positive] - distance[anchor, negative] + margin), reduction)


def lifted(distance: Tensor, labels: Tensor, *, margin: float = 1.0) -> Tensor:
    """Lifted structure (Song et al., CVPR 2016): the mean over ordered positive pairs (i, j) of max(0, J)^2 / 2 with
    J = log(sum over negatives k of i of exp(margin - d_ik) + the same of j) + d_ij."""
    anchor, positive = positive_pairs(labels)
    negative = ~same_class(labels)
    has = negative.any(1)[anchor]  # all or none: of one class, nothing pushes
    anchor, positive = anchor[has], positive[has]
    if not len(anchor):
        return 0 * distance.sum()
    pushes = torch.logsumexp((margin - distance).masked_fill(~negative, -torch.inf), dim=1)
    j = torch.logaddexp(pushes[anchor], pushes[positive]) + distance[anchor, positive]
    return F.relu(j).square().mean() / 2


def generalised_lifted(
    distance: Tensor, labels: Tensor, *, positive_margin: float = 0.0, negative_margin: float = 1.0
) -> Tensor:
    """Lifted structure by anchors (Hermans et al., 2017): the mean over items of max(0, log sum over positives of
    exp(d - positive_margin) + log sum over negatives of exp(negative_margin - d)); a sum without terms has logarithm 0.
    """
    same = same_class(labels)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)

    def log_sum(values: Tensor, mask: Tensor) -> Tensor:
        has = mask.any(1)
        terms = values.masked_fill(~mask & has[:, None], -torch.inf)
        return torch.logsumexp(terms, dim=1).masked_fill(~has, 0.0)

    pull, push = log_sum(distance - positive_margin, positive), log_sum(negative_margin - distance, ~same)
    return F.relu(pull + push).mean()


SMALLEST_DISTANCE = 1e-6  # before it is inverted


def similarity(distance: Tensor, kind: str = "snr") -> Tensor:
    """What the N-pair loss compares: "snr", 1 / d with d at least 1e-6, or "negative_distance", -d."""
    if kind == "snr":
        return 1 / distance.clamp(min=SMALLEST_DISTANCE)
    if kind == "negative_distance":
        return -distance
    raise FgvczooError(f"similarity={kind!r}; expected 'snr' or 'negative_distance'")


def n_pair(similarities: Tensor) -> Tensor:
    """N-pair loss (Sohn, NeurIPS 2016): S_ij (C, C) of the anchor of class i and the positive of class j -> the mean of
    log(1 + sum over j != i of exp(S_ij - S_ii)). Fewer than 2 classes: 0."""
    if len(similarities) < 2:
        return 0 * similarities.sum()
    return F.cross_entropy(similarities, torch.arange(len(similarities), device=similarities.device))


def pairs_of_classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first two items of every class that has two: anchors, positives (C,), by their first appearance."""
    order = same_class(labels).tril(-1).sum(1)  # how many of the class came before
    anchor, positive = (order == 0).nonzero()[:, 0], (order == 1).nonzero()[:, 0]
    by_class = same_class(labels)[anchor][:, positive]
    has = by_class.any(1)
    return anchor[has], positive[by_class.int().argmax(1)[has]] if len(positive) else positive


def zero_mean(embeddings: Tensor) -> Tensor:
    """The regulariser: mean over items (N, M) of the absolute sum of the components, as given, not normalised.

    At mean 0 a feature's variance is its mean square; the distance itself never moves a mean."""
    return embeddings.sum(1).abs().mean()


def quantization(outputs: Tensor) -> Tensor:
    """Mean over items and bits (N, K) of (|h| - 1)^2: how far real outputs are from their codes."""
    return (outputs.abs() - 1).square().mean()
