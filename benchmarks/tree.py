"""Times ProtoTree's tree against the recursion over its nodes: `python benchmarks/tree.py`.

Features are given: 64 images, 7 x 7 cells. The other side is written after the description of the authors' code:
distances by the expanded square, with one kernel of ones for each prototype, and a pooling; every node a module that
asks its children for their (B, K) outputs and blends them; every leaf a softmax and a copy for each image.

- head: distances, routing, loss, backward; CUB-200-2011's size (height 9, 256 channels, 200 classes).
- tree: the same from given distances on.
- head, height 11: Stanford Cars' size (128 channels, 196 classes).
- leaf update: one step of the derivative-free update of all leaves, from a batch's outputs; there, leaf by leaf.

Both must give the same loss, or the same leaves. Every way runs in a fresh process with one thread: one warm-up, median
of 7 runs, growth of the resident set. Writes results/tree.json and .md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from report import RESULTS, one_thread, two_ways, write
from timing import RUNS, in_fresh_process, timed_with_result
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.models.prototree.network import TreeHead, log_absent
from fgvczoo.models.prototree.tree import Tree

IMAGES = 64
Step = Callable[[], Any]
# Height, channels, classes of each row.
SIZES = {
    "head": (9, 256, 200),
    "tree": (9, 256, 200),
    "head, height 11": (11, 128, 196),
    "leaf update": (9, 256, 200),
}


class Leaf(nn.Module):
    """Answers with its distribution, once for each image."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.counts = nn.Parameter(counts.clone(), requires_grad=False)

    def distribution(self) -> Tensor:
        shifted = self.counts - self.counts.max()
        return F.softmax(shifted, dim=0)

    def forward(self, present: Tensor, attributes: dict[str, Any]) -> Tensor:
        attributes.setdefault("reach", {})[self] = attributes["path"]
        return self.distribution().view(1, -1).expand(len(present), -1).clone()


class Branch(nn.Module):
    """Asks both children and blends their answers."""

    def __init__(self, row: int, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.row, self.left, self.right = row, left, right

    def forward(self, present: Tensor, attributes: dict[str, Any]) -> Tensor:
        here, similarity = attributes["path"], present[:, self.row : self.row + 1]
        attributes["path"] = here * (1 - similarity)
        left = self.left(present, attributes)
        attributes["path"] = here * similarity
        right = self.right(present, attributes)
        return (1 - similarity) * left + similarity * right


def recursive(tree: Tree, counts: Tensor) -> tuple[Branch, list[Leaf]]:
    """The tree as modules, and its leaves from left to right."""
    places = {leaf: place for place, leaf in enumerate(tree.leaves)}
    rows = {branch: row for row, branch in enumerate(tree.branches)}
    leaves: list[Leaf] = []

    def grow(node: int) -> nn.Module:
        if node in places:
            leaves.append(Leaf(counts[places[node]]))
            return leaves[-1]
        left, right = (grow(child) for child in tree.children[node])
        return Branch(rows[node], left, right)

    return grow(0), leaves  # type: ignore[return-value]


def expanded_distances(features: Tensor, vectors: Tensor, ones: Tensor) -> Tensor:
    """(B, P), by the expanded square over all patches, and a pooling for the smallest."""
    squares = F.conv2d(features**2, ones)
    products = F.conv2d(features, vectors[:, :, None, None])
    norms = (vectors**2).sum(1).view(-1, 1, 1)
    distances = torch.sqrt(torch.abs(squares + norms - 2 * products) + 1e-14)
    return -F.max_pool2d(-distances, kernel_size=distances.shape[2:]).flatten(1)


def inputs(name: str) -> tuple[TreeHead, Tensor, Tensor]:
    """A head with counts as after an epoch, features, labels."""
    height, dim, classes = SIZES[name]
    torch.manual_seed(0)
    head = TreeHead(1, classes, Tree.complete(height), dim)
    nn.init.normal_(head.prototypes.vectors, 0.5, 0.02)
    with torch.no_grad():
        head.leaves.counts.copy_(torch.rand_like(head.leaves.counts) * 3)
    head.leaves.requires_grad_(False)
    features = torch.rand(IMAGES, dim, 7, 7) * 0.1 + 0.45
    return head, features, torch.arange(IMAGES) * 3 % classes


def step_recursive(name: str) -> Step:
    head, features, labels = inputs(name)
    vectors, ones = head.prototypes.vectors, torch.ones_like(head.prototypes.vectors)[:, :, None, None]
    root, leaves = recursive(head.tree, head.leaves.counts)
    given = head.route(features)[0].detach()
    if name == "leaf update":
        attributes: dict[str, Any] = {"path": torch.ones(IMAGES, 1)}
        with torch.no_grad():
            output = root(torch.exp(-given), attributes)
        return lambda: leaf_by_leaf(leaves, attributes["reach"], output, labels)
    features.requires_grad_()
    given.requires_grad_()

    def step() -> float:
        distance = given if name == "tree" else expanded_distances(features, vectors, ones)
        output = root(torch.exp(-distance), {"path": torch.ones(IMAGES, 1)})
        loss = F.nll_loss(torch.log(output), labels)
        loss.backward()
        return float(loss.detach())

    return step


@torch.no_grad()
def leaf_by_leaf(leaves: list[Leaf], reach: dict[Leaf, Tensor], output: Tensor, labels: Tensor) -> list[float]:
    """One step of the update, from fresh counts each time it is timed."""
    target = F.one_hot(labels, output.shape[1]).float()
    found = []
    for leaf in leaves:
        before = leaf.counts.clone()
        evidence = (reach[leaf] * leaf.distribution() * target / output).sum(0)
        counts = torch.relu(before - before / 100) + evidence
        found.append(counts)
    return torch.stack(found)[::50, :3].flatten().tolist()


def step_ours(name: str) -> Step:
    head, features, labels = inputs(name)
    given = head.route(features)[0].detach()
    if name == "leaf update":
        with torch.no_grad():
            joint = head.leaves.joint(head.route(features)[1], labels)
        before = head.leaves.counts.clone()

        def update() -> list[float]:
            head.leaves.counts.copy_(before)
            head.leaves.update_(head.leaves.evidence(joint, labels), before, 100)
            return head.leaves.counts[::50, :3].flatten().tolist()

        return update
    features.requires_grad_()
    given.requires_grad_()

    def step() -> float:
        reach = head.router(log_absent(given), -given) if name == "tree" else head.route(features)[1]
        loss = -head.leaves.joint(reach, labels).logsumexp(1).mean()
        loss.backward()
        return float(loss.detach())

    return step


def measure(name: str, way: str) -> dict[str, Any]:
    """For a fresh process."""
    torch.set_num_threads(1)
    step = {"recursion": step_recursive, "ours": step_ours}[way](name)
    return timed_with_result(step)


def main() -> None:
    rows: dict[str, dict[str, Any]] = {}
    for name in SIZES:
        rows[name] = {}
        for way in ("recursion", "ours"):
            rows[name][way] = in_fresh_process(measure, name, way)
        theirs, ours = (torch.tensor(rows[name][way].pop("result")) for way in ("recursion", "ours"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    lines = [
        "# ProtoTree's tree",
        "",
        (
            f"{one_thread()}; {IMAGES} images; median (best) of {RUNS} runs. `python benchmarks/tree.py` writes this "
            "file."
        ),
        "",
        "| part | node by node, ms | here, ms | ratio | extra memory, MiB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [two_ways(name, row["recursion"], row["ours"], (2, 1)) for name, row in rows.items()]
    write(RESULTS, "tree", {"torch": torch.__version__, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
