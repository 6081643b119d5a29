"""Retrieval by binary codes: Hamming distances, tie-averaged MAP, precision within a radius.

Codes are the signs of real outputs, 0 positive. MAP@k in both normalisations comes from `metrics.retrieval`, with
distance="hamming"; equal distances are in the order of the gallery. Hashing protocols average over all queries, those
without relevant items as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.retrieval import (
    average_precision_at_k_min,
    average_precision_at_k_retrieved,
    ranks_of_hits,
)
from fgvczoo.metrics.retrieval_search import MEMORY, Relevance, block_sizes, check_finite, codes


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


def hamming_hits(
    queries: Tensor, gallery: Tensor, relevant: Relevance, k: int | None = None, *, memory: int = MEMORY
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of queries: relevance of the first k of each ranking, (n, k) bool, and how many relevant items there are,
    (n,) int64. Equal distances are in the order of the gallery. k: None, the whole gallery."""
    for query in _queries(len(queries), len(gallery), memory):
        distance = hamming_distances(queries[query], gallery).to(torch.int16)
        order = distance.sort(dim=1, stable=True).indices
        mask = relevant.block(query)
        yield mask.gather(1, order[:, :k]), mask.sum(1)


class HashingMetrics(Metric):
    """How well codes find the relevant items of a gallery: the numbers of the hashing literature.

    Args:
        k: of MAP@k; None: whole rankings.
        radius: of the precision within a Hamming ball.
        memory: bytes that blocks of the computation may take.

    `update` with outputs (B, bits), labels (B,) or tags (B, C), the rows of the data set (B,), and whether they are of
    the gallery. `compute` gives float64 scalars, means over all queries, those without relevant items as 0:

        map, map_min       MAP@k by the relevant items among the first k, or by min(R, k)
        map_tie_averaged   of whole rankings, the expectation over the orders of equal distances
        radius_precision   of the items within the radius, 0 where there are none; empty_balls: the share of these
        distinct_codes     of the gallery

    Codes are the signs of the outputs. Equal over any number of processes, each row counts once.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, k: int | None = None, radius: int = 2, *, memory: int = MEMORY, **options: Any) -> None:
        super().__init__(**options)
        if k is not None and k < 1:
            raise FgvczooError(f"k={k}; expected at least 1, or None for whole rankings")
        self.k, self.radius, self.memory = k, radius, memory
        for side in ("query", "gallery"):
            for name in ("codes", "labels", "index"):
                self.add_state(f"{side}_{name}", [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor, index: Tensor, *, gallery: bool) -> None:
        """Adds a batch. Raises `FgvczooError` for outputs that are not finite."""
        check_finite(outputs, "outputs")
        side = "gallery" if gallery else "query"
        for name, values in (("codes", codes(outputs.detach())), ("labels", labels), ("index", index)):
            getattr(self, f"{side}_{name}").append(values.detach())

    def _rows(self, side: str) -> tuple[Tensor, Tensor]:
        """Codes and labels in the order of the index, each row once."""
        parts = [getattr(self, f"{side}_{name}") for name in ("codes", "labels", "index")]
        if not len(parts[0]):
            raise FgvczooError(f"hashing: no item of the {side} was given; update the metric before computing it")
        rows, labels, index = (torch.cat(part) if isinstance(part, list) else part for part in parts)
        index, order = index.sort(stable=True)
        order = order[torch.cat([torch.ones_like(index[:1], dtype=torch.bool), index.diff() != 0])]
        return rows[order], labels[order]

    def compute(self) -> dict[str, Tensor]:
        """The means, see the class."""
        (queries, query_labels), (gallery, gallery_labels) = self._rows("query"), self._rows("gallery")
        relevant = Relevance(query_labels, gallery_labels)
        k = min(self.k or len(gallery), len(gallery))
        both: list[Tensor] = []
        for hits, counts in hamming_hits(queries, gallery, relevant, k, memory=self.memory):
            ranks = ranks_of_hits(hits)
            values = average_precision_at_k_retrieved(ranks, k), average_precision_at_k_min(ranks, counts, k)
            both.append(torch.stack(values))
        retrieved, least = torch.cat(both, 1).mean(1)
        items, found = distance_counts(queries, gallery, relevant, memory=self.memory)
        precision, empty = radius_precision(items, found, self.radius)
        return {
            "map": retrieved,
            "map_min": least,
            "map_tie_averaged": tie_averaged_precision(items, found).mean(),
            "radius_precision": precision.mean(),
            "empty_balls": empty.double().mean(),
            "distinct_codes": torch.tensor(float(len(torch.unique(gallery, dim=0)))),
        }
