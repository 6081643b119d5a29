"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) of whole batches, and what is drawn for a global
batch: the same however it is split between processes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from fgvczoo.errors import FgvczooError

Box = tuple[int, int, int, int]


@dataclass
class Mixing:
    """How batches are mixed: each image with the one at its place counted from the batch's other end.

    mixup, cutmix: alpha of the beta distribution of the image's own share; 0: never.
    probability: how often a batch is mixed at all.
    switch: how often by CutMix, where both are on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise FgvczooError(f"mixing.{name}={getattr(self, name)}; expected 0 or more")
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise FgvczooError(f"mixing.{name}={getattr(self, name)}; expected a number in [0, 1]")

    def draw(self, size: tuple[int, int], generator: np.random.Generator) -> Mix:
        """One batch's mix; size: height and width of its images."""
        mixed, cut = generator.random(2)
        alpha = self.cutmix if (use_cut := self.cutmix > 0 and (not self.mixup or cut < self.switch)) else self.mixup
        if not alpha or mixed >= self.probability:
            return Mix(1.0, None)
        share = float(generator.beta(alpha, alpha))
        if not use_cut:
            return Mix(share, None)
        (height, width), side = size, math.sqrt(1 - share)
        y, x = int(generator.integers(height)), int(generator.integers(width))
        half_y, half_x = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(y - half_y, 0), min(y + half_y, height)
        left, right = max(x - half_x, 0), min(x + half_x, width)
        return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


@dataclass(frozen=True)
class Mix:
    """share: of an image's own pixels and label. box: top, bottom, left, right of what is the partner's; None: all
    pixels are weighted."""

    share: float
    box: Box | None

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) mixed with their partners, as a new tensor."""
        if self.share == 1:
            return images
        others = partners(images)
        if self.box is None:
            return torch.lerp(others, images, self.share)
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return mixed

    def targets(self, values: Tensor) -> Tensor:
        """(B, ...) weighted means with their partners."""
        return values if self.share == 1 else torch.lerp(partners(values), values, self.share)


def partners(values: Tensor) -> Tensor:
    """(B, ...) of this process -> those of the rows counted from the other end of the global batch."""
    mirror = world_size() - 1 - rank()
    if mirror == rank():
        return values.flip(0)
    values, received = values.contiguous(), torch.empty_like(values)
    exchange = [
        distributed.P2POp(distributed.isend, values, mirror),
        distributed.P2POp(distributed.irecv, received, mirror),
    ]
    for request in distributed.batch_isend_irecv(exchange):
        request.wait()
    return received.flip(0)


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if world_size() > 1 else 0


def own_share(values: Tensor, dim: int = 0) -> Tensor:
    """Of what was drawn for a global batch, the part of this process: its contiguous equal share along `dim`."""
    return values.chunk(world_size(), dim)[rank()]


def drawn_seed(epoch: int, batch: int, stream: int) -> tuple[int, ...]:
    """What a draw for the batch of this number in an epoch is seeded with; `stream` keeps kinds of draws apart."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)), epoch, batch, stream


def torch_generator(seed: tuple[int, ...]) -> torch.Generator:
    """On the CPU, seeded with several numbers."""
    (state,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
