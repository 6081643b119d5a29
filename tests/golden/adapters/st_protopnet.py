"""ST-ProtoPNet's cases through `fgvczoo.models.st_protopnet`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fgvczoo.metrics import (
    area_under_curve,
    changed_share,
    class_activation,
    content_heatmap,
    deletion_curve,
    heatmap,
    heatmap_iou,
    outside_inside_ratio,
)
from fgvczoo.metrics.heatmaps import upsample
from fgvczoo.models.st_protopnet.losses import LossWeights, branch_loss, branch_terms
from fgvczoo.models.st_protopnet.network import Branch, STProtoPNetNetwork
from fgvczoo.models.st_protopnet.official import arguments_from_official, state_from_official
from fgvczoo.nn.prototypes import Projector, high_activation_box
from tests.golden.case import Case

BRANCHES = ("trivial", "support")

# The authors' names of coefficients and of logged terms, and ours.
WEIGHTS = {
    "crs_ent": "cross_entropy",
    "clst_trv": "cluster_trivial",
    "clst_spt": "cluster_support",
    "sep_trv": "separation_trivial",
    "sep_spt": "separation_support",
    "orth": "orthogonality",
    "l1": "l1",
    "discr": "discrimination",
    "close": "closeness",
}
TERMS = {
    "cross_entropy": "cross_entropy_{}",
    "cluster": "cluster_cost_{}",
    "separation": "separation_cost_{}",
    "orthogonality": "orth_cost_{}",
    "l1": "l1_{}",
    "discrimination": "discrimination_cost",
    "closeness": "closeness_cost",
}


def run(case: Case) -> dict[str, Tensor]:
    """Chooses by what the case configures and gives."""
    if "models" in case.config:
        return ensemble(case)
    if "mask0" in case.inputs:
        return interpretability(case)
    if "branch_of_step" in case.config:
        return train_steps(case)
    if "image" in case.inputs:
        return whole(case)
    if "labels" in case.inputs:
        return projection(case)
    if "upstream" in case.inputs:
        return head(case)
    raise ValueError(f"no call of ours takes {', '.join(case.inputs)}")


def whole(case: Case) -> dict[str, Tensor]:
    """A whole network in eval mode."""
    network = build(case.config, case.state).eval()
    with torch.no_grad():
        trunk = network.backbone(case.inputs["image"])
        output = network(case.inputs["image"])
        result = {"predicted_class": output.logits.argmax(1)}
        for name, branch in network.branches.items():
            features = branch.features(trunk)
            said = getattr(output, name)
            result |= {
                f"logits_{name}": said.logits,
                f"max_similarity_{name}": said.loss_similarity,
                f"conv_features_{name}": features,
                f"similarity_map_{name}": branch.evidence_map(features),
                "feature_map": features,
            }
    return result


def ensemble(case: Case) -> dict[str, Tensor]:
    """Several networks; the logits of all branches add up."""
    result = {}
    for number, config in enumerate(case.config["models"]):
        prefix = f"ppnets.{number}."
        state = {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}
        with torch.no_grad():
            result[f"logits_{number}"] = build(config, state).eval()(case.inputs["image"]).logits
    logits = torch.stack(list(result.values())).sum(0)
    return result | {"logits": logits, "predicted_class": logits.argmax(1)}


def head(case: Case) -> dict[str, Tensor]:
    """Similarities and last layers on given features, with all gradients."""
    result, features, branches = {}, {}, {}
    for name in BRANCHES:
        branches[name] = build_branch(case, name)
        features[name] = case.inputs[f"features_{name}"].clone().requires_grad_()
        output = branches[name].head(features[name])
        result |= {
            f"logits_{name}": output.logits,
            f"max_similarity_{name}": output.loss_similarity,
            f"similarity_map_{name}": branches[name].evidence_map(features[name]),
        }
    logits = result["logits_trivial"] + result["logits_support"]
    (logits * case.inputs["upstream"]).sum().backward()
    vectors = {name: branch.prototypes.vectors for name, branch in branches.items()}
    weights = {name: branch.last_layer.weight for name, branch in branches.items()}
    for name in BRANCHES:
        result |= {
            f"grad_features_{name}": gradient(features[name]),
            f"grad_prototype_vectors_{name}": gradient(vectors[name])[:, :, None, None],
            f"grad_last_layer_{name}": gradient(weights[name]),
        }
    groups = [kind[name] for kind in (features, vectors, weights) for name in BRANCHES]
    return result | {"grad_norms": torch.stack([gradient(tensor).norm() for tensor in groups])}


def projection(case: Case) -> dict[str, Tensor]:
    """The prototypes of both branches moved onto the best patches of given features."""
    labels, size = case.inputs["labels"], case.config["img_size"]
    index = torch.arange(len(labels))
    result = {}
    for name in BRANCHES:
        branch, features = build_branch(case, name), case.inputs[f"features_{name}"]
        projector = Projector(branch.prototypes.class_of)
        with torch.no_grad():
            for part in index.split(case.config["push_batch_size"]):
                projector.update(features[part], *branch.nearest(features[part]), labels[part], part)
            boxes = []
            for number, image in enumerate(projector.sample.tolist()):
                activation = branch.nearest_map(features[image, None])[0, number, None]
                x0, y0, x1, y1 = high_activation_box(upsample(activation, (size, size))[0])
                boxes.append([image, y0, y1, x0, x1, int(labels[image])])
            assert projector.patch is not None
            branch.replace_(projector.patch, projector.found)
            images = len(case.outputs[f"logits_{name}_after"])
            after = branch.head(features[:images])
        columns = features.shape[3]
        result |= {
            f"prototype_vectors_{name}_after_push": branch.prototypes.vectors[:, :, None, None],
            f"push_location_{name}": torch.stack(
                [projector.sample, projector.cell // columns, projector.cell % columns], dim=1
            ),
            f"push_similarity_{name}": projector.value,
            f"bound_boxes_{name}": torch.tensor(boxes),
            f"logits_{name}_after": after.logits,
            f"max_similarity_{name}_after": after.loss_similarity,
        }
    return result


def interpretability(case: Case) -> dict[str, Tensor]:
    """Heat maps of the labelled class, how they agree with the object, and the curve of deletion; image by image."""
    network = build(case.config, case.state).eval()

    def probabilities(images: Tensor) -> Tensor:
        output = network(images)
        return torch.stack([getattr(output, name).logits.softmax(1) for name in BRANCHES]).mean(0)

    result: dict[str, Tensor] = {}
    size, step = (case.config["img_size"], case.config["img_size"]), case.config["deletion_step"]
    for number in range(sum(key.startswith("mask") for key in case.inputs)):
        image, label = case.inputs[f"image{number}"], case.inputs[f"label{number}"]
        mask = case.inputs[f"mask{number}"][:, 0] > 0
        with torch.no_grad():
            trunk = network.backbone(image)
            maps = [
                class_activation(branch.evidence_map(branch.features(trunk)), branch.prototypes.class_of, label)
                for branch in network.branches.values()
            ]
            activation = torch.stack(maps).mean(0)
            heat = heatmap(activation, (mask.shape[1], mask.shape[2]))
            curve = deletion_curve(probabilities, image, heatmap(activation, size), step=step)
        found = {
            "activation_map": activation,
            "heatmap": heat,
            "deletion_scores": curve,
            "deletion_auc": area_under_curve(curve, changed_share(*size, step)),
            "content_heatmap": content_heatmap(heat, mask),
            "oirr": outside_inside_ratio(heat, mask),
            "iou": heatmap_iou(heat, mask, case.config["iou_threshold"]),
        }
        result |= {f"{key}{number}": values[0] for key, values in found.items()}
    return result


def train_steps(case: Case) -> dict[str, Tensor]:
    """Joint steps at learning rate 0: all terms of both branches, the loss of the branch in turn, its gradients."""
    network = build(case.config, case.state).train()
    coefficients = case.config["coefs"]
    weights = LossWeights(**{ours: coefficients[theirs] for theirs, ours in WEIGHTS.items()})
    parts: list[nn.Module] = [network.backbone]
    for kind in ("add_on", "prototypes", "last_layer"):
        parts += [getattr(branch, kind) for branch in network.branches.values()]
    result = {}
    for step, active in enumerate(case.config["branch_of_step"]):
        output = network(case.inputs[f"image{step}"])
        found = {}
        for name, branch in network.branches.items():
            said = getattr(output, name)
            found[name] = branch_terms(name, branch, said, case.inputs[f"label{step}"])
            result |= {f"step{step}.{TERMS[key].format(name)}": term for key, term in found[name].items()}
            result[f"step{step}.logits_{name}"] = said.logits
        loss = branch_loss(active, found[active], weights)
        network.zero_grad()
        loss.backward()
        result[f"step{step}.loss"] = loss
        result[f"step{step}.grad_norms"] = torch.tensor([norm_of_gradients(part) for part in parts])
        vectors = network.branches[active].prototypes.vectors
        result[f"step{step}.grad_prototype_vectors_active"] = gradient(vectors)[:, :, None, None]
        for branch in network.branches.values():
            branch.prototypes.normalize_()
    for name, branch in network.branches.items():
        result[f"prototype_vectors_{name}_after"] = branch.prototypes.vectors[:, :, None, None]
    return result


def build(config: dict[str, Any], state: dict[str, Tensor]) -> STProtoPNetNetwork:
    """The network that the authors' weights imply; what a case says of it has to agree."""
    arguments = arguments_from_official(state)
    network = STProtoPNetNetwork(**arguments)
    network.load_state_dict(state_from_official(state))
    said = (config["backbone"], config["variant"], config["prototype_shape"][1], config["num_classes"])
    implied = tuple(arguments[key] for key in ("backbone", "variant", "prototype_dim", "num_classes"))
    if said != implied:
        raise ValueError(f"the weights imply {implied}, the case says {said}")
    return network


def build_branch(case: Case, name: str) -> Branch:
    """One branch without a trunk, for cases that give features."""
    config = case.config
    classes, per_class = config["num_classes"], config["prototypes_per_class_per_branch"]
    branch = Branch(1, classes, per_class, config["prototype_shape"][1], config["variant"], upsample=False)
    with torch.no_grad():
        branch.prototypes.vectors.copy_(case.state[f"prototype_vectors_{name}"].flatten(1))
        branch.last_layer.weight.copy_(case.state[f"last_layer_{name}.weight"])
    return branch


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.clone()


def norm_of_gradients(module: nn.Module) -> float:
    """Euclidean norm over all parameters; -1 where none has a gradient."""
    # In float64: summing the squares of ten million float32 numbers loses the third digit.
    squares = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else -1.0
