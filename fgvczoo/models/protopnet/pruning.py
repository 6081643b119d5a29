"""Which prototypes stay: those whose nearest training images are of their own class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError


@dataclass
class Pruning:
    """When a prototype goes: fewer than `threshold` of its nearest `neighbours` training images are of its class.

    keep_one: of a class that would lose all its prototypes, the one with most such images stays; the authors let a
    class lose them all.
    """

    neighbours: int = 6
    threshold: int = 3
    keep_one: bool = True


def kept_prototypes(nearest_labels: Tensor, class_of: Tensor, pruning: Pruning) -> Tensor:
    """Indices of the prototypes that stay, ascending.

    nearest_labels: (P, k), the classes of the k images nearest to each. class_of: (P,). Among equals the lowest index
    stays. Raises `FgvczooError` when none would stay.
    """
    own = (nearest_labels == class_of[:, None]).sum(dim=1)
    keep = own >= pruning.threshold
    if pruning.keep_one:
        for label in torch.unique(class_of[~keep]).tolist():
            members = torch.nonzero(class_of == label).flatten()
            if not keep[members].any():
                keep[members[own[members].argmax()]] = True
    if not keep.any():
        raise FgvczooError(
            f"pruning: no prototype has {pruning.threshold} images of its class among its {nearest_labels.shape[1]} "
            "nearest; lower pruning.threshold, or set pruning.keep_one"
        )
    return torch.nonzero(keep).flatten()
