"""Seeds of segmentation from BAS's maps: several scales, each with its mirror (journal form, section on WSSS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.files import atomic_path
from fgvczoo.metrics.segmentation import seed_labels
from fgvczoo.models.bas.network import BASNetwork
from fgvczoo.preprocess import Preprocess

SCALES = (1.0, 0.5, 1.5, 2.0)
EPS = 1e-5


@dataclass(frozen=True)
class Seeds:
    """Maps of the K classes that are present in one picture (h, w), each with a maximum of almost 1.

    classes: (K,) int64, from 0. maps: (K, h, w). coarse: (K, ceil(h / 4), ceil(w / 4)).
    """

    classes: Tensor
    maps: Tensor
    coarse: Tensor

    def labels(self, threshold: float) -> Tensor:
        """int64 (h, w): 0 background, else the class from 1; see `metrics.segmentation.seed_labels`."""
        return seed_labels(self.maps, self.classes, threshold)

    def save(self, path: str | Path, threshold: float = 0.3) -> Path:
        """Writes .npz (classes, maps, coarse) or .png (labels at a threshold, a grey picture of class numbers)."""
        path = Path(path)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if path.suffix == ".png":
                Image.fromarray(self.labels(threshold).to(torch.uint8).numpy()).save(file, "PNG")
            else:
                np.savez(file, classes=self.classes.numpy(), maps=self.maps.numpy(), coarse=self.coarse.numpy())
        return path


def mirrored_maps(network: BASNetwork, image: Tensor, classes: Tensor, cam: bool = False) -> Tensor:
    """Maps of a preprocessed image (3, h, w) plus those of its mirror, turned back: (K, H, W).

    cam: class activation maps (positive parts of the class maps) instead of foreground maps.
    """
    features = network.features(torch.stack([image, image.flip(2)]))
    maps = network.class_maps(features)[:, classes].relu() if cam else network.maps_of(features, classes)
    return maps[0] + maps[1].flip(2)


@torch.no_grad()
def seeds_of(
    network: BASNetwork,
    picture: np.ndarray,
    classes: Tensor,
    preprocess: Preprocess | None = None,
    scales: Sequence[float] = SCALES,
    with_cam: bool = False,
) -> Seeds:
    """Seeds of a picture, RGB uint8 (h, w, 3), for the classes (K,) that are known to be in it.

    preprocess: its normalisation; sizes are those of the scaled picture, bicubic. with_cam: class activation maps, made
    and normalised alike, are added, and the sums normalised again (as the published seeds are). The network must be in
    eval mode.
    """
    height, width = picture.shape[:2]
    total = _scaled(network, picture, classes, preprocess or Preprocess(), scales, cam=False)
    if with_cam:
        plain = _scaled(network, picture, classes, preprocess or Preprocess(), scales, cam=True)
        total = tuple(_normalized(one + other) for one, other in zip(total, plain))
    coarse, fine = total
    return Seeds(classes.cpu(), fine[:, :height, :width], coarse)


def _scaled(
    network: BASNetwork,
    picture: np.ndarray,
    classes: Tensor,
    preprocess: Preprocess,
    scales: Sequence[float],
    cam: bool,
) -> tuple[Tensor, ...]:
    height, width = picture.shape[:2]
    # A grid of stride 4, and the picture itself with sides that 16 divides.
    goals = [(-(-height // 4), -(-width // 4)), (-(-height // 16) * 16, -(-width // 16) * 16)]
    sums = [torch.zeros(len(classes), *goal) for goal in goals]
    if not len(classes):
        return tuple(sums)
    device = network.generator.weight.device
    for scale in scales:
        size = round(height * scale), round(width * scale)
        image = replace(preprocess, size=size, crop="squash", interpolation="bicubic")(picture).to(device)
        maps = mirrored_maps(network, image, classes.to(device), cam)[None].float().cpu()
        for place, goal in enumerate(goals):
            sums[place] += F.interpolate(maps, size=goal, mode="bilinear", align_corners=False)[0]
    return tuple(_normalized(values) for values in sums)


def _normalized(maps: Tensor) -> Tensor:
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + EPS) if len(maps) else maps
