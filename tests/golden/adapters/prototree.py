"""ProtoTree's cases through `fgvczoo.models.prototree` and what it shares with other prototype networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import accuracy

from fgvczoo.metrics.heatmaps import heatmap
from fgvczoo.metrics.routing import fidelity
from fgvczoo.models.prototree.network import Output, ProtoTreeNetwork, TreeHead, log_absent
from fgvczoo.models.prototree.official import arguments_from_official, state_from_official
from fgvczoo.models.prototree.tree import Tree
from fgvczoo.nn.prototypes import Projector, patch_boxes, patch_map
from tests.golden.adapters.protopnet import gradient, norm_of_gradients
from tests.golden.case import Case

SINGLE_LEAF = ("sample_max", "greedy")


def run(case: Case) -> dict[str, Any]:
    families = {
        "head": head,
        "leaf": leaf_update,
        "project": projection,
        "prune": pruning,
        "full": whole_network,
        "patch": patches,
    }
    return families[case.config["runner"]](case)


def head(case: Case) -> dict[str, Any]:
    """Routings, losses and gradients on given features."""
    module, features = build_head(case), case.inputs["features"].clone().requires_grad_()
    labels, log = case.inputs["labels"], in_logs(case)
    output = module.head(features)
    joint = module.leaves.joint(output.reach, labels)
    loss = -joint.logsumexp(1).mean()
    loss.backward()
    gradients = [gradient(tensor) for tensor in (features, module.prototypes.vectors, module.leaves.counts)]
    with torch.no_grad():
        return {
            **routed(module, output, labels, log),
            "distances": module.distance_map(features),
            "min_distances": output.distance,
            "leaf_index": torch.tensor(module.tree.leaves),
            "leaf_distribution": shown(module.leaves.log_distribution(), log),
            "branch_index": torch.tensor(module.tree.branches),
            "branch_right": shown(-output.distance, log).T,
            "loss": loss,
            "grad_features_norm": gradients[0].norm(),
            "grad_prototypes_norm": gradients[1].norm(),
            "grad_prototypes": gradients[1],
            "grad_leaf_params_norm": gradients[2].norm(),
        }


def routed(module: TreeHead, output: Output, labels: Tensor, log: bool) -> dict[str, Tensor]:
    """What all three routings say of a batch."""
    depth = torch.tensor([module.tree.depth[leaf] for leaf in module.tree.leaves])
    result = {
        "output": shown(output.logits, log),
        "prediction": output.logits.argmax(1),
        "accuracy_distributed": share(output.logits, labels),
        **node_paths(module, output, log),
    }
    for routing in SINGLE_LEAF:
        logits, leaf = module.logits(output, routing), module.leaf(output, routing)
        result |= {
            f"{routing}_output": shown(logits, log),
            f"{routing}_leaf": torch.tensor(module.tree.leaves)[leaf],
            f"{routing}_prediction": logits.argmax(1),
            f"fidelity_{routing}": fidelity(logits, output.logits),
            f"accuracy_{routing}": share(logits, labels),
            f"path_length_{routing}": depth[leaf],
        }
    return result


def node_paths(module: TreeHead, output: Output, log: bool) -> dict[str, Tensor]:
    """The nodes, ascending, and how likely each is reached, (nodes, B)."""
    reach = module.router.nodes(log_absent(output.distance), -output.distance)
    nodes = torch.tensor([node for level in module.tree.levels for node in level])
    order = nodes.argsort()
    return {"node_index": nodes[order], "node_path": shown(reach[:, order], log).T}


def leaf_update(case: Case) -> dict[str, Tensor]:
    """Two epochs of interleaved updates, and passes with fixed leaves."""
    features, labels, size = case.inputs["features"], case.inputs["labels"], case.config["batch_size"]
    batches = list(zip(features.split(size), labels.split(size)))
    result = {}
    for name, gain in (("linear", 1.0), ("log_official", math.e), ("log_fixed", 1.0)):
        module = build_head(case)
        for epoch in (1, 2):
            before, losses, correct = module.leaves.counts.detach().clone(), [], []
            for images, own in batches:
                with torch.no_grad():
                    output = module.head(images)
                    joint = module.leaves.joint(output.reach, own)
                    module.leaves.update_(gain * module.leaves.evidence(joint, own), before, len(batches))
                losses.append(-joint.logsumexp(1).mean())
                correct.append(share(output.logits, own))
            result |= {
                f"{name}_epoch{epoch}_leaf_params": module.leaves.counts.detach().clone(),
                f"{name}_epoch{epoch}_loss": torch.stack(losses).mean(),
                f"{name}_epoch{epoch}_accuracy": torch.stack(correct).mean(),
            }
    for name, normalization, passes in (("softmax", "softmax", 1), ("normalised", "counts", 10)):
        module = build_head(case, normalization)
        with torch.no_grad():
            for _ in range(passes):
                evidence = torch.zeros_like(module.leaves.counts)
                for images, own in batches:
                    evidence += module.leaves.evidence(module.leaves.joint(module.head(images).reach, own), own)
                module.leaves.counts.copy_(evidence)
            result[f"kontschieder_{name}_leaf_params"] = module.leaves.counts
            result[f"kontschieder_{name}_leaf_distribution"] = module.leaves.log_distribution().exp()
    return result


@torch.no_grad()
def projection(case: Case) -> dict[str, Tensor]:
    """Prototypes moved onto their nearest patches, of any image and of images of the classes below."""
    features, labels, result = case.inputs["features"], case.inputs["labels"], {}
    index = torch.arange(len(labels))
    for name, constrained in (("free", False), ("class_constrained", True)):
        module = build_head(case)
        projector = Projector(module.classes_below(), any_class=not constrained)
        for part in index.split(case.config["batch_size"]):
            projector.update(features[part], *module.nearest(features[part]), labels[part], part)
        assert projector.patch is not None
        cells = module.distance_map(features).flatten(2)
        numbers = torch.arange(len(projector))
        module.replace_(projector.patch, projector.found)
        result |= {
            f"{name}_prototypes": module.prototypes.vectors,
            f"{name}_image_index": projector.sample,
            f"{name}_patch_index": projector.cell,
            f"{name}_distance": cells[projector.sample, numbers, projector.cell],
            f"{name}_node_index": torch.tensor(module.tree.branches),
        }
    return result


@torch.no_grad()
def pruning(case: Case) -> dict[str, Any]:
    """The tree before and after flat leaves went."""
    module, features, labels = build_head(case), case.inputs["features"], case.inputs["labels"]
    log = in_logs(case)
    whole, rows = module.tree, rows_of(case.config)
    flat = [whole.leaves.index(leaf) for leaf in case.config.get("flat_leaves", ())]
    module.leaves.counts[flat] = 0
    before = module.head(features).logits
    module.prune_(case.config["pruning_threshold_leaves"])
    tree = module.tree
    steps = {leaf: ".".join("r" if right else "l" for _, right in tree.path(leaf)) for leaf in tree.leaves}
    after = routed(module, module.head(features), labels, log)
    return {
        "output_before": shown(before, log),
        "structure_after": {str(node): list(pair) for node, pair in tree.children.items()},
        "num_branches_after": torch.tensor(len(tree)),
        "num_leaves_after": torch.tensor(len(tree.leaves)),
        "leaf_index_after": torch.tensor(tree.leaves),
        "state_keys_after": [f"_root.{steps[leaf]}._dist_params" for leaf in tree.leaves],
        "kept_prototypes": torch.tensor(sorted(rows[branch] for branch in tree.branches)),
        "root_child_kept": torch.tensor(tree.children[0]),
        **{f"after_{key}": value for key, value in after.items()},
    }


def whole_network(case: Case) -> dict[str, Any]:
    """From image to classes, and a forward in train mode with its gradients."""
    config, labels, image = case.config, case.inputs["labels"], case.inputs["image"]
    network, log = build(case).eval(), in_logs(case)
    module = network.head
    with torch.no_grad():
        trunk = network.backbone(image)
        features = module.features(trunk)
        output = module.head(features)
        result = {
            "backbone_features": trunk,
            "features": features,
            "min_distances": output.distance[:, order_of_rows(config)],
            **routed(module, output, labels, log),
        }
    if config.get("train_mode"):
        output = network.train()(image)
        loss = -module.leaves.joint(output.reach, labels).logsumexp(1).mean()
        loss.backward()
        first = next(network.backbone.parameters())
        result |= {
            "train_output": shown(output.logits, log),
            "train_loss": loss,
            "train_grad_norm_backbone": torch.tensor(norm_of_gradients(network.backbone)),
            "train_grad_norm_first_conv": gradient(first).norm(),
            "train_grad_norm_add_on": torch.tensor(norm_of_gradients(module.add_on)),
            "train_grad_norm_prototypes": torch.tensor(norm_of_gradients(module.prototypes)),
        }
    return result


def patches(case: Case) -> dict[str, Tensor]:
    """Boxes of single patches on pictures, and a similarity map on one."""
    result = {}
    for number, query in enumerate(case.config["queries"]):
        grid, size = tuple(query["feature_hw"]), tuple(query["image_hw"])
        cell = torch.tensor([query["patch_index"]])
        map_ = patch_map(cell, grid, size)[0]
        box = torch.from_numpy(patch_boxes(cell, grid, size, query["threshold"]))[0]
        result |= {
            f"box_{number}": box[[1, 3, 0, 2]],
            f"mask_max_{number}": map_.max(),
            f"mask_sum_{number}": map_.sum(),
        }
    return result | {"rescaled_activation": heatmap(case.inputs["similarity"][None], tuple(case.config["image_hw"]))[0]}


def build_head(case: Case, normalization: str | None = None) -> TreeHead:
    """A head without a trunk, for cases that give features; prototypes in the order of our branches."""
    config = case.config
    normalization = normalization or normalization_of(config)
    tree = Tree.complete(config["depth"])
    module = TreeHead(1, config["num_classes"], tree, config["num_features"], normalization)
    rows = rows_of(config)
    with torch.no_grad():
        vectors = case.inputs["prototypes"].flatten(1)
        module.prototypes.vectors.copy_(vectors[[rows[branch] for branch in tree.branches]])
        if "leaf_params" in case.inputs:
            module.leaves.counts.copy_(case.inputs["leaf_params"])
    return module


def build(case: Case) -> ProtoTreeNetwork:
    """The network that the authors' weights imply; what a case says of it has to agree."""
    config, state = case.config, dict(case.state)
    state["prototype_layer.prototype_vectors"] = case.inputs["prototypes"]
    out_map = rows_of(config)
    arguments = arguments_from_official(state, out_map=out_map)
    network = ProtoTreeNetwork(**arguments, leaf_normalization=normalization_of(config))
    network.load_state_dict(state_from_official(state, out_map=out_map))
    with torch.no_grad():
        network.head.leaves.counts.copy_(case.inputs["leaf_params"])
    said = (config["net"].removesuffix("_inat"), config["depth"], config["num_features"], config["num_classes"])
    implied = tuple(arguments[key] for key in ("backbone", "height", "prototype_dim", "num_classes"))
    if said != implied:
        raise ValueError(f"the weights imply {implied}, the case says {said}")
    return network


def in_logs(case: Case) -> bool:
    """Whether the authors' mode gives logarithms."""
    return bool(case.config.get("log_probabilities"))


def normalization_of(config: dict[str, Any]) -> str:
    """Of the leaves."""
    return "counts" if config.get("kontschieder_normalization") else "softmax"


def rows_of(config: dict[str, Any]) -> dict[int, int]:
    """Branch -> row of its prototype."""
    return {int(branch): row for branch, row in config["out_map"].items()}


def order_of_rows(config: dict[str, Any]) -> list[int]:
    """Of each row of the authors' prototypes, the place of its branch among ours."""
    rows = rows_of(config)
    branches = sorted(rows)
    return sorted(range(len(branches)), key=lambda place: rows[branches[place]])


def shown(log_values: Tensor, log: bool) -> Tensor:
    """As the authors' mode has it: logarithms or probabilities."""
    return log_values if log else log_values.exp()


def share(scores: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy."""
    return accuracy(scores, labels, task="multiclass", num_classes=scores.shape[1], average="micro")
