"""Prototype layers of part-prototype networks: class identity, class connection, masked extrema, projection.

B images, P prototypes, C classes, D channels; maps are H x W cells, a cell's flat index is row * W + column.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.ops.nearest_patch import EPS


class Prototypes(nn.Module):
    """P learned vectors, each belonging to one class.

    `vectors` (P, D); `class_of` (P,) int64 travels in the state dict, so that it survives pruning.
    """

    class_of: Tensor

    def __init__(self, num_classes: int, per_class: int, dim: int) -> None:
        super().__init__()
        if min(num_classes, per_class, dim) < 1:
            raise FgvczooError(
                f"num_classes={num_classes}, prototypes_per_class={per_class}, prototype_dim={dim}: all must be at least 1"
            )
        self.vectors = nn.Parameter(torch.rand(num_classes * per_class, dim))
        self.register_buffer("class_of", torch.arange(num_classes).repeat_interleave(per_class))

    def __len__(self) -> int:
        return self.vectors.shape[0]

    @torch.no_grad()
    def normalize_(self) -> None:
        """Every vector to unit length, in place; zero vectors stay."""
        self.vectors.copy_(F.normalize(self.vectors, dim=1, eps=EPS))


class ClassConnection(nn.Linear):
    """The last layer of a prototype network: similarities (B, P) -> logits (B, C), no bias.

    Starts at `own` between a prototype and its class and at `other` everywhere else (ProtoPNet, section 2.2).
    """

    def __init__(self, num_classes: int, class_of: Tensor, own: float = 1.0, other: float = -0.5) -> None:
        super().__init__(len(class_of), num_classes, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.where(own_class(torch.arange(num_classes), class_of), own, other))


def own_class(labels: Tensor, class_of: Tensor) -> Tensor:
    """labels (B,), class_of (P,) -> (B, P) bool: prototype j is of the class of image i."""
    return labels[:, None] == class_of[None, :]


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest value of each row where `mask` holds: (B, P), (B, P) -> (B,); 0 in rows where it holds nowhere."""
    best = values.masked_fill(~mask, -torch.inf).amax(dim=1)
    return best.where(mask.any(dim=1), torch.zeros_like(best))


@dataclass(frozen=True)
class PrototypeSource:
    """Where a projected prototype comes from.

    image: the data set's own id of the image. cell: row and column in the feature map. grid: the map's rows and columns.
    box: x0, y0, x1, y1 of the activated region, in pixels of the original picture. value: similarity at projection.
    """

    image: str
    cell: tuple[int, int]
    grid: tuple[int, int]
    value: float
    box: tuple[float, float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrototypeSource:
        """From the JSON values of `to_dict`."""
        return cls(
            image=str(values["image"]),
            cell=tuple(int(v) for v in values["cell"]),  # type: ignore[arg-type]
            grid=tuple(int(v) for v in values["grid"]),  # type: ignore[arg-type]
            value=float(values["value"]),
            box=tuple(float(v) for v in values["box"]),  # type: ignore[arg-type]
        )


@dataclass
class Projector:
    """Finds, for every prototype, the best patch of its own class over a whole data set.

    Feed batches with `update`, in any order and on any number of ranks, then call `finish`. The winner does not depend
    on order or ranks: largest value, ties to the lowest sample index, then to the lowest cell (ProtoPNet, section 2.2).
    """

    class_of: Tensor
    value: Tensor = field(init=False)  # (P,) best value so far
    sample: Tensor = field(init=False)  # (P,) index of its image in the data set, -1: none yet
    cell: Tensor = field(init=False)  # (P,) flat cell
    grid: Tensor = field(init=False)  # (P, 2) rows and columns of the map
    patch: Tensor | None = field(init=False, default=None)  # (P, D)

    def __post_init__(self) -> None:
        count, device = len(self.class_of), self.class_of.device
        self.value = torch.full((count,), -torch.inf, device=device)
        self.sample = torch.full((count,), -1, dtype=torch.int64, device=device)
        self.cell = torch.zeros(count, dtype=torch.int64, device=device)
        self.grid = torch.zeros(count, 2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, value: Tensor, cell: Tensor, labels: Tensor, index: Tensor) -> None:
        """One batch: features (B, D, H, W); value, cell (B, P) as `nearest_patch` gives them, larger is better;
        labels, index (B,). Raises `FgvczooError` when a value is not finite."""
        if not torch.isfinite(value).all():
            raise FgvczooError("projection: a similarity is NaN or infinite; the network has diverged, train it anew")
        rows, columns = features.shape[2:]
        value = value.float().masked_fill(~own_class(labels, self.class_of), -torch.inf)
        best = value.amax(dim=0)
        # Among equal values the lowest sample index wins, whatever the order inside the batch.
        candidates = torch.where(value == best, index[:, None], torch.iinfo(torch.int64).max)
        sample, row = candidates.min(dim=0)
        better = (best > self.value) | ((best == self.value) & (sample < self.sample) & torch.isfinite(best))
        prototype = torch.arange(len(self), device=value.device)
        winner_cell = cell[row, prototype]
        patch = features.flatten(2)[row, :, winner_cell].float()
        self.patch = patch if self.patch is None else torch.where(better[:, None], patch, self.patch)
        self.value = torch.where(better, best, self.value)
        self.sample = torch.where(better, sample, self.sample)
        self.cell = torch.where(better, winner_cell, self.cell)
        self.grid = torch.where(better[:, None], torch.tensor([rows, columns], device=value.device), self.grid)

    def __len__(self) -> int:
        return len(self.class_of)

    def merge_ranks(self) -> None:
        """Makes every rank hold the global winners; nothing to do in a single process. A collective call."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        own = {k: getattr(self, k).cpu() if getattr(self, k) is not None else None for k in _MERGED}
        parts: list[dict[str, Tensor | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        device = self.class_of.device
        for part in parts:
            assert part is not None
            if part["patch"] is None:
                continue  # a rank without images
            other = {k: t.to(device) for k, t in part.items() if t is not None}
            if self.patch is None:
                self.patch = torch.zeros_like(other["patch"])
            better = (other["value"] > self.value) | (
                (other["value"] == self.value) & (other["sample"] < self.sample) & (other["sample"] >= 0)
            )
            for key in _MERGED:
                mine = getattr(self, key)
                setattr(self, key, torch.where(better if mine.ndim == 1 else better[:, None], other[key], mine))

    @property
    def found(self) -> Tensor:
        """(P,) bool: a patch of the prototype's own class was seen."""
        return self.sample >= 0


_MERGED = ("value", "sample", "cell", "grid", "patch")


def duplicates(projector: Projector) -> int:
    """How many prototypes share their patch (image and cell) with a prototype before them."""
    seen = torch.stack([projector.sample, projector.cell], dim=1)[projector.found]
    return len(seen) - len(torch.unique(seen, dim=0))


def high_activation_box(activation: Tensor, percentile: float = 95.0) -> tuple[int, int, int, int]:
    """Smallest rectangle that holds every pixel at or above the percentile: (h, w) -> x0, y0, x1, y1, ends exclusive.

    A constant map gives the whole picture (ProtoPNet, section 3.2 of the paper's analysis).
    """
    threshold = torch.quantile(activation.flatten().double(), percentile / 100)
    rows, columns = torch.nonzero(activation.double() >= threshold, as_tuple=True)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def upsample_map(activation: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) -> (N, h, w) by bicubic interpolation, as the activation maps are shown."""
    return F.interpolate(activation[:, None].float(), size=size, mode="bicubic", align_corners=False)[:, 0]
