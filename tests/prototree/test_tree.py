"""ProtoTree's tree: its shape, routing, counted leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fgvczoo import FgvczooError
from fgvczoo.models.prototree.module import default_threshold
from fgvczoo.models.prototree.network import Leaves, Router, TreeHead, log_absent
from fgvczoo.models.prototree.tree import MAX_HEIGHT, Tree
from tests.prototree.small import prototree

# -- the tree's shape --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 2, 5, 9])
def test_complete_trees_are_numbered_in_pre_order(height: int) -> None:
    tree = Tree.complete(height)
    order: list[int] = []

    def visit(node: int) -> None:
        order.append(node)
        for child in tree.children.get(node, ()):
            visit(child)

    visit(0)
    assert order == list(range(2 ** (height + 1) - 1))
    assert len(tree) == 2**height - 1 and len(tree.leaves) == 2**height
    assert {tree.depth[leaf] for leaf in tree.leaves} == {height}
    for leaf in (tree.leaves[0], tree.leaves[-1]):
        assert [present for _, present in tree.path(leaf)] == [leaf != tree.leaves[0]] * height


def test_impossible_heights_are_refused() -> None:
    for height in (0, -1, MAX_HEIGHT + 1, 10**9):
        with pytest.raises(FgvczooError, match="height"):
            prototree(height=height)


def spliced(tree: Tree, flat: set[int]) -> dict[int, tuple[int, int]]:
    """Pruning as the card describes it, node by node on lists of children and parents."""
    children = {node: list(pair) for node, pair in tree.children.items()}
    parent = {child: node for node, pair in children.items() for child in pair}

    def leaves(node: int) -> list[int]:
        return [node] if node not in children else [leaf for child in children[node] for leaf in leaves(child)]

    is_flat = {node: set(leaves(node)) <= flat for node in [*tree.branches, *tree.leaves]}
    top = [node for node in sorted(is_flat) if is_flat[node] and (node == 0 or not is_flat[parent[node]])]
    for node in top:
        above = parent[node]
        if above == 0:
            continue
        left, right = children[above]
        stays, grandparent = (right if node == left else left), parent[above]
        children[grandparent][children[grandparent].index(above)] = stays
        parent[stays] = grandparent
        del children[above]
    found: dict[int, tuple[int, int]] = {}
    todo = [0]
    while todo:
        node = todo.pop()
        if node in children:
            found[node] = (children[node][0], children[node][1])
            todo += children[node]
    return found


@settings(max_examples=150)
@given(st.integers(1, 5), st.data())
def test_pruning_is_splicing(height: int, draw: st.DataObject) -> None:
    """Also of a tree that was pruned before; and what is left can be written down and read again."""
    tree = Tree.complete(height)
    for _ in range(2):
        flat = set(draw.draw(st.sets(st.sampled_from(tree.leaves))))
        if flat == set(tree.leaves):
            break
        expected = spliced(tree, flat)
        tree = tree.pruned(flat)
        assert tree.children == expected and list(tree.children) == sorted(tree.children)
        assert Tree.of(tree.to_list(), height) == tree
        below = [[tree.leaves[place] for place in tree.below(branch)] for branch in tree.branches]
        first = {branch: [leaf for leaf in tree.leaves if branch in dict(tree.path(leaf))] for branch in tree.branches}
        assert below == list(first.values())


def test_a_tree_whose_leaves_are_all_flat_keeps_two() -> None:
    for height in (1, 3):
        tree = Tree.complete(height)
        assert tree.pruned(tree.leaves).children == {0: (tree.leaves[0], tree.leaves[-1])}


@pytest.mark.parametrize(
    "branches",
    [
        [],
        [[1, 2, 3]],
        [[0, 1, 4], [1, 2, 3]],  # 4 is a branch of the complete tree and has no children here
        [[0, 4, 1], [4, 5, 6], [1, 2, 3]],  # sides exchanged
        [[0, 2, 5], [0, 2, 5]],
        [[0, 0, 5]],
        [[0, 2, 7]],
        [[0, 2, 5], [3, 3, 3]],
        [[0, 2.0, 5]],
        [["0", 2, 5]],
        [[0, None, 5]],
    ],
)
def test_what_is_no_tree_is_refused(branches: list[Any]) -> None:
    with pytest.raises(FgvczooError, match="branches"):
        Tree.of(branches, 2)


# -- routing -----------------------------------------------------------------------------------------------------------


def walked(tree: Tree, present: Tensor, distribution: Tensor) -> tuple[Tensor, Tensor]:
    """One image through the nodes: class probabilities over all leaves, and the greedy leaf's place."""
    places = {leaf: place for place, leaf in enumerate(tree.leaves)}
    rows = {branch: row for row, branch in enumerate(tree.branches)}

    def mix(node: int) -> Tensor:
        if node in places:
            return distribution[places[node]]
        s = present[rows[node]]
        left, right = tree.children[node]
        return (1 - s) * mix(left) + s * mix(right)

    node = 0
    while node in rows:
        node = tree.children[node][int(present[rows[node]] > 0.5)]
    return mix(0), torch.tensor(places[node])


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_routing_is_the_walk_over_nodes(height: int, seed: int, draw: st.DataObject) -> None:
    tree = Tree.complete(height)
    flat = draw.draw(st.sets(st.sampled_from(tree.leaves)))
    tree = tree.pruned(flat)
    torch.manual_seed(seed)
    head = TreeHead(1, 5, tree, 3)
    nn.init.normal_(head.leaves.counts, std=3)
    head = head.double()
    output = head.head(torch.rand(6, 3, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(output.reach.exp().sum(1), torch.ones(6, dtype=torch.float64))
    for image in range(6):
        present = torch.exp(-output.distance[image])
        classes, leaf = walked(tree, present, head.leaves.log_distribution().exp())
        torch.testing.assert_close(output.logits[image].exp(), classes)
        assert head.leaf(output, "greedy")[image] == leaf
        chosen = head.leaf(output, "sample_max")[image]
        assert output.reach[image, chosen] == output.reach[image].max()
        torch.testing.assert_close(head.logits(output, "greedy")[image], head.leaves.log_distribution()[leaf])


def test_a_tie_is_absent_and_a_prototype_on_its_patch_is_present() -> None:
    head = TreeHead(1, 3, Tree.complete(1), 2)
    assert not head.present(torch.tensor(math.log(2)))
    features = torch.full((1, 2, 1, 1), 0.25)
    with torch.no_grad():
        head.prototypes.vectors.copy_(torch.full((1, 2), 0.25))
    output = head.head(features)
    assert float(output.distance.detach()) == pytest.approx(1e-7) and torch.isfinite(output.reach).all()
    assert int(head.leaf(output, "greedy")) == 1
    output.logits.sum().backward()
    assert torch.isfinite(head.prototypes.vectors.grad).all()


def test_distances_next_to_zero_keep_their_digits() -> None:
    """ln(1 - e^-d) where e^-d rounds to 1 - 1e-7: through the similarity nothing would be left."""
    distance = torch.logspace(-7, 1.3, 100)
    expected = torch.log(-torch.expm1(-distance.double()))
    torch.testing.assert_close(log_absent(distance).double(), expected, rtol=1e-5, atol=1e-7)


def test_the_router_counts_every_node() -> None:
    tree = Tree.complete(4).pruned([4, 11, 12, 20])
    present = -torch.rand(3, len(tree))
    nodes = Router(tree).nodes(log_absent(-present), present)
    order = [node for level in tree.levels for node in level]
    reached = dict(zip(order, nodes.T.exp()))
    for node, (left, right) in tree.children.items():
        torch.testing.assert_close(reached[left] + reached[right], reached[node])


# -- leaves ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_a_batch_adds_as_many_counts_as_it_has_images(height: int, classes: int, images: int, seed: int) -> None:
    torch.manual_seed(seed)
    leaves = Leaves(2**height, classes)
    nn.init.normal_(leaves.counts, std=20)
    labels = torch.randint(classes, (images,))
    reach = torch.randn(images, 2**height).mul(30).log_softmax(1)
    evidence = leaves.evidence(leaves.joint(reach, labels), labels)
    torch.testing.assert_close(evidence.sum(0), labels.bincount(minlength=classes).float(), rtol=1e-4, atol=1e-4)
    assert (evidence >= 0).all()


@pytest.mark.parametrize("normalization", ["softmax", "counts"])
def test_the_update_is_the_papers(normalization: Any) -> None:
    """Image by image, leaf by leaf, in float64 and without logarithms."""
    torch.manual_seed(0)
    leaves = Leaves(4, 3, normalization).double()
    with torch.no_grad():
        leaves.counts.copy_(torch.rand(4, 3))
    labels, reach = torch.tensor([0, 2, 2, 1, 0]), torch.randn(5, 4, dtype=torch.float64).log_softmax(1)
    sigma = leaves.log_distribution().exp().detach()
    before, expected = torch.rand(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    for pi, label in zip(reach.exp(), labels):
        onehot = nn.functional.one_hot(label, 3)
        expected += pi[:, None] * sigma * onehot / (pi @ sigma)[label]
    wanted = torch.relu(leaves.counts.detach() - before / 7) + expected
    leaves.update_(leaves.evidence(leaves.joint(reach, labels), labels), before, 7)
    torch.testing.assert_close(leaves.counts.detach(), wanted, rtol=1e-6, atol=1e-8)


def test_an_epoch_from_zero_counts_the_training_set() -> None:
    torch.manual_seed(0)
    head = TreeHead(1, 4, Tree.complete(3), 5)
    labels = torch.randint(4, (50,))
    features, before = torch.rand(50, 5, 3, 3), head.leaves.counts.detach().clone()
    for part in torch.arange(50).split(8):
        joint = head.leaves.joint(head.head(features[part]).reach, labels[part])
        head.leaves.update_(head.leaves.evidence(joint, labels[part]), before, 7)
    torch.testing.assert_close(head.leaves.counts.sum(0).detach(), labels.bincount(minlength=4).float())


def test_counts_that_underflow_leave_finite_losses_and_logits() -> None:
    """Counts of a class that is sure of every leaf: the softmax of the others is 0 in float32."""
    head = TreeHead(1, 3, Tree.complete(2), 4)
    with torch.no_grad():
        head.leaves.counts[:, 0] = 5000
    output = head.head(torch.rand(2, 4, 2, 2))
    joint = head.leaves.joint(output.reach, torch.tensor([1, 2]))
    loss = -joint.logsumexp(1).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(5000, rel=1e-3) and torch.isfinite(output.logits).all()
    torch.testing.assert_close(output.logits[:, 1:].detach(), torch.full((2, 2), -5000.0), rtol=1e-3, atol=0)
    assert torch.isfinite(head.prototypes.vectors.grad).all()
    assert torch.isfinite(head.leaves.evidence(joint, torch.tensor([1, 2]))).all()


def test_a_leaf_without_counts_is_uniform() -> None:
    leaves = Leaves(2, 4, "counts")
    with torch.no_grad():
        leaves.counts[0] = 0
    leaves.log_distribution().sum().backward()
    torch.testing.assert_close(leaves.log_distribution()[0].exp().detach(), torch.full((4,), 0.25))
    assert torch.isfinite(leaves.counts.grad).all()


@pytest.mark.parametrize(("classes", "threshold"), [(200, 0.01), (2000, 0.01), (20, 0.1), (4, 0.5), (2, 0.75)])
def test_uniform_leaves_are_flat_and_certain_ones_are_not(classes: int, threshold: float) -> None:
    assert default_threshold(classes) == pytest.approx(threshold) and 1 / classes < threshold < 1
