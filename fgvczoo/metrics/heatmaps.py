"""How well an explanation's heat map agrees with the object: content heat map, outside-inside ratio, IoU.

B images; activation maps are H x W cells, heat maps and masks h x w pixels. As ST-ProtoPNet (Wang et al., ICCV 2023,
arXiv 2301.04011) is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError

# A map whose values differ by less than this share of the largest one is constant: the rest is float32 rounding.
CONSTANT = 1e-6


def class_activation(maps: Tensor, class_of: Tensor, classes: Tensor) -> Tensor:
    """Mean map of the prototypes of one class an image: (B, P, H, W), (P,), (B,) -> (B, H, W).

    `class_of` names each prototype's class, `classes` the class to look at in each image. A class without prototypes
    gives 0 everywhere.
    """
    own = (classes[:, None] == class_of).to(maps.dtype)
    return torch.einsum("bp,bphw->bhw", own, maps) / own.sum(1).clamp(min=1)[:, None, None]


def is_constant(maps: Tensor) -> Tensor:
    """(N, H, W) -> (N,) bool: all values are equal, up to float32 rounding."""
    low, high = maps.flatten(1).aminmax(dim=1)
    return high - low <= CONSTANT * torch.maximum(low.abs(), high.abs())


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) -> float32 (N, h, w), bicubic, cell edges on picture edges (OpenCV's INTER_CUBIC)."""
    return F.interpolate(maps[:, None].float(), size=size, mode="bicubic", align_corners=False)[:, 0]


def heatmap(activation: Tensor, size: tuple[int, int]) -> Tensor:
    """Activation as heat in [0, 1] on a picture of `size` (height, width): (B, H, W) -> float32 (B, h, w).

    Bicubic upsampling, then the smallest value becomes 0 and the largest 1. A constant map has no heat: 0 everywhere.

    Raises:
        FgvczooError: not of shape (B, H, W), or not finite.
    """
    if activation.ndim != 3:
        raise FgvczooError(f"heatmap: activation {tuple(activation.shape)}; expected (B, H, W)")
    if not activation.isfinite().all():
        raise FgvczooError("heatmap: an activation is NaN or infinite; the network has diverged, train it anew")
    heat = upsample(activation, size)
    low, high = (t[:, None, None] for t in heat.flatten(1).aminmax(dim=1))
    span = (high - low).masked_fill(is_constant(activation)[:, None, None], 0)
    return torch.where(span > 0, (heat - low) / span, 0)


def object_mask(mask: Tensor) -> Tensor:
    """A mask as read from a file, (h, w) or channels last (h, w, C), -> (h, w) bool: where its first channel is not 0.

    Where 255 means "ignore", as in `Batch.mask`, compare with the wanted class instead. Raises `FgvczooError` for
    another number of dimensions.
    """
    if mask.ndim not in (2, 3):
        raise FgvczooError(f"object_mask: {tuple(mask.shape)}; expected (h, w) or (h, w, channels)")
    return (mask if mask.ndim == 2 else mask[..., 0]) != 0


def content_heatmap(heat: Tensor, mask: Tensor) -> Tensor:
    """CH, mean heat on the object: heat (B, h, w), mask (B, h, w) bool -> float64 (B,) in [0, 1], higher is better.

    NaN where the mask is empty. Raises `FgvczooError` when the shapes differ.
    """
    return _mean_heat(heat, mask)


def outside_inside_ratio(heat: Tensor, mask: Tensor) -> Tensor:
    """OIRR, mean heat off the object by mean heat on it: heat (B, h, w), mask (B, h, w) bool -> float64 (B,), at least
    0, lower is better.

    NaN where there is no such ratio: the mask is empty or the whole picture, or the object has no heat at all (as on a
    constant map). Raises `FgvczooError` when the shapes differ.
    """
    inside = _mean_heat(heat, mask)
    return _mean_heat(heat, ~mask) / inside.where(inside > 0, torch.nan)


def heatmap_iou(heat: Tensor, mask: Tensor, threshold: float = 0.5) -> Tensor:
    """Intersection over union of {heat >= threshold} and the object: heat (B, h, w), mask (B, h, w) bool -> float64
    (B,) in [0, 1], higher is better.

    0 where the mask is empty, and where the union is. Raises `FgvczooError` when the shapes differ.
    """
    _check(heat, mask)
    hot = heat >= threshold
    union = (hot | mask).sum((1, 2))
    return (hot & mask).sum((1, 2)).double() / union.clamp(min=1)


class HeatmapScores(Metric):
    """Content heat map, OIRR and IoU, each the plain mean over its images.

    `update` with activation maps (B, H, W) and B masks (h, w) bool, at the sizes of the original pictures; sizes may
    differ, those of one size are computed together.

    `compute` gives scalars: `content_heatmap`, `oirr`, `iou` (NaN before the first image that counts); `images` seen;
    `constant_maps` among them, whose heat is 0; `content_heatmap_skipped` and `oirr_skipped`, images for which that
    score does not exist (see `content_heatmap`, `outside_inside_ratio`), left out of its mean.

    Sums are float64: several processes give what one gives. Memory does not grow with the number of images.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    counted: Tensor
    images: Tensor
    constant_maps: Tensor

    def __init__(self, threshold: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = threshold
        self.add_state("total", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("constant_maps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, activation: Tensor, masks: Tensor | Sequence[Tensor]) -> None:
        """Adds a batch. Raises `FgvczooError` when the numbers of maps and masks differ."""
        if len(activation) != len(masks):
            raise FgvczooError(f"HeatmapScores: {len(activation)} maps, {len(masks)} masks; expected one mask an image")
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, mask in enumerate(masks):
            by_size.setdefault((mask.shape[-2], mask.shape[-1]), []).append(number)
        for size, numbers in by_size.items():
            heat = heatmap(activation[numbers], size)
            mask = torch.stack([masks[number] for number in numbers]).to(heat.device)
            scores = torch.stack(
                [content_heatmap(heat, mask), outside_inside_ratio(heat, mask), heatmap_iou(heat, mask, self.threshold)]
            )
            self.total += scores.nansum(1)
            self.counted += scores.isfinite().sum(1)
        self.images += len(activation)
        self.constant_maps += is_constant(activation).sum()

    def compute(self) -> dict[str, Tensor]:
        """The means and counts of all images."""
        content, ratio, iou = self.total / self.counted
        skipped = self.images - self.counted
        return {
            "content_heatmap": content,
            "oirr": ratio,
            "iou": iou,
            "images": self.images,
            "constant_maps": self.constant_maps,
            "content_heatmap_skipped": skipped[0],
            "oirr_skipped": skipped[1],
        }


def _mean_heat(heat: Tensor, mask: Tensor) -> Tensor:
    _check(heat, mask)
    return heat.double().where(mask, 0).sum((1, 2)) / mask.sum((1, 2))  # an empty mask gives 0 / 0


def _check(heat: Tensor, mask: Tensor) -> None:
    if heat.shape != mask.shape or heat.ndim != 3 or mask.dtype != torch.bool:
        raise FgvczooError(
            f"heat {tuple(heat.shape)}, mask {tuple(mask.shape)} {mask.dtype}; expected both (B, h, w), the mask bool"
        )
