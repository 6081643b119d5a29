"""Checkpoints of the authors' code: their keys and ours, and the arguments that their tensors imply.

The authors' keys: `_root.` + a path of `l.` and `r.` + `_dist_params` (K,) for each leaf, `_net.*` (trunk),
`_add_on.0.weight`, `prototype_layer.prototype_vectors` (P, D, 1, 1). Which prototype belongs to which branch is drawn
when a model of theirs is made, and stands in the pickled module alone, as `_out_map`; so do the numbers of the nodes of
a pruned tree, as `_index`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.models.prototree.tree import Tree
from fgvczoo.nn.backbones import TORCHVISION, recognise_backbone

_ROOT, _LEAF = "_root", "._dist_params"
_VECTORS = "prototype_layer.prototype_vectors"


def options_from_module(modules: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a whole pickled module says beside its tensors: options of the functions below, and arguments of ours.

    modules: the plain values of each inner module by its path, "" being the outermost; in `_out_map` branches stand as
    their paths. Without an `_out_map` there is nothing to say. Raises `FgvczooError` where the nodes have no numbers.
    """
    own = modules.get("", {})
    if not isinstance(own.get("_out_map"), dict):
        return {}, {}
    nodes = {path: values.get("_index") for path, values in modules.items() if path.split(".")[0] == _ROOT}
    if not all(type(index) is int for index in nodes.values()) or not own["_out_map"].keys() <= nodes.keys():
        raise FgvczooError("nodes of its tree have no number; give the model.pth that the authors' code wrote")
    options = {"nodes": nodes, "out_map": {nodes[path]: row for path, row in own["_out_map"].items()}}
    return options, {"leaf_normalization": "counts"} if own.get("_kontschieder_normalization") is True else {}


def state_from_official(
    state: Mapping[str, Tensor],
    *,
    nodes: Mapping[str, int] | None = None,
    out_map: Mapping[int, int] | None = None,
) -> dict[str, Tensor]:
    """The authors' state dict under the keys of `ProtoTreeNetwork`, complete; prototypes and leaves in our order.

    nodes: the number of each node by its path ("_root.l.r"); needed for a pruned tree alone. out_map: branch number ->
    row of its prototype, as keys of JSON, too; a model.pth holds both. Raises `FgvczooError` where they are missing or
    do not fit, and for a key that no ProtoTree has.
    """
    tree, leaves = _tree(state, nodes)
    if out_map is None:
        raise FgvczooError(
            "a state dict does not say which prototype belongs to which node; give the model.pth beside it, or "
            "out_map, which maps the number of each branch to the row of its prototype"
        )
    rows = {int(branch): row for branch, row in out_map.items()}
    vectors = _tensor(state, _VECTORS)
    if vectors.shape[2:] != (1, 1):
        raise FgvczooError(f"{_VECTORS} has shape {tuple(vectors.shape)}; expected prototypes of 1 x 1 cells")
    wanted = [rows.get(branch) for branch in tree.branches]
    if not all(type(row) is int and 0 <= row < len(vectors) for row in wanted):
        raise FgvczooError(f"out_map: not every one of the {len(tree)} branches has one of {len(vectors)} prototypes")
    renamed = {
        "head.prototypes.vectors": vectors[torch.tensor(wanted)].flatten(1),
        "head.leaves.counts": torch.stack([state[f"{leaves[leaf]}{_LEAF}"] for leaf in tree.leaves]),
    }
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if first == "_net":
            renamed[f"backbone.trunk.{rest}"] = value
        elif first == "_add_on":
            renamed[f"head.add_on.{rest}"] = value
        elif first != _ROOT and key != _VECTORS:
            raise FgvczooError(f"{key} is no key of a ProtoTree checkpoint; give the authors' model")
    return renamed


def arguments_from_official(
    state: Mapping[str, Tensor],
    *,
    nodes: Mapping[str, int] | None = None,
    out_map: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """The arguments of `ProtoTreeNetwork` and `ProtoTree` that a state dict of the authors implies; options and errors
    as `state_from_official`. Raises `FgvczooError` for a trunk that is not the authors'."""
    tree, leaves = _tree(state, nodes)
    trunk = {key.removeprefix("_net."): value for key, value in state.items() if key.startswith("_net.")}
    height = _height(state)
    return {
        "num_classes": len(state[f"{leaves[tree.leaves[0]]}{_LEAF}"]),
        "backbone": TORCHVISION[recognise_backbone(trunk, [(name, None) for name in TORCHVISION])],
        "height": height,
        "branches": None if tree == Tree.complete(height) else tree.to_list(),
        "prototype_dim": _tensor(state, _VECTORS).shape[1],
    }


def _height(state: Mapping[str, Tensor]) -> int:
    """Of the complete tree, which has a prototype for each branch, whatever was pruned."""
    count = len(_tensor(state, _VECTORS))
    height = (count + 1).bit_length() - 1
    if count + 1 != 2**height or height < 1:
        raise FgvczooError(f"{_VECTORS} has {count} prototypes; expected 2^height - 1 of them")
    return height


def _tree(state: Mapping[str, Tensor], nodes: Mapping[str, int] | None) -> tuple[Tree, dict[int, str]]:
    """The tree, and the path of each leaf by its number."""
    height = _height(state)
    paths = [key.removesuffix(_LEAF) for key in state if key.startswith(f"{_ROOT}.") and key.endswith(_LEAF)]
    if nodes is None:
        if len(paths) != 2**height:
            raise FgvczooError(
                f"the tree has {len(paths)} of {2**height} leaves: it is pruned, and a state dict does not say which "
                "nodes are left; give the model.pth beside it"
            )
        nodes = {above: _number(above, height) for path in paths for above in _prefixes(path)}
    asking = {above for path in paths for above in _prefixes(path)[:-1]}
    if any(node not in nodes for path in paths for node in _prefixes(path)):
        raise FgvczooError("nodes: some node of the tree has no number")
    rows = [(nodes[path], nodes.get(f"{path}.l", -1), nodes.get(f"{path}.r", -1)) for path in asking]
    return Tree.of(rows, height), {nodes[path]: path for path in paths}


def _prefixes(path: str) -> list[str]:
    """Of "_root.l.r": itself and the nodes above it, the root first."""
    steps = path.split(".")
    return [".".join(steps[:count]) for count in range(1, len(steps) + 1)]


def _number(path: str, height: int) -> int:
    """Of a node in the complete tree: a step to the left adds 1, one to the right skips the left subtree."""
    number = 0
    for depth, side in enumerate(path.split(".")[1:]):
        if side not in ("l", "r") or depth >= height:
            raise FgvczooError(f"{path} is no path in a tree of height {height}")
        number += 1 if side == "l" else 2 ** (height - depth)
    return number


def _tensor(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise FgvczooError(f"no {key} in the checkpoint; give the authors' ProtoTree")
    return state[key]
