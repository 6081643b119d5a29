"""The cases of dm2 by our calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.metrics import retrieval as R
from fgvczoo.models.dm2 import relations
from fgvczoo.models.dm2.losses import cohort_losses, triplet_loss
from fgvczoo.models.dm2.network import Cohort, ensemble
from fgvczoo.models.dm2.official import arguments_from_official, state_from_official
from fgvczoo.models.dm2.updates import GradientAccumulator
from fgvczoo.nn.embeddings import euclidean_distances, squared_distances
from fgvczoo.nn.triplets import all_triplets, distance_weights, hard_triplets, positive_pairs, semihard_triplets
from tests.golden.case import Case


def run(case: Case) -> dict[str, Any]:
    """Chooses by what the case configures and gives."""
    if "backbone" in case.config:
        return whole(case)
    if "pull" in case.config:
        return recall(case)
    if "models" in case.config:
        return cohort(case)
    if "intervals" in case.config:
        return updates(case)
    if "student" in case.inputs:
        return relational(case)
    return triplets(case)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def whole(case: Case) -> dict[str, Any]:
    """A checkpoint of RKD as a cohort of one."""
    arguments = arguments_from_official(case.state)
    backbone = {"inception_bn": "bn_inception"}.get(case.config["backbone"], case.config["backbone"])
    assert arguments["backbones"] == [backbone] and arguments["embedding_dim"] == case.config["embedding_size"]
    network = Cohort(arguments["backbones"], [arguments["embedding_dim"]]).eval()
    network.load_state_dict(state_from_official(case.state))
    with torch.no_grad():
        feature = network.members[0].pooled(case.inputs["image"])
        embedding = (
            network(case.inputs["image"]) if case.config["normalize"] else network.raw([case.inputs["image"]])[0]
        )
    return {
        "feature": feature,
        "feature_first64": feature[:, :64],
        "feature_mean": feature.mean(),
        "feature_std": feature.std(correction=0),
        "feature_norm": feature.norm(),
        "embedding": embedding,
    }


def relational(case: Case) -> dict[str, Any]:
    teacher = case.inputs["teacher"]
    result: dict[str, Any] = {}
    for name, loss_of in (("distance", relations.distance_loss), ("angle", relations.angle_loss)):
        student = leaf(case.inputs["student"])
        loss = loss_of(student, teacher)
        loss.backward()
        unit = leaf(F.normalize(case.inputs["student"], dim=1))
        unit_loss = loss_of(unit, F.normalize(teacher, dim=1))
        unit_loss.backward()
        result |= {
            f"{name}_loss": loss,
            f"{name}_grad": gradient(student),
            f"{name}_grad_norm": gradient(student).norm(),
            f"{name}_loss_unit": unit_loss,
            f"{name}_grad_norm_unit": gradient(unit).norm(),
        }
    student = case.inputs["student"]
    distance = euclidean_distances(student)
    return result | {
        "mean_distance_student": distance.sum() / (len(student) * (len(student) - 1)),
        "relative_distance_student": relations.relative_distances(student),
        "angle_vertex0_student": relations.vertex_angles(student, 0),
    }


def triplets(case: Case) -> dict[str, Any]:
    label, config = case.inputs["label"], case.config
    given = case.inputs["embedding"]
    unit = F.normalize(given, dim=1)
    distance = euclidean_distances(unit)
    found = {
        "all": all_triplets(label),
        "hard": hard_triplets(distance, label),
        "semihard": semihard_triplets(distance, label),
    }
    result: dict[str, Any] = {}
    for name, chosen in found.items():
        embedding = leaf(given)
        loss = triplet_loss(F.normalize(embedding, dim=1), chosen, config["margin"])
        loss.backward()
        result |= {
            f"loss_{name}": loss,
            f"grad_norm_{name}": gradient(embedding).norm(),
            f"num_triplets_{name}": torch.tensor(len(chosen)),
            f"triplets_{name}": chosen,
        }
    probability, _ = distance_weights(
        distance, label, given.shape[1], cutoff=config["cutoff"], upper_cutoff=config["nonzero_loss_cutoff"]
    )
    anchor, positive = positive_pairs(label)
    expected = torch.zeros((), dtype=torch.float64)
    for a, p in zip(anchor.tolist(), positive.tolist()):
        for n in probability[a].nonzero()[:, 0].tolist():
            one = triplet_loss(unit.double(), torch.tensor([[a, p, n]]), config["margin"])
            expected += probability[a, n].double() * one / len(anchor)
    return result | {
        "distance_weighted_anchor": anchor,
        "distance_weighted_positive": positive,
        "distance_weighted_negative_probability": probability,
        "distance_weighted_expected_loss": expected,
    }


def cohort(case: Case) -> dict[str, Any]:
    count, label = case.config["models"], case.inputs["label"]
    given = [leaf(case.inputs[f"embedding_{number}"]) for number in range(count)]
    unit = [F.normalize(e, dim=1) for e in given]
    losses = cohort_losses(unit, [all_triplets(label)] * count, margin=case.config["margin"])
    total = losses.total(case.config["distance_weight"], case.config["angle_weight"])
    total.sum().backward()
    result: dict[str, Any] = {"loss_total": total.sum()}
    for number in range(count):
        result |= {
            f"triplet_{number}": losses.triplet[number],
            f"mutual_distance_{number}": losses.distance[number],
            f"mutual_angle_{number}": losses.angle[number],
            f"loss_{number}": total[number],
            f"grad_norm_{number}": gradient(given[number]).norm(),
        }
    return result


def updates(case: Case) -> dict[str, Any]:
    result = {}
    intervals = case.config["intervals"]
    for mode in ("accumulate_mean", "accumulate_sum", "skip"):
        members = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in intervals]
        optimizer = torch.optim.SGD(members, lr=case.config["learning_rate"])
        accumulator, rows = GradientAccumulator(intervals, mode), []
        for step, x in enumerate(case.config["x"], 1):
            optimizer.zero_grad()
            sum(0.5 * (theta - x) ** 2 for theta in members).backward()  # type: ignore[union-attr]
            accumulator.apply(step, [[theta] for theta in members])
            optimizer.step()
            rows.append(torch.stack([theta.detach().clone() for theta in members]))
        result[f"theta_{mode}"] = torch.stack(rows)
    return result


def recall(case: Case) -> dict[str, Any]:
    label, ks = case.inputs["label"], case.config["ks"]
    members = [
        F.normalize(case.inputs[f"noise_{n}"] + case.config["pull"] * case.inputs[f"class_centre_{n}"][label], dim=1)
        for n in range(len(case.config["dims"]))
    ]

    def at(embeddings: Tensor) -> Tensor:
        ranks, counts = R.retrieval_ranks(embeddings, label)
        # That code counts queries without a match as misses.
        return torch.stack([R.mean_over_queries(R.recall_at_k(ranks, k), counts, lone="miss") for k in ks])

    result: dict[str, Any] = {f"recall_model_{number}": at(member) for number, member in enumerate(members)}
    together = torch.cat(members, dim=1)
    return result | {
        "recall_concatenation": at(together),
        "recall_concatenation_unit": at(ensemble(members)),
        "squared_distance_first_row": squared_distances(together)[0],
    }
