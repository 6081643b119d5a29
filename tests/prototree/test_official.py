"""ProtoTree: its authors' checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.checkpoints import read_checkpoint
from fgvczoo.models.prototree import ProtoTree
from fgvczoo.models.prototree.tree import Tree
from tests.prototree.small import learned


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
