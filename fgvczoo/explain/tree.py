"""The explanation of a decision tree of prototypes: the whole tree, and the path of one image through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.explain.overlay import encode_jpeg
from fgvczoo.explain.page import Explained
from fgvczoo.metrics.heatmaps import upsample
from fgvczoo.nn.prototypes import PrototypeSource, patch_boxes
from fgvczoo.preprocess import Preprocess, read_image
from fgvczoo.tasks.classification import Box, crop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A frame drawn on a prototype's picture, in pixels; a patch is cut inside of it.
_FRAME = 3


@dataclass(frozen=True)
class TreeNode:
    """A branch, which asks whether its prototype is present, or a leaf, which answers with classes.

    number: in pre-order of the complete tree. left, right: the nodes that follow where the prototype is absent and
    present; None for a leaf. source: the training patch that a branch's prototype is, once projected. picture, patch:
    that training image, its patch framed, and the patch alone, JPEG bytes, where they may be shown. classes: the
    likeliest classes of a leaf with their probabilities, best first.
    """

    number: int
    depth: int
    left: int | None = None
    right: int | None = None
    source: PrototypeSource | None = None
    picture: bytes | None = None
    patch: bytes | None = None
    classes: tuple[tuple[str, float], ...] = ()


@dataclass
class WholeTree(Explained):
    """All nodes by number, ascending, the root first. dataset: where the prototypes come from. prototypes_are_patches:
    whether they still equal training patches."""

    nodes: dict[int, TreeNode]
    dataset: str | None
    prototypes_are_patches: bool

    title = "A tree of prototypes"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without pictures."""
        return {
            "dataset": self.dataset,
            "prototypes_are_patches": self.prototypes_are_patches,
            "nodes": [
                {"node": node.number, "classes": [list(pair) for pair in node.classes]}
                if node.left is None
                else {
                    "node": node.number,
                    "absent": node.left,
                    "present": node.right,
                    "source": node.source.to_dict() if node.source is not None else None,
                }
                for node in self.nodes.values()
            ],
        }

    @property
    def head(self) -> str:
        """See `page.Explained`."""
        from fgvczoo.explain.tree_page import HEAD

        return HEAD

    @property
    def closing(self) -> str:
        """See `page.Explained`: the drawing."""
        from fgvczoo.explain.tree_page import drawing

        return drawing(self)

    def section(self, name: str) -> str:
        """See `page.Explained`."""
        from fgvczoo.explain.tree_page import tree_section

        return tree_section(self)

    def figure(self) -> Figure:
        """There is none: a tree of hundreds of nodes needs a page that zooms."""
        raise FgvczooError("a whole tree is drawn as a page; give a name ending in .html or .json")


@dataclass
class Step:
    """One question on the path of an image.

    node: the branch. similarity: of its prototype to the image's nearest patch, e^-distance in (0, 1). present: whether
    the path goes right here. box: that patch on the image, x0, y0, x1, y1 in pixels. map: similarity on the image
    (h, w).
    """

    node: TreeNode
    similarity: float
    present: bool
    box: tuple[float, float, float, float]
    map: np.ndarray = field(repr=False)


@dataclass
class TreeExplanation(Explained):
    """Why an image gets a class: the questions that lead to a leaf.

    image: RGB uint8 (h, w, 3). class_name: the likeliest class of the leaf, or the one that was asked for. predicted:
    by the model's own routing, with the probability of `class_name`. reach: the probability of reaching the leaf.
    followed: whether every answer on the path is the likelier one, as on the greedy path.
    """

    image: np.ndarray
    class_name: str
    predicted: str
    probability: float
    steps: list[Step]
    leaf: TreeNode
    reach: float
    followed: bool
    tree: WholeTree

    @property
    def title(self) -> str:
        """Of the page."""
        return f"Why {self.class_name}?"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without pictures and maps."""
        return {
            "class": self.class_name,
            "predicted": self.predicted,
            "probability": self.probability,
            "leaf": self.leaf.number,
            "leaf_classes": [list(pair) for pair in self.leaf.classes],
            "reach": self.reach,
            "greedy": self.followed,
            "dataset": self.tree.dataset,
            "prototypes_are_patches": self.tree.prototypes_are_patches,
            "path": [
                {
                    "node": step.node.number,
                    "present": step.present,
                    "similarity": step.similarity,
                    "box": list(step.box),
                    "source": step.node.source.to_dict() if step.node.source is not None else None,
                }
                for step in self.steps
            ],
        }

    @property
    def head(self) -> str:
        """See `page.Explained`."""
        return self.tree.head

    @property
    def closing(self) -> str:
        """See `page.Explained`: the whole tree, once a page."""
        return self.tree.closing

    def section(self, name: str) -> str:
        """See `page.Explained`: the path."""
        from fgvczoo.explain.tree_page import path_section

        return path_section(self, name)

    def figure(self) -> Figure:
        """The path as a matplotlib figure: at each node the image, with the patch framed where the prototype is
        present, over the prototype's picture."""
        from fgvczoo.explain.figure import draw_path

        return draw_path(self)


@torch.inference_mode()
def explain_tree(model: Any, *, top: int = 5) -> WholeTree:
    """The whole tree of a model. top: how many classes of a leaf are listed."""
    head = model.network.head
    tree, distribution = head.tree, head.leaves.log_distribution().exp().cpu()
    nodes: dict[int, TreeNode] = {}
    for row, branch in enumerate(tree.branches):
        source = model.sources["tree"][row] if model.sources["tree"] else None
        picture = model.prototype_pictures.get(f"tree.{row}")
        left, right = tree.children[branch]
        nodes[branch] = TreeNode(
            branch,
            tree.depth[branch],
            left,
            right,
            source=source,
            picture=picture,
            patch=_patch(picture, source, model.preprocess) if picture and source else None,
        )
    for leaf, probabilities in zip(tree.leaves, distribution):
        nodes[leaf] = TreeNode(
            leaf, tree.depth[leaf], classes=_likeliest(probabilities, model.class_names, min(top, model.num_classes))
        )
    return WholeTree(dict(sorted(nodes.items())), model.source_dataset, model.prototypes_are_patches)


@torch.inference_mode()
def explain_image(
    model: Any, image: Any, *, target: int | str | None = None, top: int = 5, box: Box | None = None
) -> TreeExplanation:
    """The path of an image through the tree of a model, with the patch that answers each question.

    image, box: as `predict` takes them. target: class index or name: the path to the leaf that adds most to its
    probability; None: the greedy path. top: how many classes of a leaf are listed. Leaves the model in eval mode.
    Raises `FgvczooError` for an unknown target, and as `predict` does.
    """
    picture = crop(read_image(image), box)
    model.eval()
    head = model.network.head
    features = head.features(model.network.backbone(model.preprocess(picture)[None].to(model.device)))
    output = head.head(features)
    tree, greedy = head.tree, int(head.leaf(output, "greedy"))
    if target is None:
        place, explained = greedy, int(head.leaves.counts[greedy].argmax())
    else:
        explained = model.class_index(target)
        place = int((output.reach[0] + head.leaves.log_distribution()[:, explained]).argmax())
    view = explain_tree(model, top=top)
    similarity = head.nearest_map(features)[0]
    rows = {branch: row for row, branch in enumerate(tree.branches)}
    steps = []
    for branch, present in tree.path(tree.leaves[place]):
        map_ = similarity[rows[branch]]
        found = patch_boxes(map_.argmax()[None], (map_.shape[0], map_.shape[1]), model.preprocess.size)
        steps.append(
            Step(
                view.nodes[branch],
                float(torch.exp(-output.distance[0, rows[branch]])),
                present,
                tuple(model.preprocess.boxes_backward(found, *picture.shape[:2])[0].tolist()),
                upsample(map_[None], picture.shape[:2])[0].cpu().numpy(),
            )
        )
    logits = head.logits(output, model.routing)[0]
    return TreeExplanation(
        image=picture,
        class_name=model.class_names[explained],
        predicted=model.class_names[int(logits.argmax())],
        probability=float(logits[explained].exp()),
        steps=steps,
        leaf=view.nodes[tree.leaves[place]],
        reach=float(output.reach[0, place].exp()),
        followed=place == greedy,
        tree=view,
    )


def _likeliest(probabilities: Tensor, names: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    values, classes = probabilities.topk(top)
    return tuple((names[label], value) for label, value in zip(classes.tolist(), values.tolist()))


def _patch(picture: bytes, source: PrototypeSource, preprocess: Preprocess) -> bytes:
    """The patch cut out of a prototype's picture, which is the image as the model saw it, at another size."""
    image = read_image(picture)
    height, width = image.shape[:2]
    row, column = source.cell
    cell = torch.tensor([row * source.grid[1] + column])
    box = preprocess.boxes_backward(patch_boxes(cell, source.grid, preprocess.size), height, width)[0]
    x0, y0, x1, y1 = (round(float(value)) for value in box)
    x0, y0 = min(max(x0 + _FRAME, 0), width - 1), min(max(y0 + _FRAME, 0), height - 1)
    return encode_jpeg(image[y0 : max(min(y1, height) - _FRAME, y0 + 1), x0 : max(min(x1, width) - _FRAME, x0 + 1)])
