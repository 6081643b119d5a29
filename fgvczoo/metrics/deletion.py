"""Deletion and insertion curves: how a score changes as the hottest pixels go, or come.

B images, h x w pixels, S steps. Petsiuk et al., "RISE", BMVC 2018; the defaults are those of ST-ProtoPNet (Wang et al.,
ICCV 2023, arXiv 2301.04011).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.heatmaps import is_constant

ROWS = 8  # of pixels that change in one step: 8 * 224 = 1792 at the papers' size

Score = Callable[[Tensor], Tensor]
"""Images (N, channels, h, w) -> scores (N, C), such as probabilities."""


def deletion_curve(
    score: Score,
    images: Tensor,
    heat: Tensor,
    target: Tensor | None = None,
    *,
    insert: bool = False,
    baseline: Tensor | float = 0.0,
    step: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Scores of one class as pixels change in order of falling heat: (B, S + 1), the first before any has changed.

    Args:
        score: images to scores of C classes. It must treat the images of a batch alone (eval mode).
        images: (B, channels, h, w), as `score` takes them.
        heat: (B, h, w). Pixels of equal heat change in row-major order, so a constant map is deleted from the top.
        target: (B,) the class whose score is followed; None: the best one of each intact image.
        insert: False: begin with the image and set pixels to `baseline`. True: begin with `baseline` and set pixels to
            the image's.
        baseline: a number, or images that broadcast to `images` (blurred ones, say).
        step: pixels a step; None: 8 rows. S = ceil(h * w / step), the last step may be smaller.
        batch_size: images that `score` sees at once; several images' variants share a batch.

    Raises:
        FgvczooError: shapes that do not fit, step or batch_size below 1, heat that is NaN.
    """
    if images.ndim != 4 or heat.shape != (len(images), *images.shape[2:]):
        raise FgvczooError(
            f"deletion_curve: images {tuple(images.shape)}, heat {tuple(heat.shape)}; expected (B, C, h, w), (B, h, w)"
        )
    if heat.isnan().any():
        raise FgvczooError("deletion_curve: heat is NaN; the network has diverged, train it anew")
    height, width = heat.shape[1:]
    step = _step(height, width, step)
    if batch_size < 1:
        raise FgvczooError(f"batch_size={batch_size}; expected at least 1")
    points = len(changed_share(height, width, step))
    if not len(images):
        return images.new_empty(0, points)
    if target is None:
        target = torch.cat([score(part) for part in torch.split(images, batch_size)]).argmax(1)
    # Step at which each pixel changes, counted from 1.
    order = heat.flatten(1).argsort(dim=1, descending=True, stable=True)
    turn = torch.empty_like(order).scatter_(1, order, torch.arange(height * width, device=heat.device).expand_as(order))
    turn = turn.view_as(heat) // step + 1
    end = torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
    old, new = (end, images) if insert else (images, end)
    scores = []
    for variants in torch.split(torch.arange(len(images) * points, device=images.device), batch_size):
        image, done = variants // points, variants % points
        changed = turn[image] <= done[:, None, None]
        by_class = score(torch.where(changed[:, None], new[image], old[image]))
        scores.append(by_class.gather(1, target[image, None])[:, 0])
    return torch.cat(scores).view(len(images), points)


def changed_share(height: int, width: int, step: int | None = None) -> Tensor:
    """Share of the pixels that have changed at each point of a curve: (S + 1,) float64 from 0 to 1."""
    pixels, step = height * width, _step(height, width, step)
    return torch.arange(0, pixels + step, step).clamp(max=pixels).double() / pixels


def area_under_curve(scores: Tensor, share: Tensor) -> Tensor:
    """Area under curves by the trapezoid rule: scores (B, S + 1), share (S + 1,) -> float64 (B,).

    Between the lowest and highest score: in [0, 1] for probabilities. Deletion: lower is better; insertion: higher.
    """
    return torch.trapezoid(scores.double(), share.to(scores.device).double(), dim=1)


class DeletionAUC(Metric):
    """Mean area under the deletion (or insertion) curves of images.

    insert, step, batch_size: as `deletion_curve` takes them.

    `update` with images, their heat, and the callable that scores them. `compute` gives scalars: `deletion_auc` or
    `insertion_auc` (NaN before the first image), `images` seen, `constant_maps` among them: they count, their pixels
    change from the top. Sums are float64: several processes give what one gives.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    images: Tensor
    constant_maps: Tensor

    def __init__(self, insert: bool = False, step: int | None = None, batch_size: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.insert, self.step, self.batch_size = insert, step, batch_size
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("constant_maps", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        score: Score,
        images: Tensor,
        heat: Tensor,
        target: Tensor | None = None,
        baseline: Tensor | float = 0.0,
    ) -> None:
        """Adds a batch; arguments and errors as `deletion_curve`."""
        curve = deletion_curve(
            score,
            images,
            heat,
            target,
            insert=self.insert,
            baseline=baseline,
            step=self.step,
            batch_size=self.batch_size,
        )
        self.total += area_under_curve(curve, changed_share(heat.shape[1], heat.shape[2], self.step)).sum()
        self.images += len(images)
        self.constant_maps += is_constant(heat).sum()

    def compute(self) -> dict[str, Tensor]:
        """The mean and the counts of all images."""
        return {
            "insertion_auc" if self.insert else "deletion_auc": self.total / self.images,
            "images": self.images,
            "constant_maps": self.constant_maps,
        }


def _step(height: int, width: int, step: int | None) -> int:
    step = ROWS * width if step is None else step
    if step < 1 or height * width < 1:
        raise FgvczooError(f"step={step}, images of {height} x {width}: all must be at least 1")
    return step
