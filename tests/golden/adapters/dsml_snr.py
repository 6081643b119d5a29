"""The cases of dsml-snr by our calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgvczoo.metrics import retrieval as R
from fgvczoo.metrics.retrieval_hashing import (
    distance_counts,
    hamming_distances,
    radius_precision,
    tie_averaged_precision,
)
from fgvczoo.metrics.retrieval_search import Relevance, codes, nearest
from fgvczoo.models.dsml import losses as L
from fgvczoo.models.dsml.distance import snr_distance, snr_distance_pairs
from tests.golden.case import Case

REDUCTIONS = {"avg_non_zero": "mean_nonzero", "mean": "mean"}


def run(case: Case) -> dict[str, Any]:
    """Chooses by what the case configures and gives."""
    if "bits" in case.config:
        return hashing(case)
    if "signal" in case.config:
        return worked(case)
    if "np_anchor" in case.inputs:
        return lifted_and_n_pair(case)
    if "triplets" in case.config:
        return triplet(case)
    if "pos_margin" in case.config:
        return contrastive(case)
    return distance(case)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def distance(case: Case) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("normalised", "raw"):
        anchor, other = leaf(case.inputs["anchor"]), leaf(case.inputs["other"])
        matrix = snr_distance(anchor, other, normalize=name == "normalised")
        (matrix * case.inputs["weight"]).sum().backward()
        result |= {f"distance_{name}": matrix, f"grad_anchor_{name}": anchor.grad, f"grad_other_{name}": other.grad}
    anchor, other = case.inputs["anchor"], case.inputs["other"]
    rows = min(len(anchor), len(other))
    return result | {
        "distance_raw_reversed": snr_distance(other, anchor),
        "rowwise_raw": snr_distance_pairs(anchor[:rows], other[:rows]),
        "self_distance_raw": snr_distance(anchor),
    }


def with_gradient(
    embedding: Tensor, loss_of: Callable[[Tensor], Tensor], name: str, prefix: str = ""
) -> dict[str, Any]:
    embedding = leaf(embedding)
    loss = loss_of(embedding)
    loss.backward()
    assert embedding.grad is not None
    return {
        f"{prefix}loss_{name}": loss,
        f"{prefix}grad_{name}": embedding.grad,
        f"{prefix}grad_norm_{name}": embedding.grad.norm(),
    }


def contrastive(case: Case) -> dict[str, Any]:
    embedding, label, config = case.inputs["embedding"], case.inputs["label"], case.config
    margins = {"positive_margin": config["pos_margin"], "negative_margin": config["neg_margin"]}
    result: dict[str, Any] = {"zero_mean_penalty": L.zero_mean(embedding)}
    for kind in ("normalised", "raw"):
        for theirs, ours in REDUCTIONS.items():

            def loss(e: Tensor, kind: str = kind, reduction: str = ours) -> Tensor:
                matrix = snr_distance(e, normalize=kind == "normalised")
                pairs = L.contrastive(matrix, label, **margins, reduction=reduction)
                return pairs + config["regulariser_weight"] * L.zero_mean(e)

            result |= with_gradient(embedding, loss, f"{kind}_{theirs}")
    matrix = snr_distance(embedding)
    same = label[:, None] == label
    positive, negative = same & ~torch.eye(len(label), dtype=torch.bool), ~same
    above = (matrix - margins["positive_margin"])[positive].clamp(min=0)
    below = (margins["negative_margin"] - matrix)[negative].clamp(min=0)
    return result | {
        "pair_loss_sum_raw": above.sum() + below.sum(),
        "num_positive_pairs": positive.sum(),
        "num_negative_pairs": negative.sum(),
        "num_violating_positive_raw": (above > 0).sum(),
        "num_violating_negative_raw": (below > 0).sum(),
    }


def triplet(case: Case) -> dict[str, Any]:
    embedding, label, config = case.inputs["embedding"], case.inputs["label"], case.config
    margin, weight = config["margin"], config["regulariser_weight"]
    result: dict[str, Any] = {}
    for kind in ("normalised", "raw"):
        for theirs, ours in REDUCTIONS.items():

            def loss(e: Tensor, kind: str = kind, reduction: str = ours) -> Tensor:
                matrix = snr_distance(e, normalize=kind == "normalised")
                return L.triplet(matrix, label, margin=margin, reduction=reduction) + weight * L.zero_mean(e)

            result |= with_gradient(embedding, loss, f"{kind}_{theirs}")
    triplets = torch.tensor(config["triplets"])

    def explicit(e: Tensor) -> Tensor:  # that code takes the regulariser over the anchors of the triplets
        return L.triplet_of(snr_distance(e), triplets, margin=margin) + weight * L.zero_mean(e[triplets[:, 0]])

    return result | with_gradient(embedding, explicit, "explicit_triplets")


def lifted_and_n_pair(case: Case) -> dict[str, Any]:
    label, config = case.inputs["label"], case.config
    embedding = leaf(case.inputs["embedding"])
    loss = L.lifted(snr_distance(embedding), label, margin=config["neg_margin"])
    loss.backward()
    assert embedding.grad is not None
    generalised = L.generalised_lifted(
        snr_distance(embedding), label, positive_margin=config["pos_margin"], negative_margin=config["neg_margin"]
    )
    result: dict[str, Any] = {
        "lifted_mean": loss,
        "lifted_grad_norm": embedding.grad.norm(),
        "generalised_lifted_mean": generalised,
    }
    for kind in ("negative_distance", "snr"):
        anchor = case.inputs["np_anchor"].double()
        positive = anchor + config["positive_scale"] * case.inputs["np_positive_offset"].double()
        both = [leaf(anchor), leaf(positive)]
        similarity = L.similarity(snr_distance(*both), kind)
        loss = L.n_pair(similarity)
        loss.backward()
        result |= {
            f"npair_{kind}": loss,
            f"npair_{kind}_similarity": similarity,
            f"npair_{kind}_grad_norm": torch.cat([x.grad for x in both]).norm(),  # type: ignore[misc]
        }
    return result


def worked(case: Case) -> dict[str, Any]:
    vectors = {name: torch.tensor(value, dtype=torch.float64)[None] for name, value in case.config.items()}
    a, p, n = vectors["anchor"], vectors["positive"], vectors["negative"]

    def d(x: Tensor, y: Tensor) -> Tensor:
        return snr_distance(x, y)[0, 0]

    def pearson(x: Tensor, y: Tensor) -> Tensor:
        return torch.corrcoef(torch.cat([x, y]))[0, 1]

    spread = p.std(correction=0) / a.std(correction=0)
    result = {
        "variance_anchor": a.var(correction=0),
        "variance_noise_positive": (p - a).var(correction=0),
        "snr_positive": 1 / d(a, p),
        "distance_anchor_positive": d(a, p),
        "distance_positive_anchor": d(p, a),
        "distance_anchor_negative": d(a, n),
        "distance_anchor_anchor": d(a, a),
        "distance_after_shift": d(a + 3, p - 7),
        "distance_after_common_scale": d(10 * a, 10 * p),
        "distance_scaled_other": d(a, 2 * p),
        "pearson_anchor_positive": pearson(a, p),
        "distance_from_pearson": 1 + spread**2 - 2 * pearson(a, p) * spread,
        "hash_code_anchor": codes(a)[0],
        "hash_code_negative": codes(n)[0],
        "hamming_anchor_negative": hamming_distances(a, n)[0, 0],
        "uncorrelated_distance": d(vectors["signal"], vectors["signal"] + vectors["noise"]),
        "uncorrelated_pearson": pearson(vectors["signal"], vectors["signal"] + vectors["noise"]),
        "zero_mean_penalty": L.zero_mean(torch.cat([a, p, n])),
    }
    result["uncorrelated_pearson_formula"] = 1 / (1 + result["uncorrelated_distance"]).sqrt()
    one = torch.tensor([[0, 1, 2]])
    matrix = snr_distance(torch.cat([a, p, n]))
    for output in case.outputs:
        kind, _, margin = output.rpartition("_")
        if kind == "triplet_margin":
            result[output] = L.triplet_of(matrix, one, margin=float(margin), reduction="mean")
        if kind == "contrastive_positive_margin":
            result[output] = (d(a, p) - float(margin)).clamp(min=0)
        if kind == "contrastive_negative_margin":
            result[output] = (float(margin) - d(a, n)).clamp(min=0)
    return result


def hashing(case: Case) -> dict[str, Any]:
    query, gallery = case.inputs["query"], case.inputs["gallery"]
    if "query_label" in case.inputs:
        labels = case.inputs["query_label"], case.inputs["gallery_label"]
    else:
        labels = (case.inputs["query_tags"] > 1.0).long(), (case.inputs["gallery_tags"] > 1.0).long()
    ranks, counts = R.retrieval_ranks(query, labels[0], gallery, labels[1], distance="hamming")
    items, relevant = distance_counts(query, gallery, Relevance(*labels))
    precision, empty = radius_precision(items, relevant, 2)
    order = nearest(query[:1], gallery, len(gallery), distance="hamming")[1][0]
    result: dict[str, Any] = {
        "hamming_first_query": hamming_distances(query, gallery)[0],
        "rank_order_first_query": order[: len(case.outputs["rank_order_first_query"])],
        "relevant_per_query": counts,
        "precision_radius_2": precision.mean(),
        "empty_balls_radius_2": empty.sum(),
        "map_all_tie_averaged": tie_averaged_precision(items, relevant).mean(),
    }
    for name, k in [*((str(k), k) for k in case.config["ks"]), ("all", len(gallery))]:
        result |= {
            f"map_at_{name}_by_retrieved": R.average_precision_at_k_retrieved(ranks, k).mean(),
            f"map_at_{name}_by_min_relevant_k": R.average_precision_at_k_min(ranks, counts, k).mean(),
            f"precision_at_{name}": R.precision_at_k(ranks, k).mean(),
        }
    return result
