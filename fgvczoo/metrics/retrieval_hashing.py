"""Retrieval by binary codes: Hamming distances, tie-averaged MAP, precision within a radius.

Codes are the signs of real outputs, 0 positive. MAP@k in both normalisations comes from `metrics.retrieval`, with
distance="hamming"; equal distances are in the order of the gallery. Hashing protocols average over all queries, those
without relevant items as 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fgvczoo.metrics.retrieval_search import MEMORY, Relevance, block_sizes, codes


def hamming_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """Bits in which codes differ: outputs (Q, bits) and (G, bits) -> (Q, G) int64."""
    return ((queries.shape[1] - codes(queries) @ codes(gallery).T) / 2).long()


def distance_counts(
    queries: Tensor, gallery: Tensor, relevant: Relevance, *, memory: int = MEMORY
) -> tuple[Tensor, Tensor]:
    """Items, and relevant items, at each Hamming distance 0..bits of each query: two (Q, bits + 1) float64."""
    bits = queries.shape[1]
    totals: list[Tensor] = []
    found: list[Tensor] = []
    for query in _queries(len(queries), len(gallery), memory):
        distance = hamming_distances(queries[query], gallery)
        for weight, sums in ((torch.ones_like(distance), totals), (relevant.block(query), found)):
            count = torch.zeros(len(distance), bits + 1, dtype=torch.float64, device=distance.device)
            sums.append(count.scatter_add_(1, distance, weight.double()))
    return torch.cat(totals), torch.cat(found)


def _queries(count: int, gallery: int, memory: int) -> Iterator[slice]:
    size = max(1, min(block_sizes(count, gallery, memory)[0], memory // (32 * gallery)))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def tie_averaged_precision(items: Tensor, relevant: Tensor) -> Tensor:
    """Expectation of the average precision over all orders of equal distances: (Q,) float64, 0 without relevant items.

    items, relevant: (Q, groups), of each group of equal distance, nearest first. In a group of n items with r relevant
    ones, after b items with c relevant, a place t holds a relevant one with probability r/n, and among the t - 1
    before it (t - 1)(r - 1)/(n - 1) are expected to be relevant then.
    """
    before, found = items.cumsum(1) - items, relevant.cumsum(1) - relevant
    total = torch.zeros(len(items), dtype=torch.float64, device=items.device)
    for group in range(items.shape[1]):
        n, r, b, c = (x[:, group, None] for x in (items, relevant, before, found))
        largest = int(n.max())
        if not largest or not bool((r > 0).any()):
            continue
        t = torch.arange(1, largest + 1, dtype=torch.float64, device=items.device)
        expected = c + (t - 1) * (r - 1) / (n - 1).clamp(min=1) + 1
        terms = torch.where(t <= n, r / n.clamp(min=1) * expected / (b + t), 0.0)
        total += terms.sum(1)
    return total / relevant.sum(1).clamp(min=1)


def radius_precision(items: Tensor, relevant: Tensor, radius: int = 2) -> tuple[Tensor, Tensor]:
    """Share of relevant items among those within a Hamming radius: (Q,) float64, 0 for an empty ball; and which balls
    are empty, (Q,) bool. items, relevant: of `distance_counts`."""
    inside = items[:, : radius + 1].sum(1)
    return relevant[:, : radius + 1].sum(1) / inside.clamp(min=1), inside == 0
