"""The cases of retrieval-metrics by our calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fgvczoo.metrics import clustering as C
from fgvczoo.metrics import retrieval as R
from fgvczoo.metrics.retrieval_search import nearest
from tests.golden.case import Case


def run(case: Case) -> dict[str, Any]:
    """Chooses by what the case configures and gives."""
    if "relevance" in case.config:
        return worked(case)
    if "num_clusters_given" in case.config:
        return clustering(case)
    if "embedding" in case.config:
        embedding = torch.tensor(case.config["embedding"])[:, None]
        return retrieval(embedding, torch.tensor(case.config["label"]), None, None, case, ["euclidean"], "")
    return classes(case)


def classes(case: Case) -> dict[str, Any]:
    """Embeddings that are pulled to the centres of their classes."""
    given, pull = case.inputs, case.config["pull"]

    def pulled(name: str) -> Tensor:
        return given[name] + pull * given["class_centre"][given[f"{name}_label"]]

    if case.config["self_retrieval"]:
        gallery, gallery_label = None, None
    else:
        gallery, gallery_label = pulled("gallery"), given["gallery_label"]
    distances = ["euclidean", "cosine", "snr"]
    return retrieval(pulled("query"), given["query_label"], gallery, gallery_label, case, distances, "{}.")


def retrieval(
    query: Tensor,
    label: Tensor,
    gallery: Tensor | None,
    gallery_label: Tensor | None,
    case: Case,
    distances: list[str],
    prefix: str,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for distance in distances:
        name = prefix.format(distance)
        ranks, counts = R.retrieval_ranks(query, label, gallery, gallery_label, distance=distance)
        values = R.retrieval_values(ranks, counts, case.config["ks"])
        result |= {f"{name}{key}": R.mean_over_queries(value, counts) for key, value in values.items()}
        result[f"{name}recall_at_1_all_queries"] = R.mean_over_queries(values["recall_at_1"], counts, lone="miss")
        for ours, theirs in (("recall_at_1", "precision_at_1"), ("r_precision",) * 2, ("map_at_r",) * 2):
            result[f"{name}{theirs}_class_mean"] = R.mean_over_classes(values[ours], label, counts)
        own = torch.arange(len(query)) if gallery is None else None
        items = query if gallery is None else gallery
        places = nearest(query, items, len(items), distance=distance, own=own)[1]
        result |= {f"{name}ranking_first_query": places[0], f"{name}ranking": places}
        result |= {"num_queries_without_match": (counts == 0).sum(), "relevant_per_query": counts}
    return result


def worked(case: Case) -> dict[str, Any]:
    """Rankings given as relevance."""
    ranks = R.ranks_of_hits(torch.tensor(case.config["relevance"]))
    counts = torch.tensor(case.config["num_relevant"])
    result = {
        "r_precision": R.r_precision(ranks, counts),
        "average_precision_at_r": R.average_precision_at_r(ranks, counts),
        "average_precision": R.average_precision(ranks, counts),
        "reciprocal_rank": R.reciprocal_rank(ranks),
    }
    for k in range(1, len(case.config["relevance"][0]) + 1):
        result[f"recall_at_{k}"] = R.recall_at_k(ranks, k)
        result[f"precision_at_{k}"] = R.precision_at_k(ranks, k)
        result[f"true_recall_at_{k}"] = R.true_recall_at_k(ranks, counts, k)
    return result


def clustering(case: Case) -> dict[str, Any]:
    """A given assignment, and Lloyd's iterations from the first item of each class."""
    label = case.inputs["label"]
    items = case.inputs["embedding"] * 0.7 + case.inputs["class_centre"][label]
    first = [int((label == c).nonzero()[0]) for c in label.unique()]
    found = C.lloyd(items.double(), items[first])
    result: dict[str, Any] = {
        "lloyd.assignment": found.assignment,
        "lloyd.inertia": torch.tensor(found.inertia, dtype=torch.float64),
        "lloyd.iterations": torch.tensor(found.iterations),
    }
    for name, assignment in (("given", case.inputs["cluster"]), ("lloyd", found.assignment)):
        scores = {
            "nmi_arithmetic": C.normalized_mutual_information(label, assignment),
            "nmi_geometric": C.normalized_mutual_information(label, assignment, average="geometric"),
            "ami_arithmetic": C.adjusted_mutual_information(label, assignment),
            "mutual_information_nats": C.mutual_information(label, assignment),
            "purity": C.purity(label, assignment),
            **C.pair_f1(label, assignment),
        }
        result |= {f"{name}.{key}": value for key, value in scores.items()}
    return result
