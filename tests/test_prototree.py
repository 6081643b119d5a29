"""ProtoTree: its shape, routing, counted leaves, pruning, projection, pages, ensembles, the authors' checkpoints."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.checkpoints import read_checkpoint
from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.explain.page import render, write
from fgvczoo.metrics.routing import RoutingScores
from fgvczoo.models.ensemble import ProbabilityEnsemble
from fgvczoo.models.prototree import ProtoTree
from fgvczoo.models.prototree.module import default_threshold
from fgvczoo.models.prototree.network import Leaves, Router, TreeHead, log_absent
from fgvczoo.models.prototree.tree import MAX_HEIGHT, Tree
from fgvczoo.nn.prototypes import PrototypeSource
from fgvczoo.tasks.stages import Group, Stage
from tests.metrics.processes import in_two_processes

TINY = {"backbone": "test_resnet", "out_index": 2, "preprocess": {"size": [48, 48]}, "prototype_dim": 8, "height": 3}


def prototree(seed: int = 0, **arguments: Any) -> ProtoTree:
    torch.manual_seed(seed)
    return ProtoTree(**{"num_classes": 4, **TINY, **arguments}).eval()


def learned(seed: int = 0, **arguments: Any) -> ProtoTree:
    """With leaves that say something."""
    model = prototree(seed, **arguments)
    with torch.no_grad():
        model.network.head.leaves.counts.copy_(torch.rand_like(model.network.head.leaves.counts) * 6)
    return model


@pytest.fixture(scope="module")
def data(birds: Path) -> SynthBirdsDataModule:
    return SynthBirdsDataModule(root=str(birds), size="tiny", preprocess={"size": [48, 48]}, eval_batch_size=5)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


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


# -- training ----------------------------------------------------------------------------------------------------------

NO_NORM = {"backbone": "test_convnext", "out_index": 1}
TRAIN = {"train": Stage({"backbone": Group(1e-3), "add_on": Group(1e-2), "prototypes": Group(1e-2)}, "AdamW")}


def fit(model: ProtoTree, birds: Path, **options: Any) -> ProtoTree:
    batch, epochs = options.pop("batch_size", 8), options.pop("max_epochs", -1)
    data = SynthBirdsDataModule(
        root=str(birds), size="tiny", cropped=True, preprocess={"size": [48, 48]}, batch_size=batch, eval_batch_size=8
    )
    trainer = L.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "use_distributed_sampler": False, "max_epochs": epochs, **options},
    )
    trainer.fit(model, data)
    return model


def test_accumulated_batches_count_like_whole_ones(birds: Path) -> None:
    one, two = (
        fit(
            prototree(**NO_NORM, stages=TRAIN, plan=[{"train": 2}]),
            birds,
            batch_size=batch,
            accumulate_grad_batches=steps,
        )
        for batch, steps in ((8, 1), (4, 2))
    )
    counts = [model.network.head.leaves.counts for model in (one, two)]
    torch.testing.assert_close(counts[0], counts[1], rtol=1e-3, atol=1e-4)
    assert float(counts[0].sum()) > 10


def test_leaves_by_gradients_or_by_passes(birds: Path) -> None:
    stages = {"train": Stage({**TRAIN["train"].groups, "leaves": Group(1e-2)}, "AdamW")}
    model = prototree(stages=stages, plan=[{"train": 1}])
    before = model.network.head.leaves.counts.detach().clone()
    assert 0.5 < float(before.std()) < 2  # they begin at random
    after = fit(model, birds).network.head.leaves.counts
    assert 0 < float((after - before).abs().max().detach()) < 0.1
    with pytest.raises(FgvczooError, match="negative"):
        prototree(stages=stages, plan=[{"train": 1}], leaf_normalization="counts")
    model = fit(prototree(stages=TRAIN, plan=[{"train": 1}], leaf_passes=3, leaf_normalization="counts"), birds)
    torch.testing.assert_close(model.network.head.leaves.counts.sum(0), torch.full((4,), 4.0))  # 16 images, 4 classes


def test_the_gain_of_the_authors_log_mode(birds: Path) -> None:
    frozen = {"train": Stage({"add_on": Group(0.0), "prototypes": Group(0.0)}, "AdamW")}
    model = fit(prototree(stages=frozen, plan=[{"train": 1}], leaf_gain=math.e), birds)
    torch.testing.assert_close(model.network.head.leaves.counts.sum(0), torch.full((4,), 4 * math.e))


def test_the_last_block_is_a_group_of_its_own(birds: Path) -> None:
    stages = {"frozen": Stage({"last_block": Group(1e-2), "add_on": Group(1e-2)}, "AdamW")}
    model = prototree(last_block="layer2.0", stages=stages, plan=[{"frozen": 1}])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model, birds)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    trunk = {key for key in moved if key.startswith("network.backbone")}
    assert trunk and all(".layer2.0." in key for key in trunk) and "network.head.prototypes.vectors" not in moved
    with pytest.raises(FgvczooError, match=r"layer2\.0"):
        prototree(last_block="layer2.9")


def test_a_class_without_training_images(birds: Path) -> None:
    class Three(SynthBirdsDataModule):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            rows = self.splits["train"]
            for name in ("train", "train_plain", "projection"):
                self.splits[name] = rows[self.reader.labels[rows] != 1]

    data = Three(root=str(birds), size="tiny", preprocess={"size": [48, 48]}, batch_size=4)
    model = prototree(stages=TRAIN, plan=[{"train": 2}, "prune", "project"], pruning_threshold=0.3)
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1
    ).fit(model, data)
    counts = model.network.head.leaves.counts
    assert (counts[:, 1] == 0).all() and torch.isfinite(model.forward(torch.rand(2, 3, 48, 48))).all()


# -- pruning and projection --------------------------------------------------------------------------------------------


def test_pruned_models_travel(tmp_path: Path, data: SynthBirdsDataModule) -> None:
    model = learned()
    head = model.network.head
    with torch.no_grad():
        head.leaves.counts[[0, 5, 6]] = 0
    model.project(data)
    sources, vectors = list(model.sources["tree"]), head.prototypes.vectors.clone()
    model.prototype_pictures = {f"tree.{row}": bytes([row]) for row in range(7)}
    before = model(torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    model.pruning_threshold = 0.26
    model.prune()
    assert head.tree.to_list() == Tree.complete(3).pruned([3, 11, 13]).to_list()
    kept = [Tree.complete(3).branches.index(branch) for branch in head.tree.branches]
    assert torch.equal(head.prototypes.vectors, vectors[kept])
    assert model.sources["tree"] == [sources[row] for row in kept]
    assert list(model.prototype_pictures.values()) == [bytes([row]) for row in kept]
    model.prototype_pictures = {}
    folder = fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={})
    again = fgvczoo.load(folder)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(images), model(images)) and again.state_values() == model.state_values()
    assert not torch.allclose(again(images), before)


@pytest.mark.parametrize("height", [1, 3])
def test_all_leaves_flat(height: int, capsys: pytest.CaptureFixture[str], data: SynthBirdsDataModule) -> None:
    model = prototree(height=height)
    model.prune()
    assert "all leaves are flat" in capsys.readouterr().out
    assert len(model.network.head.tree) == 1 and model(torch.rand(1, 3, 48, 48)).shape == (1, 4)
    model.project(data)
    assert model.sources["tree"][0] is not None


def test_projection_takes_patches_of_the_classes_below(data: SynthBirdsDataModule) -> None:
    model = learned(seed=1, class_agnostic=False)
    head, labels = model.network.head, model.network.head.leaves.counts.argmax(1).tolist()
    tree = head.tree
    model.project(data)
    for row, source in enumerate(model.sources["tree"]):
        assert source is not None
        below = {labels[place] for place in tree.below(tree.branches[row])}
        index = data.find(source.image)
        assert data.row(index)["label"] in below
        features = head.features(model.network.backbone(data.sample(index)["image"][None]))
        patch = features[0, :, source.cell[0], source.cell[1]]
        torch.testing.assert_close(head.prototypes.vectors[row], patch, atol=1e-5, rtol=1e-4)
    similarity, _ = head.nearest(features)
    assert float(similarity[0, row].detach()) > 0.999  # a prototype that is a patch is at distance 0, not at 0.005


def test_a_node_without_images_keeps_its_prototype(
    data: SynthBirdsDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    class Only:
        def __getattr__(self, name: str) -> Any:
            return getattr(data, name)

        def loader(self, split: str) -> Any:
            for batch in data.loader(split):
                keep = batch["label"] == 2
                if keep.any():
                    yield {key: value[keep] for key, value in batch.items()}

    model = prototree()
    with torch.no_grad():
        model.network.head.leaves.counts[:, 0] = 1
        model.network.head.leaves.counts[-1, 2] = 5
    before = model.network.head.prototypes.vectors.clone()
    model.project(Only())  # type: ignore[arg-type]
    on_the_way = [branch for branch, _ in model.network.head.tree.path(14)]
    moved = (model.network.head.prototypes.vectors != before).any(dim=1).tolist()
    assert [branch for branch, is_moved in zip(model.network.head.tree.branches, moved) if is_moved] == on_the_way
    assert "their prototypes stay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("branches", [[0, 1, 8], [1, 1, 1]]),
        ("branches", [[0, 1, 2**62]]),
        ("branches", [[node, node + 1, node + 2] for node in range(100_000)]),
        ("branches", 7),
        ("branches", [[0, 1]]),
        ("branches", [[[], {}, None]]),
        ("branches", None),  # a whole tree, whose tensors are not there
        ("is_pruned", {}),
    ],
)
def test_trees_of_strangers(key: str, value: Any, tmp_path: Path) -> None:
    model = learned()
    model.pruning_threshold = 0.6
    model.prune()
    folder = fgvczoo.save_weights(model, tmp_path / "w", provenance={}, licences={})
    config = json.loads((folder / "config.json").read_text())
    config["state"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    if key == "is_pruned":
        assert fgvczoo.load(folder).network.head.tree == model.network.head.tree
        return
    with pytest.raises(FgvczooError) as error:
        fgvczoo.load(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


# -- evaluation --------------------------------------------------------------------------------------------------------


def some_scores(seed: int, images: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(images, 4, generator=generator) for name in ("distributed", "sample_max", "greedy")}
    depth = {name: torch.randint(1, 9, (images,), generator=generator) for name in ("sample_max", "greedy")}
    return torch.randint(4, (images,), generator=generator), scores, depth


def assert_scores(
    found: dict[str, Tensor], labels: Tensor, scores: dict[str, Tensor], depth: dict[str, Tensor]
) -> None:
    chosen = {name: values.argmax(1) for name, values in scores.items()}
    assert float(found["top1"]) == pytest.approx(float((chosen["distributed"] == labels).double().mean()))
    for name, lengths in depth.items():
        expected = {
            f"top1_{name}": (chosen[name] == labels).double().mean(),
            f"fidelity_{name}": (chosen[name] == chosen["distributed"]).double().mean(),
            f"path_length_{name}": lengths.double().mean(),
            f"path_length_{name}_std": lengths.double().std(correction=0),
            f"path_length_{name}_min": lengths.min(),
            f"path_length_{name}_max": lengths.max(),
        }
        for key, value in expected.items():
            assert float(found[key]) == pytest.approx(float(value), abs=1e-6), key


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 10**6))
def test_routing_scores_are_their_definitions(images: int, batch: int, seed: int) -> None:
    labels, scores, depth = some_scores(seed, images)
    metric = RoutingScores()
    for part in torch.arange(images).split(batch):
        each = [{name: values[part] for name, values in table.items()} for table in (scores, depth)]
        metric.update(labels[part], *each)
    assert_scores(metric.compute(), labels, scores, depth)


def _shared_scores(rank: int) -> dict[str, Tensor]:
    labels, scores, depth = some_scores(3, 11)
    rows = [slice(0, 7), slice(7, 11)][rank]
    metric = RoutingScores()
    metric.update(labels[rows], *({k: v[rows] for k, v in table.items()} for table in (scores, depth)))
    return metric.compute()


def test_routing_scores_over_two_processes(tmp_path: Path) -> None:
    for found in in_two_processes(_shared_scores, tmp_path):
        assert_scores(found, *some_scores(3, 11))


def test_no_images_have_no_scores() -> None:
    assert all(math.isnan(float(value)) for value in RoutingScores().compute().values())


def test_a_model_classifies_by_the_routing_that_it_is_told(data: SynthBirdsDataModule) -> None:
    model = learned()
    scores = model.evaluate(data)
    assert set(scores) == set(RoutingScores().compute())
    model.routing = "greedy"
    prediction = model.predict(picture())
    why = model.explain(picture())
    assert why.class_name == prediction.label == why.predicted
    assert prediction.score == pytest.approx(why.leaf.classes[0][1], rel=1e-5)
    with pytest.raises(FgvczooError, match="routing"):
        prototree(routing="random")


# -- pages -------------------------------------------------------------------------------------------------------------


def test_the_path_is_the_greedy_one(data: SynthBirdsDataModule) -> None:
    model = learned()
    model.project(data)
    why = model.explain(picture())
    head = model.network.head
    output = head.head(head.features(model.network.backbone(model.preprocess(picture())[None])))
    leaf = head.tree.leaves[int(head.leaf(output, "greedy"))]
    assert why.leaf.number == leaf and why.followed
    assert [(step.node.number, step.present) for step in why.steps] == head.tree.path(leaf)
    for step in why.steps:
        assert step.present == (step.similarity > 0.5)
        y, x = np.unravel_index(step.map.argmax(), step.map.shape)
        x0, y0, x1, y1 = step.box
        assert x0 - 6 <= x <= x1 + 6 and y0 - 6 <= y <= y1 + 6
        assert step.node.source is not None
    assert json.loads(json.dumps(why.to_dict()))["leaf"] == leaf
    other = model.explain(picture(), target=1)
    assert other.class_name == "1" and 0 < other.probability < 1
    assert sum(share for _, share in other.leaf.classes) == pytest.approx(1, abs=1e-5)


def test_pages_hold_the_tree_once_and_escape_names(tmp_path: Path, data: SynthBirdsDataModule) -> None:
    from fgvczoo.explain.pictures import prototype_pictures

    names = ["a", "<script>alert(1)</script>", '"><img src=x>', "d"]
    model = learned(class_names=names)
    model.project(data)
    model.prototype_pictures = prototype_pictures(model.sources, data)
    why = [model.explain(picture(seed), target=1) for seed in (0, 1)]
    why[0].steps[0] = replace(
        why[0].steps[0],
        node=replace(
            why[0].steps[0].node, picture=None, source=PrototypeSource("<b>", (0, 0), (1, 1), 0.5, (0, 0, 1, 1))
        ),
    )
    page = write(why, tmp_path / "two.html", names=["<i>.jpg", "two.jpg"]).read_text()
    # Words of the files and classes are text; the script is ours and fetches nothing.
    assert page.count("<script") == 1 and "<img src=x" not in page and "<b>" not in page and "<i>" not in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert page.count("<svg") == 1 and page.count("data-path=") == 2
    assert page.count('class="branch"') == 7 and page.count('class="end"') == 8 and page.count("data-to=") == 14
    assert page.count("<image") == 14  # a patch and its picture in each node
    whole = render([model.explain_model()], [""])
    assert whole.count("<svg") == 1 and "7 prototypes" in whole
    for name in ("w.html", "w.png", "w.json"):
        assert why[1].save(tmp_path / name).stat().st_size > 300
    assert len(json.loads(model.explain_model().save(tmp_path / "t.json").read_text())["nodes"]) == 15
    with pytest.raises(FgvczooError, match=r"\.html"):
        model.explain_model().save(tmp_path / "t.png")
    assert "&lt;script&gt;" in why[1]._repr_html_() or "&amp;lt;script" in why[1]._repr_html_()


def test_the_command_draws_the_tree(tmp_path: Path, fgvczoo_in) -> None:
    folder = fgvczoo.save_weights(learned(), tmp_path / "w", provenance={}, licences={})
    status, out, err = fgvczoo_in("explain", folder, "-o", "tree.html")
    assert status == 0 and "tree.html" in out, err
    assert 'class="branch"' in Path("tree.html").read_text()
    assert "name at least one" in fgvczoo_in("explain", "st-protopnet-synthbirds")[2]


# -- ensembles ---------------------------------------------------------------------------------------------------------


def test_an_ensemble_averages_probabilities() -> None:
    models = [learned(0), learned(1, height=2), learned(2)]
    ensemble = ProbabilityEnsemble(models).eval()
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        expected = torch.stack([model(images).exp() for model in models]).mean(0)
        torch.testing.assert_close(ensemble(images).exp(), expected)
    label = ensemble.predict(picture()).label
    explanations = ensemble.explain(picture())
    assert [why.class_name for why in explanations] == [label] * 3
    assert render(explanations, [""] * 3).count("<svg") == 3
    with pytest.raises(FgvczooError, match="class_names of model 1"):
        ProbabilityEnsemble([learned(), learned(class_names=["a", "b", "c", "d"])])
    with pytest.raises(FgvczooError, match="at least one"):
        ProbabilityEnsemble([])


# -- the authors' checkpoints ------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self, index: int, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self._index, self._log_probabilities = index, False
        self.l, self.r = left, right


class Leaf(nn.Module):
    def __init__(self, index: int, counts: Tensor) -> None:
        super().__init__()
        self._index, self._log_probabilities, self._kontschieder_normalization = index, False, False
        self._dist_params = nn.Parameter(counts, requires_grad=False)


class L2Conv2D(nn.Module):
    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.prototype_vectors = nn.Parameter(vectors)


class AuthorsTree(nn.Module):
    """What the authors' module holds and pickles, with the weights of ours; prototypes in an order of its own."""

    def __init__(self, model: ProtoTree, rows: dict[int, int], normalised: bool = False) -> None:
        super().__init__()
        head, tree = model.network.head, model.network.head.tree
        self._num_classes, self.num_prototypes = model.num_classes, 2**model.network.height - 1
        self._log_probabilities, self._kontschieder_normalization = False, normalised
        counts = dict(zip(tree.leaves, head.leaves.counts.detach()))

        def grow(node: int) -> nn.Module:
            if node in counts:
                return Leaf(node, counts[node].clone())
            return Branch(node, *(grow(child) for child in tree.children[node]))

        self._root = grow(0)
        self._net = model.network.backbone.trunk
        self._add_on = head.add_on
        vectors = torch.rand(self.num_prototypes, head.prototypes.vectors.shape[1], 1, 1)
        for branch, vector in zip(tree.branches, head.prototypes.vectors.detach()):
            vectors[rows[branch], :, 0, 0] = vector
        self.prototype_layer = L2Conv2D(vectors)
        branches = [module for module in self._root.modules() if isinstance(module, Branch)]
        self._parents = {child: branch for branch in branches for child in (branch.l, branch.r)} | {self._root: None}
        self._out_map = {branch: rows[branch._index] for branch in branches}


OFFICIAL = {"backbone": "resnet18", "out_index": None, "prototype_dim": 6}


def shuffled_rows(tree: Tree, height: int) -> dict[int, int]:
    order = torch.randperm(2**height - 1, generator=torch.Generator().manual_seed(7)).tolist()
    return dict(zip(Tree.complete(height).branches, order))


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_pickled_tree(tmp_path: Path, kind: str, is_pruned: bool) -> None:
    model = learned(**OFFICIAL)
    if is_pruned:
        with torch.no_grad():
            model.network.head.leaves.counts[[0, 5]] = 0
        model.pruning_threshold = 0.26
        model.prune()
    rows = shuffled_rows(model.network.head.tree, 3)
    path = tmp_path / "model.pth"
    torch.save(AuthorsTree(model, rows), path, _use_new_zipfile_serialization=kind == "zip")
    modules = read_checkpoint(path).modules
    assert modules[""]["_out_map"]["_root"] == rows[0] and modules["_root.r"]["_index"] == 8
    found = fgvczoo.from_official("prototree", path)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))
    assert found.network.head.tree == model.network.head.tree
    folder = fgvczoo.save_weights(found, tmp_path / "w", provenance={}, licences={})
    assert torch.equal(fgvczoo.load(folder)(images), found(images))


def test_what_a_state_dict_does_not_say() -> None:
    model = learned(**OFFICIAL)
    rows = shuffled_rows(model.network.head.tree, 3)
    state = AuthorsTree(model, rows).state_dict()
    with pytest.raises(FgvczooError, match="which prototype belongs to which node"):
        fgvczoo.from_official("prototree", state)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = fgvczoo.from_official("prototree", state, out_map={str(key): row for key, row in rows.items()})
        assert torch.equal(found(images), model(images))
    for wrong in ({0: 0}, {**rows, 0: 7}, {**rows, 0: "x"}):
        with pytest.raises(FgvczooError, match="out_map"):
            fgvczoo.from_official("prototree", state, out_map=wrong)
    pruned = {key: value for key, value in state.items() if not key.startswith("_root.l.l")}
    with pytest.raises(FgvczooError, match="pruned"):
        fgvczoo.from_official("prototree", pruned, out_map=rows)
    with pytest.raises(FgvczooError, match="no key"):
        fgvczoo.from_official("prototree", {**state, "classifier.weight": torch.rand(2)}, out_map=rows)


def test_normalised_leaves_are_recognised(tmp_path: Path) -> None:
    model = learned(**OFFICIAL, leaf_normalization="counts")
    path = tmp_path / "model.pth"
    torch.save(AuthorsTree(model, shuffled_rows(model.network.head.tree, 3), normalised=True), path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fgvczoo.from_official("prototree", path)(images), model(images))


def test_the_router_counts_every_node() -> None:
    tree = Tree.complete(4).pruned([4, 11, 12, 20])
    present = -torch.rand(3, len(tree))
    nodes = Router(tree).nodes(log_absent(-present), present)
    order = [node for level in tree.levels for node in level]
    reached = dict(zip(order, nodes.T.exp()))
    for node, (left, right) in tree.children.items():
        torch.testing.assert_close(reached[left] + reached[right], reached[node])
