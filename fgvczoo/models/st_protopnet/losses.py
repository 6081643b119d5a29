"""The losses of ST-ProtoPNet. Each branch has its own; B images, C classes, K prototypes a class, P = C * K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.models.st_protopnet.network import Branch, BranchOutput
from fgvczoo.nn.prototypes import connection_l1, masked_max, own_class


@dataclass
class LossWeights:
    """Coefficients of the total, as the authors' settings have them."""

    cross_entropy: float = 1.0
    cluster_trivial: float = -0.8
    cluster_support: float = -0.8
    separation_trivial: float = 0.08
    separation_support: float = 0.48
    orthogonality: float = 1e-3
    l1: float = 1e-4
    discrimination: float = 1.0
    closeness: float = 1.0


def cluster(similarity: Tensor, labels: Tensor, class_of: Tensor) -> Tensor:
    """Mean over images of the largest similarity (B, P) to a prototype of the own class; to be raised."""
    return masked_max(similarity, own_class(labels, class_of)).mean()


def separation(similarity: Tensor, labels: Tensor, class_of: Tensor) -> Tensor:
    """Mean over images of the largest similarity (B, P) to a prototype of another class; to be lowered."""
    return masked_max(similarity, ~own_class(labels, class_of)).mean()


def orthogonality(vectors: Tensor, num_classes: int) -> Tensor:
    """Sum over classes of the entrywise L1 norm of P_c P_c^T - I; vectors (P, D) as they are stored."""
    own = vectors.reshape(num_classes, -1, vectors.shape[1])
    gram = own @ own.transpose(1, 2)
    return (gram - torch.eye(gram.shape[1], device=gram.device)).abs().sum()


def class_pair_similarities(vectors: Tensor, num_classes: int) -> Tensor:
    """(P, D) -> (C, C, K, K) products between all prototypes of all pairs of classes, through one matrix product."""
    per_class = len(vectors) // num_classes
    gram = vectors @ vectors.T
    return gram.reshape(num_classes, per_class, num_classes, per_class).transpose(1, 2)


def closeness(vectors: Tensor, num_classes: int) -> Tensor:
    """Support prototypes: mean over ordered class pairs of minus the smallest product; pulls even the farthest
    prototypes of two classes together. 0 for a single class."""
    return -_mean_over_pairs(class_pair_similarities(vectors, num_classes).amin(dim=(2, 3)))


def discrimination(vectors: Tensor, num_classes: int) -> Tensor:
    """Trivial prototypes: mean over ordered class pairs of the largest product; pushes the closest pair apart. 0 for a
    single class."""
    return _mean_over_pairs(class_pair_similarities(vectors, num_classes).amax(dim=(2, 3)))


def _mean_over_pairs(pairs: Tensor) -> Tensor:
    count = len(pairs) * (len(pairs) - 1)
    different = ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
    return (pairs * different).sum() / max(count, 1)


def branch_terms(name: str, branch: Branch, output: BranchOutput, labels: Tensor) -> dict[str, Tensor]:
    """Every term of one branch, unweighted, by its name in `LossWeights` (without the branch's suffix)."""
    class_of, vectors = branch.prototypes.class_of, branch.prototypes.vectors
    num_classes = branch.last_layer.out_features
    terms = {
        "cross_entropy": F.cross_entropy(output.logits, labels),
        "cluster": cluster(output.loss_similarity, labels, class_of),
        "separation": separation(output.loss_similarity, labels, class_of),
        "orthogonality": orthogonality(vectors, num_classes),
        "l1": connection_l1(branch.last_layer.weight, class_of),
    }
    if name == "trivial":
        terms["discrimination"] = discrimination(vectors, num_classes)
    else:
        terms["closeness"] = closeness(vectors, num_classes)
    return terms


def branch_loss(name: str, terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The weighted sum of `branch_terms`."""
    coefficient = {
        "cross_entropy": weights.cross_entropy,
        "cluster": weights.cluster_trivial if name == "trivial" else weights.cluster_support,
        "separation": weights.separation_trivial if name == "trivial" else weights.separation_support,
        "orthogonality": weights.orthogonality,
        "l1": weights.l1,
        "discrimination": weights.discrimination,
        "closeness": weights.closeness,
    }
    return torch.stack([coefficient[key] * term for key, term in terms.items()]).sum()
