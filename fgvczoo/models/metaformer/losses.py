"""The loss of MetaFormer: cross entropy with soft targets, its only term.

B images, C classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.1) -> Tensor:
    """(B,) labels -> (B, C): 1 - smoothing + smoothing / C for the label, smoothing / C for the others."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c t_c log softmax(logits)_c, mean over the batch; logits and targets (B, C)."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
