"""The network of ProtoPNet (Chen et al., "This Looks Like That", NeurIPS 2019), section 2.1 of the paper.

B images, C classes, P prototypes of h x w cells, D channels, H x W cells of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.prototypes import ClassConnection, PrototypeHead, PrototypeNetwork, Prototypes, class_identity
from fgvczoo.ops import activate, nearest_patch, similarity_map

AddOn = Literal["regular", "bottleneck"]
Activation = Literal["log", "linear"]


class Output(NamedTuple):
    """What the network says of a batch.

    logits (B, C); evidence (B, P), the similarities that the last layer weighs; distance (B, P), the squared distance
    of each prototype to its nearest patch, which the cluster and separation losses read.
    """

    logits: Tensor
    evidence: Tensor
    distance: Tensor


def similarity(distance: Tensor, activation: Activation) -> Tensor:
    """Squared distances >= 0 -> similarities of the same shape, which fall with the distance.

    log: ln((d + 1) / (d + 1e-4)), in (0, 9.21]. linear: -d.
    """
    return -distance if activation == "linear" else activate(distance, activation)


def add_on_layers(channels: int, dim: int, kind: AddOn) -> nn.Sequential:
    """1 x 1 convolutions from the trunk's channels to D, ending in a sigmoid: features lie in (0, 1).

    regular: two convolutions. bottleneck: pairs of them that halve the channels down to D.
    """
    layers: list[nn.Module] = []
    while True:
        width = dim if kind == "regular" else max(dim, channels // 2)
        layers += [nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1)]
        if width == dim:
            break
        layers.append(nn.ReLU())
        channels = width
    layers.append(nn.Sigmoid())
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Head(PrototypeHead):
    """Add-on layers, prototypes and last layer.

    class_of: (P,), the class of each prototype. dim: D. window: h, w.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        class_of: Tensor,
        dim: int,
        window: tuple[int, int] = (1, 1),
        add_on: AddOn = "regular",
        activation: Activation = "log",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.add_on = add_on_layers(channels, dim, add_on)
        self.prototypes = Prototypes(class_of, dim, window)
        self.last_layer = ClassConnection(num_classes, class_of)

    def head(self, features: Tensor) -> Output:
        """(B, D, H, W) -> distances, similarities and logits."""
        distance, _, evidence = self._compare(features, self.prototypes.vectors)
        return Output(self.last_layer(evidence), evidence, distance)

    def _compare(self, features: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distance to the nearest patch, its cell, and the similarity, (B, P) each."""
        if self.activation == "linear":
            distance, cell = nearest_patch(features, vectors, metric="l2")
            return distance, cell, similarity(distance, "linear")
        return nearest_patch(features, vectors, metric="l2", activation=self.activation)

    def distance_map(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> the squared distance of every prototype to every patch, (B, P, H - h + 1, W - w + 1)."""
        return similarity_map(features, self.prototypes.vectors, metric="l2")

    def evidence_map(self, features: Tensor) -> Tensor:
        return similarity(self.distance_map(features), self.activation)

    def nearest(self, features: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vectors = self.prototypes.vectors if which is None else self.prototypes.vectors[which]
        _, cell, evidence = self._compare(features, vectors)
        return evidence, cell

    def nearest_map(self, features: Tensor) -> Tensor:
        return self.evidence_map(features)

    def forward(self, trunk_features: Tensor) -> Output:
        return self.head(self.features(trunk_features))

    # -- pruning: other shapes --------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_(self, kept: Tensor) -> None:
        """Drops all prototypes but those at the indices `kept` (n,), with their connections. Makes new parameters."""
        self._set(self.prototypes.vectors[kept], self.prototypes.class_of[kept], self.last_layer.weight[:, kept])

    @torch.no_grad()
    def resize_(self, count: int) -> None:
        """Room for another number of prototypes; the weights of a pruned model are loaded into it afterwards."""
        vectors, weight = self.prototypes.vectors, self.last_layer.weight
        self._set(
            vectors.new_zeros(count, *vectors.shape[1:]),
            self.prototypes.class_of.new_zeros(count),
            weight.new_zeros(len(weight), count),
        )

    def _set(self, vectors: Tensor, class_of: Tensor, weight: Tensor) -> None:
        self.prototypes.vectors = nn.Parameter(vectors)
        self.prototypes.class_of = class_of
        self.last_layer.weight = nn.Parameter(weight)
        self.last_layer.in_features = len(vectors)


class ProtoPNetNetwork(PrototypeNetwork):
    """Trunk, add-on layers, prototypes, last layer.

    Args:
        num_classes: C.
        backbone: a timm architecture.
        prototypes_per_class: P = C times this, unless `prototype_classes` is given.
        prototype_classes: the class of each prototype, for numbers that differ between classes.
        prototype_dim: D.
        prototype_window: h, w.
        add_on: "regular" or "bottleneck", see `add_on_layers`.
        activation: "log" or "linear", see `similarity`.
        out_index, backbone_options: as `Backbone` takes them.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vgg19",
        *,
        prototypes_per_class: int = 10,
        prototype_classes: Sequence[int] | None = None,
        prototype_dim: int = 128,
        prototype_window: tuple[int, int] = (1, 1),
        add_on: AddOn = "regular",
        activation: Activation = "log",
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if add_on not in ("regular", "bottleneck"):
            raise FgvczooError(f"add_on={add_on!r}; expected regular or bottleneck")
        if activation not in ("log", "linear"):
            raise FgvczooError(f"activation={activation!r}; expected log or linear")
        if prototype_classes is not None and not all(0 <= c < num_classes for c in prototype_classes):
            raise FgvczooError(f"prototype_classes: every entry must be a class, 0..{num_classes - 1}")
        class_of = (
            class_identity(num_classes, prototypes_per_class)
            if prototype_classes is None
            else torch.tensor(prototype_classes, dtype=torch.int64)
        )
        self.backbone = Backbone(backbone, out_index=out_index, options=backbone_options)
        self.head = Head(
            self.backbone.channels, num_classes, class_of, prototype_dim, prototype_window, add_on, activation
        )

    @property
    def heads(self) -> dict[str, Head]:
        """One set of prototypes, called "part"."""
        return {"part": self.head}

    def forward(self, images: Tensor) -> Output:
        """(B, 3, h, w), normalised -> `Output`."""
        return self.head(self.backbone(images))


def weighted_distance_map(features: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
    """Squared distances in which every entry of a prototype has a weight of its own: sum of w (z - p)^2, at least 0.

    features (B, D, H, W); vectors, weights (P, D, h, w), weights > 0 -> (B, P, H - h + 1, W - w + 1). The authors' code
    has this form and does not use it.
    """
    constant = (weights * vectors.square()).sum(dim=(1, 2, 3))[:, None, None]
    products = F.conv2d(features.square(), weights) - 2 * F.conv2d(features, weights * vectors)
    return F.relu(products + constant)
