"""BAS's cases through `fgvczoo.models.bas` and the metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fgvczoo.models.bas.losses import (
    LossWeights,
    activation_ratio,
    area,
    loss_terms,
    present_against_absent,
    total_loss,
)
from fgvczoo.models.bas.network import BASNetwork, TrainingOutput
from fgvczoo.models.bas.official import arguments_from_official, state_from_official
from fgvczoo.models.bas.seeds import mirrored_maps
from tests.golden.adapters import localization_metrics
from tests.golden.case import Case

# The authors' names of the terms, and ours.
TERMS = {"cls": "classification", "mcls": "classification", "frg": "guidance", "bas": "bas", "area": "area"}


def run(case: Case) -> dict[str, Any]:
    """Chooses by what the case configures and gives."""
    if "map_logits" in case.inputs:
        return localization_metrics.bas_boxes(case)
    return train_step(case)


def train_step(case: Case) -> dict[str, Any]:
    """A training forward with all terms and gradients; then scores and fused maps in eval mode."""
    config = case.config
    network = build(case).train()
    images = case.inputs["image"].clone().requires_grad_()
    result: dict[str, Any] = {}
    if "label_scores" in case.inputs:
        present = case.inputs["label_scores"] > config["label_threshold"]
        classes = case.outputs["selected_class"].long()
        result |= {"multi_hot": present.long(), "selected_class": classes}
    else:
        present, classes = None, case.inputs["label"]
        result["labels"] = classes
    weights = LossWeights(
        guidance=config.get("alpha", config.get("frg_weight")),
        area=config.get("beta", config.get("area_weight")),
        saturated=config["saturation_value"],
    )
    output = network.training_output(images, classes)
    terms = loss_terms(output, classes, weights)
    if present is not None:
        terms["classification"] = present_against_absent(output.scores, present)
        result["loss_mcls_dense"] = torch.stack(
            [present_against_absent(s[None], p[None]) for s, p in zip(output.scores, present)]
        ).mean()
    loss = total_loss(terms, weights)
    result |= outputs(output, weights)
    result |= {f"loss_{theirs}": terms[ours] for theirs, ours in TERMS.items()}
    result |= {"loss_total": loss, "loss_bas_plus_area": terms["bas"] + weights.area * terms["area"]}
    result |= {f"after_forward/{key}": value.clone() for key, value in official_tensors(case, network).items()}
    result |= gradients(case, network, images, {"": loss} | {f"{key}/": terms[name] for key, name in TERMS.items()})
    return result | evaluated(case)


def outputs(output: TrainingOutput, weights: LossWeights) -> dict[str, Tensor]:
    return {
        "score_1": output.scores,
        "score_2": output.guided,
        "S": output.score,
        "S_bg": output.background_score,
        "bas": activation_ratio(output.background_score, output.score, weights.saturated),
        "area": area(output.foreground),
        "M_fg": output.foreground,
        "feature_map": output.class_maps,
    }


def official_tensors(case: Case, network: BASNetwork) -> dict[str, Tensor]:
    """Our tensors by the authors' keys."""
    ours = dict(network.state_dict(keep_vars=True))
    return {key: ours[next(iter(state_from_official({key: value})))] for key, value in case.state.items()}


def gradients(case: Case, network: BASNetwork, images: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the gradients that the case asks for: grad_norm/[TERM/]NAME."""
    tensors = official_tensors(case, network) | {"image": images}
    norms = {}
    for prefix, loss in losses.items():
        names = [
            name.removeprefix(f"grad_norm/{prefix}")
            for name in case.outputs
            if name.startswith(f"grad_norm/{prefix}") and name.removeprefix(f"grad_norm/{prefix}") in tensors
        ]
        wanted = [tensors[name] for name in names]
        everything = not prefix and "grad_norm/all_parameters" in case.outputs
        extra = list(network.parameters()) if everything else []
        if not wanted + extra:
            continue
        found = torch.autograd.grad(loss, wanted + extra, retain_graph=True, allow_unused=True)
        values = [torch.zeros(()) if g is None else g.double().norm().float() for g in found]
        norms |= {f"grad_norm/{prefix}{name}": value for name, value in zip(names, values)}
        if everything:
            norms["grad_norm/all_parameters"] = torch.stack(values[len(wanted) :]).double().norm().float()
    return norms


@torch.no_grad()
def evaluated(case: Case) -> dict[str, Tensor]:
    """A fresh copy in eval mode."""
    network, images = build(case).eval(), case.inputs["image"]
    features = network.features(images)
    scores = network(images)
    result = {"eval/score_1": scores}
    for k in case.config.get("eval_topk", []):
        # One map: that of the given label.
        top = case.inputs["label"][:, None] if k == 1 else scores.topk(k, dim=1).indices
        chosen = torch.zeros_like(scores).scatter_(1, top, 1 / k)
        result[f"eval/M_topk_{k}"] = network.fused_map(features, chosen)[:, None]
    if "label_scores" in case.inputs:
        result["eval/flip_sum_map"] = mirrored_maps(network, images[0], torch.arange(scores.shape[1]))
    return result


def build(case: Case) -> BASNetwork:
    """The network that the authors' weights imply; what a case says of it has to agree."""
    config = case.config
    conference = bool(config.get("relu_on_class_maps", config["variant"] == "conference"))
    arguments: dict[str, Any]
    if "classifier_loc.0.bias" in case.state:
        arguments = arguments_from_official(case.state, variant="conference" if conference else "journal")
    else:
        arguments = {"num_classes": len(case.state["classifier_loc.0.weight"]), "segmentation": True}
    if arguments["num_classes"] != config["num_classes"]:
        raise ValueError(f"the weights have {arguments['num_classes']} classes, the case {config['num_classes']}")
    network = BASNetwork(**arguments)
    network.load_state_dict(state_from_official(case.state))
    return network
