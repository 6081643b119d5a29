"""ProtoPNet's cases through `fgvczoo.models.protopnet` and what it shares with other prototype networks."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from fgvczoo.explain.analysis import analyse
from fgvczoo.metrics.heatmaps import upsample
from fgvczoo.models.ensemble import EnsembleNetwork
from fgvczoo.models.protopnet.losses import (
    LossWeights,
    average_separation,
    loss_terms,
    pair_distance,
    total_loss,
)
from fgvczoo.models.protopnet.network import Head, ProtoPNetNetwork, weighted_distance_map
from fgvczoo.models.protopnet.official import arguments_from_official, state_from_official
from fgvczoo.models.protopnet.pruning import Pruning, kept_prototypes
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.prototypes import (
    NearestImages,
    Projector,
    activation_boxes,
    class_identity,
)
from fgvczoo.nn.receptive_field import ReceptiveField, receptive_field
from tests.golden.adapters import prototype_metrics
from tests.golden.case import Case

# The authors' names of coefficients, and ours.
WEIGHTS = {"crs_ent": "cross_entropy", "clst": "cluster", "sep": "separation", "l1": "l1"}
TERMS = {"cluster": "cluster_cost", "separation": "separation_cost"}


def run(case: Case) -> dict[str, Tensor]:
    """Chooses by what the case configures and gives."""
    if "part_locations" in case.inputs:
        return prototype_metrics.run(case)
    if "models" in case.config:
        return ensemble(case)
    if "coefs" in case.config:
        return train_step(case)
    if "image" in case.inputs:
        return whole(case)
    if "upstream" in case.inputs:
        return head(case)
    if "labels" in case.inputs:
        return projection(case)
    if "top_prototypes" in case.config:
        return local_analysis(case)
    if "percentile" in case.config:
        return boxes_of_maps(case)
    if not case.inputs:
        return receptive_fields(case)
    raise ValueError(f"no call of ours takes {', '.join(case.inputs)}")


def whole(case: Case) -> dict[str, Tensor]:
    """A whole network in eval mode."""
    network = build(case.config, case.state).eval()
    with torch.no_grad():
        output = network(case.inputs["image"])
        features = network.features(case.inputs["image"])["part"]
        field = receptive_field(network.backbone, case.config["img_size"], network.head.prototypes.window[0])
        return {
            "logits": output.logits,
            "min_distances": output.distance,
            "similarities": output.evidence,
            "conv_features": features,
            "distances": network.head.distance_map(features),
            "predicted_class": output.logits.argmax(1),
            "proto_layer_rf_info": geometry(field),
        }


def ensemble(case: Case) -> dict[str, Tensor]:
    """Several networks; their logits add up."""
    networks, image = [], case.inputs["image"]
    for number, config in enumerate(case.config["models"]):
        prefix = f"ppnets.{number}."
        state = {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}
        networks.append(build(config, state).eval())
    with torch.no_grad():
        logits = EnsembleNetwork(networks).eval()(image)
        single = {f"logits_{number}": network(image).logits for number, network in enumerate(networks)}
    return {**single, "logits": logits, "predicted_class": logits.argmax(1)}


def head(case: Case) -> dict[str, Tensor]:
    """Prototype layer and last layer on given features, with all gradients."""
    module, features = build_head(case), case.inputs["features"].clone().requires_grad_()
    output = module.head(features)
    (output.logits * case.inputs["upstream"]).sum().backward()
    tensors = (features, module.prototypes.vectors, module.last_layer.weight)
    gradients = [gradient(tensor) for tensor in tensors]
    result = {
        "distances": module.distance_map(features),
        "min_distances": output.distance,
        "similarities": output.evidence,
        "logits": output.logits,
        "grad_features": gradients[0],
        "grad_prototype_vectors": gradients[1],
        "grad_last_layer_weight": gradients[2],
        "grad_norms": torch.stack([g.norm() for g in gradients]),
    }
    if "weights" in case.inputs:
        vectors, weights = module.prototypes.vectors, case.inputs["weights"].abs()
        result["weighted_distances"] = weighted_distance_map(features, vectors, weights)
    return result


def train_step(case: Case) -> dict[str, Tensor]:
    """A joint step: all terms, the total and its gradients."""
    network = build(case.config, case.state).train()
    labels = case.inputs["label"]
    output = network(case.inputs["image"])
    module = network.head
    terms = loss_terms(module, output, labels)
    loss = total_loss(terms, LossWeights(**{WEIGHTS[name]: value for name, value in case.config["coefs"].items()}))
    loss.backward()
    parts = (network.backbone, module.add_on, module.prototypes, module.last_layer)
    return {
        **{TERMS.get(name, name): term for name, term in terms.items()},
        "avg_separation_cost": average_separation(output.distance, labels, module.prototypes.class_of),
        "loss": loss,
        "p_dist_pair": pair_distance(module.prototypes.vectors),
        "grad_norms": torch.tensor([norm_of_gradients(part) for part in parts]),
        "grad_prototype_vectors": gradient(module.prototypes.vectors),
        "logits": output.logits,
        "min_distances": output.distance,
        "running_mean_after": network.backbone.trunk.bn1.running_mean,
    }


@torch.no_grad()
def projection(case: Case) -> dict[str, Tensor]:
    """Prototypes moved onto the nearest patches of their classes, from images or feature maps; and pruned."""
    config, size = case.config, (case.config["img_size"],) * 2
    labels = case.inputs["labels"].clone()
    for what in case.then.values():
        found = re.search(r"every label (\d+) is replaced by (\d+)", what)
        assert found is not None
        labels[labels == int(found[1])] = int(found[2])
    index = torch.arange(len(labels))
    parts = index.split(config["push_batch_size"])
    if "images" in case.inputs:
        network = build(config, case.state).eval()
        module = network.head
        features = torch.cat([network.features(case.inputs["images"][part])["part"] for part in parts])
        field = receptive_field(network.backbone, config["img_size"])
    else:
        module, features = build_head(case), case.inputs["features"]
        cells, jump, extent, start = config["proto_layer_rf_info"]
        field = ReceptiveField(cells, jump, extent, start, config["img_size"])

    class_of, window = module.prototypes.class_of, module.prototypes.window
    projector = Projector(class_of, window)
    for part in parts:
        projector.update(features[part], *module.nearest(features[part]), labels[part], part)
    rows = torch.tensor(config.get("rows", range(len(class_of))))
    image, cell = projector.sample[rows], projector.cell[rows]
    columns = features.shape[3] - window[1] + 1
    row, column = cell // columns, cell % columns
    before = module.distance_map(features)[image, rows, row, column]
    boxes = [
        activation_boxes(module.evidence_map(features[i, None])[0, j, None], size)[0]
        for i, j in zip(image.tolist(), rows.tolist())
    ]
    fields = [field.box(r, c) for r, c in zip(row.tolist(), column.tolist())]
    assert projector.patch is not None
    module.replace_(projector.patch, projector.found)
    after = module.head(features[: len(case.outputs.get("logits_after_push", ()))])
    result = {
        "prototype_vectors_after_push": module.prototypes.vectors[rows],
        "bound_boxes": records(image, boxes, labels),
        "receptive_field_boxes": records(image, fields, labels),
        "push_distance": before,
        "push_location": torch.stack([image, row, column], dim=1),
        "logits_after_push": after.logits,
        "min_distances_after_push": after.distance,
    }
    return result | (pruned(case, module, features, labels) if "pruned" in case.outputs else {})


def pruned(case: Case, module: Head, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The images nearest to each prototype, and the prototypes that stay, as the authors choose them."""
    config, class_of = case.config, module.prototypes.class_of
    nearest = NearestImages(len(class_of), config["prune_k"])
    for part in torch.arange(len(labels)).split(config["push_batch_size"]):
        nearest.update(*module.nearest(features[part]), labels[part], part)
    distance = module.head(features).distance
    numbers = torch.arange(len(class_of))[:, None].expand_as(nearest.sample)
    maps = module.evidence_map(features)[nearest.sample.flatten(), numbers.flatten()]
    boxes = rows_first(activation_boxes(maps, (config["img_size"],) * 2)).reshape(*nearest.sample.shape, 4)
    rule = Pruning(config["prune_k"], config["prune_threshold"], keep_one=False)
    kept = kept_prototypes(nearest.label, class_of, rule)
    gone = torch.tensor([j for j in range(len(class_of)) if j not in kept])
    dropped = torch.stack([gone, class_of[gone]], dim=1)
    module.keep_(kept)
    return {
        "nearest_image_index": nearest.sample,
        "nearest_distance": distance[nearest.sample, numbers],
        "nearest_labels": nearest.label,
        "nearest_boxes": boxes,
        "pruned": dropped,
        "kept": kept,
        "logits_after_prune": module.head(features[: len(case.outputs["logits_after_prune"])]).logits,
    }


@torch.no_grad()
def local_analysis(case: Case) -> dict[str, Tensor]:
    """The most similar prototypes of one image, and the score sheets of the best classes."""
    config, module = case.config, build_head(case)
    classes = [str(label) for label in range(config["num_classes"])]
    analysis = analyse(
        {"part": module},
        {"part": case.inputs["features"]},
        (config["img_size"],) * 2,
        classes,
        top=config["top_prototypes"],
        classes=config["top_classes"],
    )
    top = analysis.most_similar
    rows = [(int(sheet.class_name), row) for sheet in analysis.sheets for row in sheet.rows]
    return {
        "logits": module.head(case.inputs["features"]).logits,
        "predicted_class": torch.tensor(int(analysis.predicted)),
        "top_prototypes": torch.tensor([row.prototype for row in top]),
        "top_similarities": torch.tensor([row.similarity for row in top]),
        "top_prototype_class": torch.tensor([int(row.prototype_class) for row in top]),
        "top_connection_to_predicted": torch.tensor([row.weight for row in top]),
        "top_boxes": rows_first(np.array([row.box for row in top])),
        "top_classes": torch.tensor([int(sheet.class_name) for sheet in analysis.sheets]),
        "class_prototypes": torch.tensor([(label, row.prototype) for label, row in rows]),
        "class_points": torch.tensor([row.points for _, row in rows]),
    }


def boxes_of_maps(case: Case) -> dict[str, Tensor]:
    """Boxes and thresholds of noise, smooth and constant maps."""
    side, percentile = case.config["size"], case.config["percentile"]
    maps = [case.inputs[name] for name in ("map0", "map1")]
    large = {f"upsampled{i}": upsample(map_[None], (side, side))[0] for i, map_ in enumerate(maps)}
    for name in ("smooth0", "smooth1"):
        maps += list(case.inputs[name][:, 0, ::4, ::4])
    maps.append(torch.full((7, 7), 0.3))
    boxes = np.concatenate([activation_boxes(map_[None], (side, side), percentile) for map_ in maps])
    upsampled = [upsample(map_[None], (side, side)).double() for map_ in maps]
    thresholds = torch.stack([torch.quantile(map_, percentile / 100) for map_ in upsampled])
    return {**large, "boxes": rows_first(boxes), "thresholds": thresholds}


def receptive_fields(case: Case) -> dict[str, Tensor]:
    """Of every trunk, picture size and prototype size that the outputs name: TRUNK/SIDE/patchN, and boxes of cells."""
    result = {}
    for name in case.outputs:
        trunk, side, patch, *boxes = name.split("/")
        with torch.device("meta"):
            field = receptive_field(Backbone(trunk), int(side), int(patch.removeprefix("patch")))
        cells = re.findall(r"\((\d+), (\d+)\)", case.spec["outputs"][name].get("note", ""))
        found = [field.box(int(row), int(column)) for row, column in cells]
        result[name] = rows_first(np.array(found)) if boxes else geometry(field)
    return result


def build(config: dict, state: dict[str, Tensor]) -> ProtoPNetNetwork:
    """The network that the authors' weights imply; what a case says of it has to agree."""
    arguments = arguments_from_official(state)
    network = ProtoPNetNetwork(**arguments, activation=config["activation"])
    network.load_state_dict(state_from_official(state))
    said = (config["backbone"], tuple(config["prototype_shape"]), config["num_classes"])
    implied = (arguments["backbone"], tuple(network.head.prototypes.vectors.shape), arguments["num_classes"])
    if said != implied:
        raise ValueError(f"the weights imply {implied}, the case says {said}")
    return network


def build_head(case: Case) -> Head:
    """A head without a trunk, for cases that give features; without `last_layer.weight` it stays as initialised."""
    config = case.config
    _, dim, *window = config["prototype_shape"]
    class_of = class_identity(config["num_classes"], config["prototypes_per_class"])
    module = Head(1, config["num_classes"], class_of, dim, tuple(window), activation=config["activation"])
    with torch.no_grad():
        module.prototypes.vectors.copy_(case.state["prototype_vectors"])
        if "last_layer.weight" in case.state:
            module.last_layer.weight.copy_(case.state["last_layer.weight"])
    return module


def geometry(field: ReceptiveField) -> Tensor:
    return torch.tensor([field.cells, field.jump, field.size, field.start], dtype=torch.float32)


def rows_first(boxes: np.ndarray) -> Tensor:
    """x0, y0, x1, y1 -> y0, y1, x0, x1."""
    return torch.from_numpy(boxes)[:, [1, 3, 0, 2]].long()


def records(image: Tensor, boxes: list, labels: Tensor) -> Tensor:
    """Image, box, and the image's class, one row each."""
    return torch.cat([image[:, None], rows_first(np.array(boxes)), labels[image][:, None]], dim=1)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.clone()


def norm_of_gradients(module: nn.Module) -> float:
    """Euclidean norm over all parameters, summed in float64."""
    squares = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())
