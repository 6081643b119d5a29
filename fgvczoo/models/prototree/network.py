"""The network of ProtoTree (Nauta et al., "Neural Prototype Trees for Interpretable Fine-grained Image Recognition",
CVPR 2021).

B images, K classes, P branches with a prototype each, L = P + 1 leaves, D channels, H x W cells of the feature map.
Everything is computed in log space: the counts of a trained leaf differ by hundreds, and their softmax underflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.models.prototree.tree import Tree
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.prototypes import ProjectedHead, PrototypeNetwork, PrototypeVectors
from fgvczoo.ops import nearest_patch, similarity_map
from fgvczoo.ops.nearest_patch.reference import ROOT_EPSILON

Routing = Literal["distributed", "sample_max", "greedy"]
Normalization = Literal["softmax", "counts"]

# Added to a share of counts before its logarithm, as the authors do.
EPSILON = 1e-10


class Output(NamedTuple):
    """What the tree says of a batch.

    distance: (B, P), Euclidean, of each branch's prototype to its nearest patch, at least 1e-7; branches ascending.
    reach: (B, L), the log-probability of reaching each leaf; leaves ascending.
    logits: (B, K), log-probabilities of the classes, over all leaves: the distributed routing.
    """

    distance: Tensor
    reach: Tensor
    logits: Tensor


def log_absent(distance: Tensor) -> Tensor:
    """ln(1 - e^-d), the log-probability of going left, for d >= 1e-7."""
    return torch.log(-torch.expm1(-distance))


class Router(nn.Module):
    """How likely an image reaches the leaves, for the probabilities of all answers at once, level by level."""

    order: Tensor  # (P,) the branches level by level, as places in `Tree.branches`
    above: Tensor  # (P,) of each, its place among the nodes of its level
    leaf: Tensor  # (L,) of each leaf, its place among all nodes level by level

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        place = {branch: number for number, branch in enumerate(tree.branches)}
        order: list[int] = []
        above: list[int] = []
        self.widths: list[int] = []  # branches of each level
        self.whole: list[bool] = []  # whether all nodes of the level are branches
        for level in tree.levels[:-1]:
            asking = [number for number, node in enumerate(level) if node in place]
            order += [place[level[number]] for number in asking]
            above += asking
            self.widths.append(len(asking))
            self.whole.append(len(asking) == len(level))
        nodes = {node: number for number, node in enumerate(node for level in tree.levels for node in level)}
        for name, places in (("order", order), ("above", above), ("leaf", [nodes[leaf] for leaf in tree.leaves])):
            self.register_buffer(name, torch.tensor(places), persistent=False)

    def forward(self, absent: Tensor, present: Tensor) -> Tensor:
        """Log-probabilities (B, P) of both answers of each branch -> those of reaching each leaf, (B, L)."""
        return self.nodes(absent, present).index_select(1, self.leaf)

    def nodes(self, absent: Tensor, present: Tensor) -> Tensor:
        """As `forward`, for all nodes (B, P + L), level by level and from left to right in each."""
        answers = torch.stack([absent, present], dim=2).index_select(1, self.order)
        level = torch.zeros_like(absent[:, :1])
        levels, done = [level], 0
        for width, whole in zip(self.widths, self.whole):
            if not whole:
                level = level.index_select(1, self.above[done : done + width])
            level = (level[:, :, None] + answers[:, done : done + width]).flatten(1)
            levels.append(level)
            done += width
        return torch.cat(levels, dim=1)


class Leaves(nn.Module):
    """The class distributions of the leaves, made of soft counts of training images that are learned without gradients.

    counts: (L, K), the parameters c. normalization: "softmax", or "counts": c / sum(c), that of Kontschieder et al.
    (uniform where the sum is 0).
    """

    def __init__(self, count: int, num_classes: int, normalization: Normalization = "softmax") -> None:
        super().__init__()
        self.normalization = normalization
        start = 0.0 if normalization == "softmax" else 1.0
        self.counts = nn.Parameter(torch.full((count, num_classes), start))

    def log_distribution(self) -> Tensor:
        """(L, K), log-probabilities."""
        if self.normalization == "softmax":
            return F.log_softmax(self.counts, dim=1)
        total = self.counts.sum(dim=1, keepdim=True)
        uniform = torch.full_like(self.counts, 1 / self.counts.shape[1])
        return torch.log(torch.where(total > 0, self.counts / total.where(total > 0, 1), uniform) + EPSILON)

    def joint(self, reach: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of reaching each leaf and getting the image's own class there: (B, L), (B,) -> (B, L).

        Its logsumexp over the leaves is the log-likelihood that training raises, whatever underflows elsewhere.
        """
        return reach + self.log_distribution().T.index_select(0, labels)

    def evidence(self, joint: Tensor, labels: Tensor) -> Tensor:
        """What a batch adds to the counts, (L, K): each image's share in each leaf, in its class's column.

        The share is pi_l sigma(c_l)_y / yhat_y (after Kontschieder et al., "Deep Neural Decision Forests"). An
        image's shares sum to 1, so a batch adds as many counts of a class as it has images of it.
        """
        images = F.one_hot(labels, self.counts.shape[1]).to(joint.dtype)
        return joint.softmax(dim=1).T @ images

    @torch.no_grad()
    def update_(self, evidence: Tensor, before: Tensor, steps: int) -> None:
        """One step of an epoch: c <- relu(c - before / steps) + evidence.

        before: (L, K), the counts when the epoch began; by its end they have been taken away in `steps` equal parts.
        """
        self.counts.sub_(before / steps).relu_().add_(evidence)


class TreeHead(ProjectedHead):
    """Add-on layer, prototypes, and the tree over them. Prototype number i is that of the i-th branch of `tree`."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        tree: Tree,
        dim: int,
        normalization: Normalization = "softmax",
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, dim, 1, bias=False)
        nn.init.xavier_normal_(convolution.weight)
        self.add_on = nn.Sequential(convolution, nn.Sigmoid())
        self.prototypes = PrototypeVectors(len(tree), dim)
        nn.init.normal_(self.prototypes.vectors, 0.5, 0.1)  # features lie in (0, 1)
        self.leaves = Leaves(len(tree) + 1, num_classes, normalization)
        self.tree, self.router = tree, Router(tree)

    def forward(self, trunk_features: Tensor) -> Output:
        return self.head(self.features(trunk_features))

    def head(self, features: Tensor) -> Output:
        """(B, D, H, W) -> distances, reach and class probabilities."""
        distance, reach = self.route(features)
        return Output(distance, reach, self.distributed(reach))

    def route(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, W) -> distances (B, P) and reach (B, L), as `Output` has them."""
        squared, _ = nearest_patch(features, self.prototypes.vectors, metric="l2")
        # Not through the similarity e^-d: next to 1 its float has no digits left for the logarithm of 1 - e^-d.
        distance = torch.sqrt(squared + ROOT_EPSILON)
        return distance, self.router(log_absent(distance), -distance)

    def distributed(self, reach: Tensor) -> Tensor:
        """log of sum_l pi_l sigma(c_l): (B, L) -> (B, K), one matrix product, without a (B, L, K) array."""
        leaves = self.leaves.log_distribution()
        row, column = reach.amax(dim=1, keepdim=True), leaves.amax(dim=0, keepdim=True)
        sums = torch.exp(reach - row) @ torch.exp(leaves - column)
        return torch.log(sums.clamp_min(torch.finfo(sums.dtype).tiny)) + row + column

    def leaf(self, output: Output, routing: Routing) -> Tensor:
        """The one leaf that decides, as a place in `tree.leaves`, (B,) int64.

        sample_max: the most probable one. greedy: where the answers lead that are more likely than not;
        at exactly 1/2 the prototype is absent.
        """
        if routing == "sample_max":
            return output.reach.argmax(dim=1)
        present = self.present(output.distance)
        certain = torch.zeros_like(output.distance)
        never = torch.full_like(certain, -torch.inf)
        return self.router(torch.where(present, never, certain), torch.where(present, certain, never)).argmax(dim=1)

    @staticmethod
    def present(distance: Tensor) -> Tensor:
        """Whether a prototype is present: e^-d > 1/2, (B, P) bool."""
        return distance < math.log(2)

    def logits(self, output: Output, routing: Routing) -> Tensor:
        """Log-probabilities of the classes, (B, K), by any routing."""
        if routing == "distributed":
            return output.logits
        return self.leaves.log_distribution()[self.leaf(output, routing)]

    # -- projection ---------------------------------------------------------------------------------------------------

    def nearest(self, features: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vectors = self.prototypes.vectors if which is None else self.prototypes.vectors[which]
        _, cell, similarity = nearest_patch(features, vectors, metric="l2", activation="exp")
        return similarity, cell

    def nearest_map(self, features: Tensor) -> Tensor:
        return torch.exp(-self.distance_map(features))

    def distance_map(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> the distance of every prototype to every patch, (B, P, H, W)."""
        return torch.sqrt(similarity_map(features, self.prototypes.vectors, metric="l2") + ROOT_EPSILON)

    def classes_below(self) -> Tensor:
        """(P, K) bool: the class is the most likely one of a leaf under the branch."""
        labels = self.leaves.counts.argmax(dim=1)
        found = torch.zeros(len(self.tree), self.leaves.counts.shape[1], dtype=torch.bool, device=labels.device)
        for number, branch in enumerate(self.tree.branches):
            below = self.tree.below(branch)
            found[number, labels[below.start : below.stop]] = True
        return found

    # -- pruning: other shapes ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune_(self, threshold: float) -> Tensor:
        """Drops what pruning drops (see `Tree.pruned`), flat leaves being those without a class of a probability above
        the threshold. Returns the numbers that the prototypes that stay had. Makes new parameters."""
        before = self.tree
        flat = self.leaves.log_distribution().amax(dim=1) <= math.log(threshold)
        self.tree = before.pruned([leaf for leaf, is_flat in zip(before.leaves, flat.tolist()) if is_flat])
        device = self.leaves.counts.device
        kept, leaves = (
            torch.tensor([old.index(node) for node in new], device=device)
            for old, new in ((before.branches, self.tree.branches), (before.leaves, self.tree.leaves))
        )
        self._set(self.prototypes.vectors[kept], self.leaves.counts[leaves])
        return kept

    @torch.no_grad()
    def reshape_(self, tree: Tree) -> None:
        """Room for another tree; the weights of a pruned model are loaded into it afterwards."""
        self.tree = tree
        vectors, counts = self.prototypes.vectors, self.leaves.counts
        self._set(vectors.new_zeros(len(tree), vectors.shape[1]), counts.new_zeros(len(tree) + 1, counts.shape[1]))

    def _set(self, vectors: Tensor, counts: Tensor) -> None:
        self.prototypes.vectors = nn.Parameter(vectors)
        self.leaves.counts = nn.Parameter(counts)
        self.router = Router(self.tree).to(vectors.device)


class ProtoTreeNetwork(PrototypeNetwork):
    """Trunk, add-on layer, and a tree of prototypes.

    Args:
        num_classes: K.
        backbone: a timm architecture.
        height: of the complete tree, which has 2^height leaves.
        branches: (node, left, right) of every branch that is left of it, for a pruned tree; None: all.
        prototype_dim: D.
        leaf_normalization: see `Leaves`.
        out_index, backbone_options: as `Backbone` takes them.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        *,
        height: int = 9,
        branches: Sequence[Sequence[int]] | None = None,
        prototype_dim: int = 256,
        leaf_normalization: Normalization = "softmax",
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if leaf_normalization not in ("softmax", "counts"):
            raise FgvczooError(f"leaf_normalization={leaf_normalization!r}; expected softmax or counts")
        tree = Tree.complete(height) if branches is None else Tree.of(branches, height)
        self.height = height
        self.backbone = Backbone(backbone, out_index=out_index, options=backbone_options)
        self.head = TreeHead(self.backbone.channels, num_classes, tree, prototype_dim, leaf_normalization)

    @property
    def heads(self) -> dict[str, TreeHead]:
        """One set of prototypes, called "tree"."""
        return {"tree": self.head}

    def forward(self, images: Tensor) -> Output:
        """(B, 3, h, w), normalised -> `Output`."""
        return self.head(self.backbone(images))
