"""Clustering of embeddings: k-means, and how its clusters agree with labels (NMI, AMI, F1 over pairs, purity).

N items. All agreement measures come from the contingency table of labels and clusters; natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.retrieval_search import check_finite, full_precision


@dataclass(frozen=True)
class Clusters:
    """What k-means found. assignment: (N,) int64. centres: (k, D) float64. inertia: sum of squared distances to the own
    centre. iterations: passes that moved a centre."""

    assignment: Tensor
    centres: Tensor
    inertia: float
    iterations: int


def lloyd(items: Tensor, centres: Tensor, *, iterations: int = 300) -> Clusters:
    """Lloyd's iterations from given centres, until no centre changes.

    items: (N, D). centres: (k, D). Equal distances go to the lowest centre; an emptied cluster keeps its centre. Items
    are float32 (float64 stays), sums float64.
    """
    x = items if items.dtype == torch.float64 else items.float()
    centres = centres.to(torch.float64)
    assignment = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    done = 0
    while True:
        assignment = _nearest_centre(x, centres)
        sums = torch.zeros_like(centres).index_add_(0, assignment, x.double())
        size = torch.bincount(assignment, minlength=len(centres))[:, None]
        moved = torch.where(size > 0, sums / size.clamp(min=1), centres)
        if torch.equal(moved, centres) or done == iterations:
            break
        centres, done = moved, done + 1
    inertia = float((x.double() - centres[assignment]).square().sum())
    return Clusters(assignment, centres, inertia, done)


def _nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    c = centres.to(x.dtype)
    norm = c.square().sum(1)
    with full_precision():
        return torch.cat([torch.addmm(norm, part, c.T, alpha=-2.0).argmin(1) for part in torch.split(x, 16384)])


def kmeans(items: Tensor, k: int, *, seed: int = 0, restarts: int = 10, iterations: int = 300) -> Clusters:
    """k-means: k-means++ seeding from `seed`, Lloyd's iterations, the best inertia of several restarts.

    Raises `FgvczooError` for fewer items than clusters, and for items that are not finite.
    """
    if not 1 <= k <= len(items):
        raise FgvczooError(f"k-means: {k} clusters of {len(items)} items; expected 1..{len(items)}")
    check_finite(items, "items")
    x = items.detach().float()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(seed)
    found = [lloyd(x, _plus_plus(x, k, generator), iterations=iterations) for _ in range(restarts)]
    return min(found, key=lambda clusters: clusters.inertia)


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Arthur & Vassilvitskii, SODA 2007: each next centre is an item, drawn by its squared distance to the nearest."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    squared = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for _ in range(k - 1):
        squared = torch.minimum(squared, (x - x[chosen[-1]]).double().square().sum(1))
        total = squared.cumsum(0)
        draw = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(total[-1])
        chosen.append(
            min(int(torch.searchsorted(total, torch.tensor(draw, dtype=torch.float64), right=True)), len(x) - 1)
        )
    return x[chosen].double()


def contingency(labels: Tensor, clusters: Tensor) -> Tensor:
    """Items of each label in each cluster: (labels, clusters) float64."""
    if labels.shape != clusters.shape or labels.ndim != 1 or not len(labels):
        raise FgvczooError(f"labels {tuple(labels.shape)}, clusters {tuple(clusters.shape)}: expected two (N,), N >= 1")
    _, row = torch.unique(labels, return_inverse=True)
    _, column = torch.unique(clusters, return_inverse=True)
    width = int(column.max()) + 1
    table = torch.bincount(row * width + column, minlength=(int(row.max()) + 1) * width)
    return table.view(-1, width).double()


def mutual_information(labels: Tensor, clusters: Tensor) -> Tensor:
    """Mutual information in nats: a float64 scalar."""
    share = contingency(labels, clusters)
    share = share / share.sum()
    product = share.sum(1, keepdim=True) * share.sum(0)
    return torch.where(share > 0, share * (share.clamp(min=1e-300) / product).log(), 0.0).sum().clamp(min=0.0)


def normalized_mutual_information(labels: Tensor, clusters: Tensor, *, average: str = "arithmetic") -> Tensor:
    """Mutual information by the mean of the two entropies: a float64 scalar in [0, 1].

    average: "arithmetic", or "geometric" as scikit-learn had it before 0.22 and older papers' code has it. One label
    and one cluster: 1; one of the two entropies zero: 0.
    """
    if average not in ("arithmetic", "geometric"):
        raise FgvczooError(f"average={average!r}; expected 'arithmetic' or 'geometric'")
    table = contingency(labels, clusters)
    if table.numel() == 1:
        return torch.ones((), dtype=torch.float64, device=table.device)
    first, second = (_entropy(table.sum(axis)) for axis in (1, 0))
    if not float(first) or not float(second):
        return torch.zeros((), dtype=torch.float64, device=table.device)
    mean = (first + second) / 2 if average == "arithmetic" else (first * second).sqrt()
    return mutual_information(labels, clusters) / mean


def _entropy(counts: Tensor) -> Tensor:
    share = counts / counts.sum()
    return -(share * share.log()).sum() if len(share) > 1 else share.new_zeros(())


def adjusted_mutual_information(labels: Tensor, clusters: Tensor) -> Tensor:
    """Mutual information adjusted for chance, (I - E) / (mean of the entropies - E): a float64 scalar, at most 1.

    E is what clusters of the same sizes share with the labels on average (Vinh et al., JMLR 2010). One label and one
    cluster, or as many of either as items: 1.
    """
    table = contingency(labels, clusters)
    first, second = table.sum(1), table.sum(0)
    if table.numel() == 1 or len(first) == len(second) == len(labels):
        return torch.ones((), dtype=torch.float64, device=table.device)
    expected = _expected_information(first, second)
    mean = (_entropy(first) + _entropy(second)) / 2
    above = mean - expected
    eps = torch.finfo(torch.float64).eps
    above = above.clamp(min=eps) if float(above) >= 0 else above.clamp(max=-eps)
    return (mutual_information(labels, clusters) - expected) / above


def _expected_information(first: Tensor, second: Tensor) -> Tensor:
    """Mutual information that groups of given sizes have on average, over all ways to fill them."""
    items = first.sum()
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    # It depends on sizes alone: groups of equal size are one term.
    (sizes_a, times_a), (sizes_b, times_b) = (torch.unique(sizes, return_counts=True) for sizes in (first, second))

    def log_factorial(n: Tensor) -> Tensor:
        return torch.lgamma(n + 1)

    b, weight = sizes_b[:, None], times_b[:, None]
    for a, times in zip(sizes_a, times_a):
        n = torch.arange(1, int(torch.minimum(a, sizes_b.max())) + 1, dtype=torch.float64, device=first.device)
        possible = (n <= b) & (n >= a + b - items)
        log_probability = (
            log_factorial(a) + log_factorial(b) + log_factorial(items - a) + log_factorial(items - b)
        ) - (
            log_factorial(items)
            + log_factorial(n)
            + log_factorial(a - n)
            + log_factorial((b - n).clamp(min=0))
            + log_factorial((items - a - b + n).clamp(min=0))
        )
        terms = n / items * (items * n / (a * b)).log() * log_probability.exp()
        total += times * (weight * torch.where(possible, terms, 0.0)).sum()
    return total


def pair_f1(labels: Tensor, clusters: Tensor) -> dict[str, Tensor]:
    """Over unordered pairs of items: `pair_precision`, the share of those of one label among those of one cluster,
    `pair_recall`, the share of those of one cluster among those of one label, and `pair_f1`, their harmonic mean;
    float64 scalars, 0 for 0/0."""
    table = contingency(labels, clusters)
    both, same_label, same_cluster = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    precision, recall = (
        both / pairs if float(pairs) else torch.zeros_like(both) for pairs in (same_cluster, same_label)
    )
    total = precision + recall
    f1 = 2 * precision * recall / total if float(total) else torch.zeros_like(total)
    return {"pair_precision": precision, "pair_recall": recall, "pair_f1": f1}


def _pairs(counts: Tensor) -> Tensor:
    return (counts * (counts - 1) / 2).sum()


def purity(labels: Tensor, clusters: Tensor) -> Tensor:
    """Share of the items that have the most frequent label of their cluster: a float64 scalar."""
    table = contingency(labels, clusters)
    return table.max(0).values.sum() / table.sum()


KMeans = Callable[[Tensor, int], Tensor]
"""Items (N, D) and a number of clusters -> assignment (N,)."""


def clustering_scores(
    embeddings: Tensor, labels: Tensor, *, seed: int = 0, restarts: int = 10, kmeans_of: KMeans | None = None
) -> dict[str, Tensor]:
    """`nmi`, `ami` and `f1` of k-means on embeddings, as many clusters as classes are present; float64 scalars.

    kmeans_of: another k-means; None: `kmeans` with `seed` and `restarts`.
    """
    k = len(torch.unique(labels))
    assignment = (
        kmeans_of(embeddings, k) if kmeans_of else kmeans(embeddings, k, seed=seed, restarts=restarts).assignment
    )
    return {
        "nmi": normalized_mutual_information(labels, assignment),
        "ami": adjusted_mutual_information(labels, assignment),
        "f1": pair_f1(labels, assignment)["pair_f1"],
    }
