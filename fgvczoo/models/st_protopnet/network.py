"""The network of ST-ProtoPNet: one trunk, two branches of prototypes (Wang et al., ICCV 2023).

B images, C classes, K prototypes a class and branch, P = C * K, D channels, H x W cells.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.prototypes import ClassConnection, PrototypeHead, PrototypeNetwork, Prototypes, class_identity
from fgvczoo.ops import nearest_patch, similarity_map
from fgvczoo.ops.nearest_patch import EPS

Variant = Literal["cropped", "full"]


class BranchOutput(NamedTuple):
    """What one branch says of a batch.

    logits (B, C); evidence (B, P), which the last layer weighs; loss_similarity (B, P), the cosine that the cluster and
    separation losses read.
    """

    logits: Tensor
    evidence: Tensor
    loss_similarity: Tensor


class Output(NamedTuple):
    """Both branches; `logits` (B, C) is their sum (section 3.3 of the paper)."""

    trivial: BranchOutput
    support: BranchOutput

    @property
    def logits(self) -> Tensor:
        return self.trivial.logits + self.support.logits


class Branch(PrototypeHead):
    """Add-on layers, prototypes and last layer of one branch.

    cropped: evidence is the largest projection z . p/|p| over cells, losses read the largest cosine (another cell, it
    may be). full: both are the largest relu(cosine), on features of twice the grid (except behind VGG).
    """

    def __init__(
        self, channels: int, num_classes: int, per_class: int, dim: int, variant: Variant, upsample: bool
    ) -> None:
        super().__init__()
        self.variant = variant
        first, second = nn.Conv2d(channels, dim, 1), nn.Conv2d(dim, dim, 1)
        for layer in (first, second):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        if variant == "cropped":
            self.add_on = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())
        else:
            grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False) if upsample else nn.Identity()
            self.add_on = nn.Sequential(grow, first, second)
        self.prototypes = Prototypes(class_identity(num_classes, per_class), dim)
        self.prototypes.normalize_()  # the authors start from un-normalised ones, which only distorts the first step
        self.last_layer = ClassConnection(num_classes, self.prototypes.class_of)

    @property
    def unit_vectors(self) -> Tensor:
        """(P, D): the prototypes at unit length, as every similarity reads them."""
        return F.normalize(self.prototypes.vectors, dim=1, eps=EPS)

    def head(self, features: Tensor) -> BranchOutput:
        """(B, D, H, W) -> similarities and logits."""
        unit = self.unit_vectors
        if self.variant == "cropped":
            evidence, cosine = nearest_patch(features, unit, metric=("dot", "cosine"))[0]
        else:
            evidence = cosine = F.relu(nearest_patch(features, unit, metric="cosine")[0])
        return BranchOutput(self.last_layer(evidence), evidence, cosine)

    def evidence_map(self, features: Tensor) -> Tensor:
        """(B, P, H, W): the map whose maximum is the evidence; what explanations show."""
        nearest = self.nearest_map(features)
        return nearest if self.variant == "cropped" else F.relu(nearest)

    def nearest(self, features: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Value and cell by which prototypes are projected: z . p/|p| (cropped), the plain cosine (full)."""
        vectors = self.unit_vectors if which is None else self.unit_vectors[which]
        return nearest_patch(features, vectors, metric=self._metric)

    def nearest_map(self, features: Tensor) -> Tensor:
        """(B, P, H, W): the map whose maximum is the value of `nearest`."""
        return similarity_map(features, self.unit_vectors, metric=self._metric)

    def replace_(self, patches: Tensor, found: Tensor) -> None:
        """As every head does, at unit length."""
        super().replace_(F.normalize(patches, dim=1, eps=EPS), found)

    @property
    def _metric(self) -> str:
        return "dot" if self.variant == "cropped" else "cosine"

    def forward(self, trunk_features: Tensor) -> BranchOutput:
        return self.head(self.features(trunk_features))


class STProtoPNetNetwork(PrototypeNetwork):
    """Trunk and both branches.

    Args:
        num_classes: C.
        backbone: a timm architecture.
        variant: "cropped" (pictures cut to their boxes) or "full" (whole pictures): they differ in add-on layers,
            similarity and losses.
        prototypes_per_class: K, in each branch.
        prototype_dim: D.
        out_index, backbone_options: as `Backbone` takes them.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet34",
        *,
        variant: Variant = "cropped",
        prototypes_per_class: int = 5,
        prototype_dim: int = 64,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("cropped", "full"):
            raise FgvczooError(f"variant={variant!r}; expected cropped or full")
        is_vgg = backbone.startswith("vgg")
        self.backbone = Backbone(
            backbone, out_index=out_index, final_pool=not (variant == "full" and is_vgg), options=backbone_options
        )
        shape = (self.backbone.channels, num_classes, prototypes_per_class, prototype_dim, variant, not is_vgg)
        self.trivial = Branch(*shape)
        self.support = Branch(*shape)

    @property
    def branches(self) -> dict[str, Branch]:
        """In the order of the paper: trivial, support."""
        return {"trivial": self.trivial, "support": self.support}

    @property
    def heads(self) -> dict[str, Branch]:
        """The branches, as projection and explanation see them."""
        return self.branches

    def forward(self, images: Tensor) -> Output:
        """(B, 3, h, w), normalised -> both branches' outputs."""
        features = self.backbone(images)
        return Output(self.trivial(features), self.support(features))
