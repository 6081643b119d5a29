"""How alike the routings of a decision tree decide, and how many questions they ask.

B images, K classes. As ProtoTree (Nauta et al., CVPR 2021, arXiv 2012.02046) is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError

DISTRIBUTED, SINGLE_LEAF = "distributed", ("sample_max", "greedy")


def fidelity(scores: Tensor, reference: Tensor) -> Tensor:
    """Share of images for which both give the same class: scores, reference (B, K) -> scalar in [0, 1]; NaN for none.

    Raises `FgvczooError` when the shapes differ.
    """
    if scores.shape != reference.shape:
        raise FgvczooError(f"fidelity: {tuple(scores.shape)} and {tuple(reference.shape)}; expected two alike (B, K)")
    return (scores.argmax(1) == reference.argmax(1)).double().mean()


class RoutingScores(Metric):
    """Accuracy of every routing, fidelity and path length of those that end in one leaf.

    `update` with the labels (B,), the class scores (B, K) of "distributed", "sample_max" and "greedy", and of the last
    two the depth (B,) of the leaf they end in, which is the number of questions asked.

    `compute` gives float64 scalars: `top1` of the distributed routing, and of each of these two routings R: `top1_R`,
    `fidelity_R` (see `fidelity`, to the distributed routing), `path_length_R`, and its standard deviation, smallest and
    largest value `path_length_R_std`, `_min`, `_max`; all NaN before the first image. Sums are exact: several processes
    give what one gives.
    """

    is_differentiable = False
    full_state_update = False
    images: Tensor
    correct: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("images", "correct"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for routing in SINGLE_LEAF:
            for name in ("correct", "agree", "length", "square"):
                self.add_state(f"{routing}_{name}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{routing}_min", torch.tensor(2**62), dist_reduce_fx="min")
            self.add_state(f"{routing}_max", torch.tensor(-1), dist_reduce_fx="max")

    def update(self, labels: Tensor, scores: Mapping[str, Tensor], depth: Mapping[str, Tensor]) -> None:
        """Adds a batch."""
        self.images += len(labels)
        if not len(labels):
            return
        reference = scores[DISTRIBUTED].argmax(1)
        self.correct += (reference == labels).sum()
        for routing in SINGLE_LEAF:
            chosen, length = scores[routing].argmax(1), depth[routing].to(torch.int64)
            sums = {
                "correct": (chosen == labels).sum(),
                "agree": (chosen == reference).sum(),
                "length": length.sum(),
                "square": length.square().sum(),
            }
            for name, value in sums.items():
                setattr(self, f"{routing}_{name}", getattr(self, f"{routing}_{name}") + value)
            setattr(self, f"{routing}_min", torch.minimum(getattr(self, f"{routing}_min"), length.min()))
            setattr(self, f"{routing}_max", torch.maximum(getattr(self, f"{routing}_max"), length.max()))

    def compute(self) -> dict[str, Tensor]:
        """All scores by name."""
        results = {"top1": self.correct.double() / self.images}
        for routing in SINGLE_LEAF:
            correct, agree, length, square = (
                getattr(self, f"{routing}_{name}").double() / self.images
                for name in ("correct", "agree", "length", "square")
            )
            path = f"path_length_{routing}"
            results |= {
                f"top1_{routing}": correct,
                f"fidelity_{routing}": agree,
                path: length,
                f"{path}_std": (square - length.square()).clamp_min(0).sqrt(),
                f"{path}_min": getattr(self, f"{routing}_min").double().where(self.images > 0, torch.nan),
                f"{path}_max": getattr(self, f"{routing}_max").double().where(self.images > 0, torch.nan),
            }
        return results
