"""Whether prototypes mean object parts: consistency and stability.

P prototypes, K parts of an object, N pairs of an image and a prototype of its class: a prototype is only examined on
images of its own class. As EvalProtoPNet (arXiv 2212.05946) defines them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.heatmaps import is_constant, upsample

_MAPS = 64  # upsampled at once: 13 MB at 224 x 224


def own_pairs(classes: Tensor, class_of: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of an image and a prototype of its class: classes (B,), class_of (P,) -> image, prototype (N,)."""
    image, prototype = (classes[:, None] == class_of).nonzero(as_tuple=True)
    return image, prototype


def peaks(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Where maps are largest on a picture of `size` (height, width): (N, H, W) -> (N, 2) int64, x and y in pixels.

    Maps are upsampled by bicubic interpolation. Of equal pixels the first in row-major order; 0, 0 of a constant map.
    """
    best = [upsample(part, size).flatten(1).argmax(1) for part in torch.split(maps, _MAPS)]
    index = torch.cat(best or [maps.new_empty(0, dtype=torch.int64)]).masked_fill(is_constant(maps), 0)
    return torch.stack([index % size[1], index // size[1]], dim=1)


def part_hits(maps: Tensor, parts: Tensor, size: tuple[int, int], half_size: int = 36) -> Tensor:
    """Which parts lie where a prototype looks: maps (N, H, W), parts (N, K, 3) -> (N, K) bool.

    Args:
        maps: similarity of the prototype in each cell of the image.
        parts: x, y in pixels of a picture of `size`, cut to whole pixels here, and whether visible.
        size: height and width of the picture that the network saw.
        half_size: a part is hit where it is visible and at most this far from the map's peak in x and in y, in pixels.

    Raises:
        FgvczooError: shapes that do not fit.
    """
    if maps.ndim != 3 or parts.ndim != 3 or parts.shape[2] != 3 or len(maps) != len(parts):
        raise FgvczooError(
            f"part_hits: maps {tuple(maps.shape)}, parts {tuple(parts.shape)}; expected (N, H, W) and (N, K, 3)"
        )
    offset = parts[..., :2].long() - peaks(maps, size)[:, None]
    return (offset.abs().amax(2) <= half_size) & (parts[..., 2] > 0)


def consistency(
    hits: Tensor, visible: Tensor, prototype: Tensor, num_prototypes: int, threshold: float = 0.8
) -> Tensor:
    """Whether each prototype keeps to one part: float64 (P,), 1 or 0, NaN for a prototype without images.

    hits, visible: (N, K) bool. prototype: (N,) the prototype of each pair. It is consistent if some part is hit in at
    least `threshold` of the images where it is visible; one whose images show no part is not. The score is 100 times
    the mean over prototypes that have images.
    """
    return _consistent(*_part_counts(hits, visible, prototype, num_prototypes), threshold)


def stability(hits: Tensor, perturbed_hits: Tensor, prototype: Tensor, num_prototypes: int) -> Tensor:
    """Share of each prototype's images in which noise changes no hit: float64 (P,) in [0, 1], NaN without images.

    hits, perturbed_hits: (N, K) bool, from the image and from `perturb` of it. prototype: (N,). An image that shows no
    part is unchanged. The score is 100 times the mean over prototypes that have images.
    """
    stable, images = _stable_counts(hits, perturbed_hits, prototype, num_prototypes)
    return stable / images


def perturb(images: Tensor, index: Tensor, *, seed: int = 0, std: float = 0.2, limit: float = 0.25) -> Tensor:
    """Normalised images (B, ...) plus Gaussian noise of `std`, clipped to +-`limit`.

    The noise of an image depends on `seed` and its `index` (B,) alone, not on batches or processes.
    """
    noise = [
        torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
        for number in index.tolist()
    ]
    if not noise:
        return images
    return images + (std * torch.stack(noise)).clamp(-limit, limit).to(images)


class Consistency(Metric):
    """Consistency score of P prototypes: the share, in percent, of those that keep to one of K parts; higher is better.

    `update` with the hits (N, K), visible (N, K) and prototype (N,) of `consistency`. `compute` gives scalars:
    `consistency` in 0..100 (NaN if no prototype has an image), and `prototypes_left_out`, those without images.

    Keeps two counts a prototype and part: exact, and several processes give what one gives.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hit: Tensor
    visible: Tensor
    images: Tensor

    def __init__(self, num_prototypes: int, num_parts: int, threshold: float = 0.8, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = threshold
        for name, shape in (("hit", (num_prototypes, num_parts)), ("visible", (num_prototypes, num_parts))):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_prototypes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, hits: Tensor, visible: Tensor, prototype: Tensor) -> None:
        """Adds pairs of an image and a prototype of its class."""
        hit, seen, images = _part_counts(hits, visible, prototype, len(self.images))
        self.hit += hit
        self.visible += seen
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        """The score over all pairs."""
        each = _consistent(self.hit, self.visible, self.images, self.threshold)
        return {"consistency": 100 * each.nanmean(), "prototypes_left_out": (self.images == 0).sum()}


class Stability(Metric):
    """Stability score of P prototypes: how rarely, in percent, noise moves them to other parts; higher is better.

    `update` with the hits (N, K), perturbed_hits (N, K) and prototype (N,) of `stability`. `compute` gives scalars:
    `stability` in 0..100 (NaN if no prototype has an image), and `prototypes_left_out`, those without images.

    Keeps two counts a prototype: exact, and several processes give what one gives.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    stable: Tensor
    images: Tensor

    def __init__(self, num_prototypes: int, **options: Any) -> None:
        super().__init__(**options)
        for name in ("stable", "images"):
            self.add_state(name, torch.zeros(num_prototypes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, hits: Tensor, perturbed_hits: Tensor, prototype: Tensor) -> None:
        """Adds pairs of an image and a prototype of its class."""
        stable, images = _stable_counts(hits, perturbed_hits, prototype, len(self.images))
        self.stable += stable
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        """The score over all pairs."""
        share = self.stable.double() / self.images
        return {"stability": 100 * share.nanmean(), "prototypes_left_out": (self.images == 0).sum()}


def _part_counts(hits: Tensor, visible: Tensor, prototype: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images in which each part is hit (P, K), visible (P, K), and images of each prototype (P,)."""
    _check_pairs(hits, visible, prototype)
    hit, seen = (
        hits.new_zeros(count, hits.shape[1], dtype=torch.int64).index_add_(0, prototype, flags.long())
        for flags in (hits, visible)
    )
    return hit, seen, torch.bincount(prototype, minlength=count)


def _stable_counts(hits: Tensor, perturbed: Tensor, prototype: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Images in which no hit changes (P,), and images (P,), of each prototype."""
    _check_pairs(hits, perturbed, prototype)
    same = (hits == perturbed).all(1)
    return torch.bincount(prototype[same], minlength=count), torch.bincount(prototype, minlength=count)


def _consistent(hit: Tensor, visible: Tensor, images: Tensor, threshold: float) -> Tensor:
    # In float64 the quotient 4 / 5 is the number 0.8. A part never visible gives 0 / 0, which reaches no threshold.
    each = (hit.double() / visible >= threshold).any(1)
    return each.double().masked_fill(images == 0, torch.nan)


def _check_pairs(hits: Tensor, other: Tensor, prototype: Tensor) -> None:
    if hits.ndim != 2 or other.shape != hits.shape or prototype.shape != hits.shape[:1]:
        raise FgvczooError(
            f"pairs of images and prototypes: {tuple(hits.shape)}, {tuple(other.shape)}, {tuple(prototype.shape)}; "
            "expected (N, K), (N, K), (N,)"
        )
