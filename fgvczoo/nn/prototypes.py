"""Prototype layers of part-prototype networks: class identity, class connection, masked extrema, projection, ranking.

B images, P prototypes, C classes, D channels; maps are H x W cells, a cell's flat index is row * W + column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.heatmaps import upsample
from fgvczoo.nn.backbones import Backbone
from fgvczoo.ops.nearest_patch import EPS


def class_identity(num_classes: int, per_class: int) -> Tensor:
    """(P,) int64: the class of each prototype, `per_class` in a row for each class."""
    if min(num_classes, per_class) < 1:
        raise FgvczooError(f"num_classes={num_classes}, prototypes_per_class={per_class}: both must be at least 1")
    return torch.arange(num_classes).repeat_interleave(per_class)


class PrototypeVectors(nn.Module):
    """P learned vectors, uniform in [0, 1] at the start.

    `vectors` (P, D), or (P, D, h, w) where a `window` of cells is given.
    """

    def __init__(self, count: int, dim: int, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        shape = (count, dim, *(window or ()))
        if min(shape) < 1:
            raise FgvczooError(f"prototypes of shape {shape}: every size must be at least 1")
        self.vectors = nn.Parameter(torch.rand(shape))

    def __len__(self) -> int:
        return self.vectors.shape[0]

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of cells that a prototype covers."""
        height, width = self.vectors.shape[2:] or (1, 1)
        return height, width


class Prototypes(PrototypeVectors):
    """P learned vectors, each belonging to one class: `class_of` (P,) int64 travels in the state dict, so that it
    survives pruning."""

    class_of: Tensor

    def __init__(self, class_of: Tensor, dim: int, window: tuple[int, int] | None = None) -> None:
        super().__init__(len(class_of), dim, window)
        self.register_buffer("class_of", class_of)

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


class HeadOutput(Protocol):
    """What a head says of a batch: logits (B, C), and the evidence (B, P) that its last layer weighs."""

    @property
    def logits(self) -> Tensor: ...

    @property
    def evidence(self) -> Tensor: ...


class ProjectedHead(nn.Module, ABC):
    """Add-on layers on a trunk and prototypes that are compared with the patches of its features: what projection and
    the ranking of images see of a paper."""

    add_on: nn.Module
    prototypes: PrototypeVectors

    def features(self, trunk_features: Tensor) -> Tensor:
        """(B, F, H, W) -> (B, D, H', W')."""
        features: Tensor = self.add_on(trunk_features)
        return features

    @abstractmethod
    def nearest(self, features: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Largest similarity and its cell, (B, P) each, by which prototypes are projected and images ranked.

        which: (B, K) int64, the prototypes that each image is compared with; the result is (B, K). None: all.
        """

    @abstractmethod
    def nearest_map(self, features: Tensor) -> Tensor:
        """(B, P, H', W'): the map whose maximum is the value of `nearest`; the box of a projected prototype is its."""

    @torch.no_grad()
    def replace_(self, patches: Tensor, found: Tensor) -> None:
        """Sets the prototypes where `found` (P,) to patches (P, D, h, w); the others stay."""
        vectors = self.prototypes.vectors
        patches = patches.view_as(vectors)
        vectors.copy_(torch.where(found.view(-1, *[1] * (vectors.ndim - 1)), patches, vectors))


class PrototypeHead(ProjectedHead):
    """Prototypes that belong to classes, and a last layer: what analysis and explanation see of a paper, too.

    Logits are `last_layer(evidence)`; the evidence of a prototype is the largest value of its `evidence_map`.
    """

    prototypes: Prototypes
    last_layer: ClassConnection

    @abstractmethod
    def head(self, features: Tensor) -> HeadOutput:
        """(B, D, H, W) -> similarities and logits."""

    @abstractmethod
    def evidence_map(self, features: Tensor) -> Tensor:
        """(B, P, H', W'): the map whose maximum is the evidence; what explanations show."""

    def nearest_own(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `nearest`, but an image is compared with the prototypes of its class only: value, cell and number of the
        prototype, (B, K) each; the number is -1 where its class has fewer than K."""
        own = class_members(self.prototypes.class_of, self.last_layer.out_features)[labels]
        return *self.nearest(features, own.clamp_min(0)), own


class PrototypeNetwork(nn.Module, ABC):
    """One trunk and the heads on it, by name."""

    backbone: Backbone

    @property
    @abstractmethod
    def heads(self) -> Mapping[str, ProjectedHead]:
        """The sets of prototypes, in the order of the paper."""

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, h, w) -> the feature map that each head compares its prototypes with."""
        trunk = self.backbone(images)
        return {name: head.features(trunk) for name, head in self.heads.items()}


def own_class(labels: Tensor, class_of: Tensor) -> Tensor:
    """labels (B,), class_of (P,) -> (B, P) bool: prototype j is of the class of image i."""
    return labels[:, None] == class_of[None, :]


def class_members(class_of: Tensor, num_classes: int) -> Tensor:
    """(P,) -> (C, K) int64: the prototypes of each class in order, K those of the largest; -1 where one has fewer."""
    count = torch.bincount(class_of, minlength=num_classes)
    order = class_of.argsort(stable=True)
    place = torch.arange(len(class_of), device=class_of.device) - (count.cumsum(0) - count)[class_of[order]]
    members = class_of.new_full((num_classes, max(int(count.max()), 1)), -1)
    members[class_of[order], place] = order
    return members


def connection_l1(weight: Tensor, class_of: Tensor) -> Tensor:
    """Sum of |W| (C, P) over the connections of prototypes to classes that are not theirs."""
    other = ~own_class(torch.arange(len(weight), device=weight.device), class_of)
    return (weight.abs() * other).sum()


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest value of each row where `mask` holds: (B, P), (B, P) -> (B,); 0 in rows where it holds nowhere."""
    best = values.masked_fill(~mask, -torch.inf).amax(dim=1)
    return best.where(mask.any(dim=1), torch.zeros_like(best))


def masked_min(values: Tensor, mask: Tensor) -> Tensor:
    """Smallest value of each row where `mask` holds: (B, P), (B, P) -> (B,); 0 in rows where it holds nowhere."""
    return -masked_max(-values, mask)


@dataclass(frozen=True)
class PrototypeSource:
    """Where a projected prototype comes from.

    image: the data set's own id of the image. cell: row and column in the feature map (of the upper left one, where a
    prototype covers several). grid: the map's rows and columns (of places for it). box: x0, y0, x1, y1 of the activated
    region, in pixels of the original picture. value: similarity at projection.
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
    """Finds, for every prototype, the best patch of its own classes over a whole data set.

    Feed batches with `update`, in any order and on any number of ranks, then call `merge_ranks`. The winner does not
    depend on order or ranks: largest value, ties to the lowest sample index, then to the lowest cell (ProtoPNet,
    section 2.2).

    class_of: (P,) int64, or (P, C) bool where a prototype may come from images of several classes. window: cells that
    a prototype covers. any_class: search images of all classes.
    """

    class_of: Tensor
    window: tuple[int, int] = (1, 1)
    any_class: bool = False
    value: Tensor = field(init=False)  # (P,) best value so far
    sample: Tensor = field(init=False)  # (P,) index of its image in the data set, -1: none yet
    cell: Tensor = field(init=False)  # (P,) flat cell
    grid: Tensor = field(init=False)  # (P, 2) rows and columns of the map
    patch: Tensor | None = field(init=False, default=None)  # (P, D, h, w)

    def __post_init__(self) -> None:
        count, device = len(self.class_of), self.class_of.device
        self.value = torch.full((count,), -torch.inf, device=device)
        self.sample = torch.full((count,), -1, dtype=torch.int64, device=device)
        self.cell = torch.zeros(count, dtype=torch.int64, device=device)
        self.grid = torch.zeros(count, 2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        value: Tensor,
        cell: Tensor,
        labels: Tensor,
        index: Tensor,
        which: Tensor | None = None,
    ) -> None:
        """One batch: features (B, D, H, W); value, cell (B, P) as a head's `nearest` gives them, larger is better; or
        value, cell, which (B, K) as `nearest_own` does; labels, index (B,). Raises `FgvczooError` when a value that
        counts is not finite."""
        if which is None:
            which = torch.arange(len(self), device=value.device).expand_as(value)
        counts = which >= 0
        if not self.any_class:
            counts &= self._may_come_from(which.clamp_min(0), labels)
        row, column = torch.nonzero(counts, as_tuple=True)
        value, cell, prototype = value[row, column].float(), cell[row, column], which[row, column]
        check_finite(value)
        # By prototype, then by falling value, then by rising sample index, whatever the order inside the batch.
        order = index[row].argsort()
        order = order[value[order].argsort(stable=True, descending=True)]
        order = order[prototype[order].argsort(stable=True)]
        ordered = prototype[order]
        first = order[torch.cat([ordered.new_ones(1, dtype=torch.bool)[: len(order)], ordered[1:] != ordered[:-1]])]
        chosen, best, sample = prototype[first], value[first], index[row[first]]
        better = (best > self.value[chosen]) | ((best == self.value[chosen]) & (sample < self.sample[chosen]))
        first, chosen = first[better], chosen[better]
        patch = windows_at(features, row[first], cell[first], self.window).float()
        if self.patch is None:
            self.patch = patch.new_zeros(len(self), *patch.shape[1:])
        grid = torch.tensor([n - k + 1 for n, k in zip(features.shape[2:], self.window)], device=value.device)
        self._take(chosen, value=best[better], sample=sample[better], cell=cell[first], patch=patch, grid=grid)

    def _may_come_from(self, which: Tensor, labels: Tensor) -> Tensor:
        if self.class_of.ndim == 2:
            return self.class_of[which, labels[:, None]]
        return labels[:, None] == self.class_of[which]

    def _take(self, chosen: Tensor, **winners: Tensor) -> None:
        for key, theirs in winners.items():
            getattr(self, key)[chosen] = theirs

    def __len__(self) -> int:
        return len(self.class_of)

    def merge_ranks(self) -> None:
        """Makes every rank hold the global winners; nothing to do in a single process. A collective call."""
        for other in gather_ranks({key: getattr(self, key) for key in _MERGED}):
            if other["patch"] is None:
                continue  # a rank without images
            if self.patch is None:
                self.patch = torch.zeros_like(other["patch"])
            better = (other["value"] > self.value) | (
                (other["value"] == self.value) & (other["sample"] < self.sample) & (other["sample"] >= 0)
            )
            chosen = torch.nonzero(better)[:, 0]
            self._take(chosen, **{key: other[key][chosen] for key in _MERGED})

    @property
    def found(self) -> Tensor:
        """(P,) bool: a patch of the prototype's own classes was seen."""
        return self.sample >= 0


_MERGED = ("value", "sample", "cell", "grid", "patch")


@dataclass
class NearestImages:
    """Finds, for every prototype, the k images (or patches) of a whole data set that are most like it, of any class.

    Feed batches with `update`, then call `merge_ranks`, as with `Projector`. Best first, ties to the lowest sample
    index, then to the lowest cell; fewer than k columns where the data set has fewer.
    """

    count: int
    k: int
    value: Tensor = field(init=False)  # (P, k) similarities
    sample: Tensor = field(init=False)  # (P, k) indices in the data set
    cell: Tensor = field(init=False)  # (P, k) flat cells
    label: Tensor = field(init=False)  # (P, k) classes of the images

    def __post_init__(self) -> None:
        if self.k < 1:
            raise FgvczooError(f"nearest images: k={self.k}; expected at least 1")
        self.value = torch.empty(self.count, 0)
        self.sample, self.cell, self.label = (torch.empty(self.count, 0, dtype=torch.int64) for _ in range(3))

    @torch.no_grad()
    def update(self, value: Tensor, cell: Tensor | None, labels: Tensor, index: Tensor) -> None:
        """One batch: value, cell (B, P) of each image's best patch; or the maps (B, P, H, W) and no cell, to rank every
        patch. labels, index (B,). Raises `FgvczooError` when a value is not finite."""
        check_finite(value)
        if cell is None:
            value = value.flatten(2)
            cell = torch.arange(value.shape[2], device=value.device).expand_as(value)
        shape = (*value.shape[:2], -1)
        found = {
            "value": value.float().reshape(shape),
            "cell": cell.reshape(shape),
            "sample": index[:, None, None].expand_as(value.reshape(shape)),
            "label": labels[:, None, None].expand_as(value.reshape(shape)),
        }
        self._keep([{key: tensor.transpose(0, 1).flatten(1).cpu() for key, tensor in found.items()}])

    def merge_ranks(self) -> None:
        """Makes every rank hold the global lists; nothing to do in a single process. A collective call."""
        others = gather_ranks({key: getattr(self, key) for key in _RANKED})
        if others:
            self.__post_init__()
            self._keep(others)

    def _keep(self, parts: list[dict[str, Tensor]]) -> None:
        merged = {key: torch.cat([getattr(self, key), *(part[key] for part in parts)], dim=1) for key in _RANKED}
        # By cell, then stably by sample, then stably by value.
        order = merged["cell"].argsort(dim=1)
        order = order.gather(1, merged["sample"].gather(1, order).argsort(dim=1, stable=True))
        order = order.gather(1, merged["value"].gather(1, order).argsort(dim=1, stable=True, descending=True))
        for key, tensor in merged.items():
            setattr(self, key, tensor.gather(1, order[:, : self.k]))


_RANKED = ("value", "sample", "cell", "label")


def check_finite(value: Tensor) -> None:
    """Raises `FgvczooError` where a similarity is not a number: its place would be arbitrary."""
    if not torch.isfinite(value).all():
        raise FgvczooError("projection: a similarity is NaN or infinite; the network has diverged, train it anew")


def gather_ranks(own: dict[str, Tensor | None]) -> list[dict[str, Any]]:
    """The tensors of all ranks, in their order, on this rank's device; empty in a single process. A collective call."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return []
    devices = [tensor.device for tensor in own.values() if tensor is not None]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {k: tensor.cpu() if tensor is not None else None for k, tensor in own.items()})
    return [{k: tensor.to(devices[0]) if tensor is not None else None for k, tensor in part.items()} for part in parts]


def sum_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on each of them; the tensor itself in a single process. A collective call."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def windows_at(features: Tensor, image: Tensor, cell: Tensor, window: tuple[int, int]) -> Tensor:
    """The window of each of n (image, cell): features (B, D, H, W), image, cell (n,) -> (n, D, h, w), a copy.

    cell: row * (W - w + 1) + column of the window's upper left cell.
    """
    height, width = window
    columns = features.shape[3] - width + 1
    y = (cell // columns)[:, None] + torch.arange(height, device=cell.device)
    x = (cell % columns)[:, None] + torch.arange(width, device=cell.device)
    return features[image[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def duplicates(projector: Projector) -> int:
    """How many prototypes share their patch (image and cell) with a prototype before them."""
    seen = torch.stack([projector.sample, projector.cell], dim=1)[projector.found]
    return len(seen) - len(torch.unique(seen, dim=0))


def activation_boxes(maps: Tensor, size: tuple[int, int], percentile: float = 95.0) -> np.ndarray:
    """Maps (N, H, W) -> (N, 4) int64: the `high_activation_box` of each at the picture's size (height, width)."""
    boxes = [high_activation_box(activation, percentile) for activation in upsample(maps, size)]
    return np.array(boxes, np.int64).reshape(-1, 4)


def patch_map(cells: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Flat cells (N,) of a map of `grid` rows and columns -> (N, h, w): 1 at the cell, 0 elsewhere, upsampled."""
    rows, columns = grid
    return upsample(F.one_hot(cells, rows * columns).float().view(-1, rows, columns), size)


def patch_boxes(cells: Tensor, grid: tuple[int, int], size: tuple[int, int], threshold: float = 0.98) -> np.ndarray:
    """The region of a picture of `size` that a cell stands for: (N,) -> (N, 4) int64, x0, y0, x1, y1, ends exclusive.

    Where its `patch_map` is above 1 - threshold; a larger threshold gives a larger box (ProtoTree, arXiv 2012.02046).
    """
    boxes = []
    for map_ in patch_map(cells, grid, size):
        rows, columns = torch.nonzero(map_ > 1 - threshold, as_tuple=True)
        boxes.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return np.array(boxes, np.int64).reshape(-1, 4)


def high_activation_box(activation: Tensor, percentile: float = 95.0) -> tuple[int, int, int, int]:
    """Smallest rectangle that holds every pixel at or above the percentile: (h, w) -> x0, y0, x1, y1, ends exclusive.

    A constant map gives the whole picture (ProtoPNet, section 3.2 of the paper's analysis).
    """
    threshold = torch.quantile(activation.flatten().double(), percentile / 100)
    rows, columns = torch.nonzero(activation.double() >= threshold, as_tuple=True)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
