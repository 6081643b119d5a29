"""The losses of ProtoPNet (section 2.2 of the paper). B images, P prototypes, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.models.protopnet.network import Head, Output
from fgvczoo.nn.prototypes import connection_l1, masked_min, own_class


@dataclass
class LossWeights:
    """Coefficients of the total, as the authors' settings have them."""

    cross_entropy: float = 1.0
    cluster: float = 0.8
    separation: float = -0.08
    l1: float = 1e-4


def cluster(distance: Tensor, labels: Tensor, class_of: Tensor) -> Tensor:
    """Mean over images of the smallest distance (B, P) to a prototype of the own class; to be lowered."""
    return masked_min(distance, own_class(labels, class_of)).mean()


def separation(distance: Tensor, labels: Tensor, class_of: Tensor) -> Tensor:
    """Mean over images of the smallest distance (B, P) to a prototype of another class; to be raised. 0 where there is
    no other class."""
    return masked_min(distance, ~own_class(labels, class_of)).mean()


def average_separation(distance: Tensor, labels: Tensor, class_of: Tensor) -> Tensor:
    """Mean over images of the mean distance (B, P) to prototypes of other classes; only watched."""
    other = ~own_class(labels, class_of)
    return ((distance * other).sum(dim=1) / other.sum(dim=1).clamp(min=1)).mean()


def pair_distance(vectors: Tensor) -> Tensor:
    """Mean squared distance over all ordered pairs of prototypes (P, D, h, w), each with itself included; only watched:
    when it falls to 0 the prototypes have collapsed."""
    # Of vectors about their mean, the pairs' cross terms cancel.
    return 2 * (vectors - vectors.mean(dim=0)).square().flatten(1).sum(dim=1).mean()


def loss_terms(head: Head, output: Output, labels: Tensor, class_agnostic: bool = False) -> dict[str, Tensor]:
    """Every term, unweighted, by its name in `LossWeights`.

    class_agnostic: prototypes belong to no class: the nearest of all counts for cluster, there is no separation, and L1
    takes in all connections.
    """
    class_of, weight = head.prototypes.class_of, head.last_layer.weight
    terms = {"cross_entropy": F.cross_entropy(output.logits, labels)}
    if class_agnostic:
        return terms | {"cluster": output.distance.amin(dim=1).mean(), "l1": weight.abs().sum()}
    return terms | {
        "cluster": cluster(output.distance, labels, class_of),
        "separation": separation(output.distance, labels, class_of),
        "l1": connection_l1(weight, class_of),
    }


def total_loss(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The weighted sum of `loss_terms`."""
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
