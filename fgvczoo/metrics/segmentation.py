"""Seeds of weakly supervised segmentation against masks: mean IoU, with the background's threshold swept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError

# 0.20, 0.21, ..., 0.44: what BAS (Zhai, Wu et al., IJCV 2023) tries.
BACKGROUND = tuple(np.round(np.arange(0.20, 0.445, 0.01), 2).tolist())


def seed_labels(maps: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Maps (K, h, w) of classes (K,), from 0 -> int64 (h, w): 0 where none is above the threshold, else the class of
    the largest, from 1. Of equal maps the first counts. Without classes all is background."""
    if not len(classes):
        return torch.zeros(maps.shape[1:], dtype=torch.int64)
    highest, which = maps.max(0)
    return torch.where(highest > threshold, classes[which] + 1, 0)


class SeedIoU(Metric):
    """Mean IoU over background and C classes, over the pixels of all images.

    num_classes: C. thresholds: of the background, tried one by one.

    `update` with one image: maps (K, h, w), their classes (K,) from 0, its mask (h, w): 0 background, 1..C, 255 left
    out. `compute` gives scalars: miou at the best threshold (the lowest of equals), threshold, images. A class that is
    in no mask and no seed has no IoU and is left out of the mean. Counts only: exact over any number of processes.
    """

    is_differentiable = False
    full_state_update = False
    hits: Tensor
    seeds: Tensor
    pixels: Tensor
    images: Tensor

    def __init__(self, num_classes: int, thresholds: Sequence[float] = BACKGROUND, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.thresholds = num_classes, tuple(thresholds)
        shape = (len(self.thresholds), num_classes + 1)
        for name, size in (("hits", shape), ("seeds", shape), ("pixels", shape[1:]), ("images", ())):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, classes: Tensor, mask: Tensor) -> None:
        """Adds an image. Raises `FgvczooError` when sizes differ and for a mask with other classes."""
        if maps.shape[1:] != mask.shape or len(maps) != len(classes):
            raise FgvczooError(
                f"maps {tuple(maps.shape)} of {len(classes)} classes, mask {tuple(mask.shape)}; expected (K, h, w) and"
                " (h, w)"
            )
        known = mask != 255
        truth = mask[known].long()
        if len(truth) and int(truth.max()) > self.num_classes:
            raise FgvczooError(f"a mask has class {int(truth.max())}; expected 0..{self.num_classes} and 255")
        size = self.num_classes + 1
        self.pixels += torch.bincount(truth, minlength=size)
        for place, threshold in enumerate(self.thresholds):
            found = seed_labels(maps, classes, threshold)[known]
            self.seeds[place] += torch.bincount(found, minlength=size)
            self.hits[place] += torch.bincount(found[found == truth], minlength=size)
        self.images += 1

    def miou_by_threshold(self) -> Tensor:
        """(T,) float64."""
        union = self.seeds + self.pixels - self.hits
        return torch.where(union > 0, self.hits.double() / union, torch.nan).nanmean(1)

    def compute(self) -> dict[str, Tensor]:
        """The best mean IoU and its threshold."""
        values = self.miou_by_threshold()
        place = int(torch.argmax(values))
        threshold = torch.tensor(self.thresholds[place], dtype=torch.float64)
        return {"miou": values[place], "threshold": threshold, "images": self.images}
