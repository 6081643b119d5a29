"""Image retrieval: Recall@K, R-precision, MAP@R and their kin, from the ranks of relevant items.

Q queries, G gallery items, R_q relevant items of a query. A query's own item is removed by its index, whatever its
rank; equal distances are in the order of the gallery. A query without relevant items is lone: means leave it out, and
counts name it. With P(r) the share of relevant items among the first r:

    Recall@K     1 if one of the first K is relevant, as metric learning has it (information retrieval: hit rate)
    R-precision  P(R_q)
    MAP@R        sum of P(r) over relevant ranks r <= R_q, by R_q (Musgrave et al., ECCV 2020, section 3.2)
    MAP          sum of P(r) over all relevant ranks, by R_q
    MRR          1 / the first relevant rank
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.metrics.retrieval_search import MEMORY, Relevance, check_finite, nearest, relevant_ranks

KS = (1, 2, 4, 8)


def retrieval_ranks(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    distance: str = "euclidean",
    k: int | None = None,
    own: Tensor | None = None,
    memory: int = MEMORY,
    rows: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the relevant items of each query stand: ranks (Q, R) float64 from 1, ascending, infinite where there is no
    further one; and how many there are, (Q,) int64.

    Args:
        queries: (Q, D).
        query_labels: (Q,) whole numbers, or tags (Q, C).
        gallery: (G, D); None: the queries themselves, each left out of its own.
        gallery_labels: (G,) or (G, C).
        distance: "euclidean", "cosine", "snr" (the query is the anchor), "hamming" (of the signs).
        k: look at the first k of each ranking alone; later ranks are infinite. Faster where k is small. None: all.
        own: (Q,) place of each query's own item in the gallery, -1 for none; by default as above.
        memory: bytes that blocks may take.
        rows: the queries to do; None: all.

    Raises `FgvczooError` for empty or misshapen input and values that are not finite.
    """
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
        own = torch.arange(len(queries), device=queries.device) if own is None else own
    if len(query_labels) != len(queries) or len(gallery_labels) != len(gallery):
        raise FgvczooError(
            f"{len(queries)} queries with {len(query_labels)} labels, {len(gallery)} gallery items with "
            f"{len(gallery_labels)}; expected one label each"
        )
    relevant = Relevance(query_labels, gallery_labels)
    if k is None:
        return relevant_ranks(queries, gallery, relevant, distance=distance, own=own, memory=memory, rows=rows)
    rows = rows or slice(0, len(queries))
    chosen = queries if rows == slice(0, len(queries)) and gallery is queries else queries[rows]
    places = nearest(chosen, gallery, k, distance=distance, own=None if own is None else own[rows], memory=memory)[1]
    counts = relevant_counts(relevant, own, rows)
    hits = torch.cat(
        [
            relevant.at(slice(rows.start + start, rows.start + start + len(part)), part.clamp(min=0)) & (part >= 0)
            for start, part in _blocks(places)
        ]
    )
    return ranks_of_hits(hits), counts


def _blocks(places: Tensor) -> list[tuple[int, Tensor]]:
    step = max(1, 2**22 // max(1, places.shape[1]))
    return [(start, places[start : start + step]) for start in range(0, len(places), step)]


def relevant_counts(relevant: Relevance, own: Tensor | None, rows: slice | None = None) -> Tensor:
    """Relevant items of each query, without its own item: (Q,) int64."""
    rows = rows or slice(0, len(relevant.query))
    if relevant.query.ndim == 1:
        labels, inverse = torch.unique(relevant.gallery.long(), return_inverse=True)
        size = torch.bincount(inverse, minlength=len(labels))
        place = torch.searchsorted(labels, relevant.query[rows].long()).clamp(max=len(labels) - 1)
        counts: Tensor = size[place] * (labels[place] == relevant.query[rows].long())
    else:
        starts = range(rows.start, rows.stop, 1024)
        counts = torch.cat([relevant.block(slice(s, min(s + 1024, rows.stop))).sum(1) for s in starts])
    if own is not None:
        mine = own[rows].to(counts.device)
        has = (mine >= 0).nonzero()[:, 0]
        for start in range(0, len(has), 2**16):
            part = has[start : start + 2**16]
            query, item = relevant.query[part + rows.start], relevant.gallery[mine[part]]
            same = query.long() == item.long() if query.ndim == 1 else ((query > 0) & (item > 0)).any(1)
            counts[part] -= same.long()
    return counts


def ranks_of_hits(hits: Tensor) -> Tensor:
    """Relevance of a ranking's first k (Q, k) -> ranks of the relevant ones (Q, R), padded with infinity."""
    row, column = hits.bool().nonzero(as_tuple=True)
    number = torch.bincount(row, minlength=len(hits))
    slot = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    width = max(1, int(number.max())) if len(hits) else 1
    ranks = torch.full((len(hits), width), torch.inf, dtype=torch.float64, device=hits.device)
    ranks[row, slot] = (column + 1).double()
    return ranks


# -- one value a query ----------------------------------------------------------------------------------------------
# Each takes ranks (Q, R) and counts (Q,) of `retrieval_ranks` and gives float64 (Q,); 0 for a lone query.


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """1 where one of the first k is relevant, else 0. A k beyond the ranking takes the whole ranking."""
    return (ranks[:, 0] <= k).double()


def true_recall_at_k(ranks: Tensor, counts: Tensor, k: int) -> Tensor:
    """Share of the relevant items that are among the first k."""
    return (ranks <= k).sum(1).double() / counts.clamp(min=1)


def precision_at_k(ranks: Tensor, k: int) -> Tensor:
    """Share of the first k that is relevant."""
    return (ranks <= k).sum(1).double() / k


def r_precision(ranks: Tensor, counts: Tensor) -> Tensor:
    """Share of the first R_q that is relevant."""
    return (ranks <= counts[:, None]).sum(1).double() / counts.clamp(min=1)


def average_precision_at_r(ranks: Tensor, counts: Tensor) -> Tensor:
    """Sum of the precision at relevant ranks up to R_q, by R_q; its mean is MAP@R. At most the R-precision."""
    return _precisions(ranks, counts[:, None]).sum(1) / counts.clamp(min=1)


def average_precision(ranks: Tensor, counts: Tensor) -> Tensor:
    """Sum of the precision at all relevant ranks, by R_q; its mean is MAP."""
    return _precisions(ranks, torch.inf).sum(1) / counts.clamp(min=1)


def average_precision_at_k_retrieved(ranks: Tensor, k: int) -> Tensor:
    """Sum of the precision at relevant ranks up to k, by the number of these: MAP@k of the hashing literature."""
    return _precisions(ranks, k).sum(1) / (ranks <= k).sum(1).clamp(min=1)


def average_precision_at_k_min(ranks: Tensor, counts: Tensor, k: int) -> Tensor:
    """Sum of the precision at relevant ranks up to k, by min(R_q, k)."""
    return _precisions(ranks, k).sum(1) / counts.clamp(min=1, max=k)


def reciprocal_rank(ranks: Tensor) -> Tensor:
    """1 / the rank of the first relevant item."""
    return 1 / ranks[:, 0]


def _precisions(ranks: Tensor, limit: Tensor | float) -> Tensor:
    """P(r) at each relevant rank up to a limit, else 0."""
    number = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64, device=ranks.device)
    return torch.where((ranks <= limit) & ranks.isfinite(), number / ranks, 0.0)


def retrieval_values(ranks: Tensor, counts: Tensor, ks: Sequence[int] = KS, *, full: bool = True) -> dict[str, Tensor]:
    """Every metric of a query, by name: `recall_at_K`, `r_precision`, `map_at_r`, and where the ranks are `full` (not
    cut at some k) `mean_average_precision`, `mean_reciprocal_rank`; each (Q,) float64."""
    values = {f"recall_at_{k}": recall_at_k(ranks, k) for k in ks}
    values["r_precision"] = r_precision(ranks, counts)
    values["map_at_r"] = average_precision_at_r(ranks, counts)
    if full:
        values["mean_average_precision"] = average_precision(ranks, counts)
        values["mean_reciprocal_rank"] = reciprocal_rank(ranks)
    return values


def mean_over_queries(values: Tensor, counts: Tensor, *, lone: str = "exclude") -> Tensor:
    """Mean of values (Q,) over the queries that have relevant items: a float64 scalar; NaN if none has.

    lone: "miss" takes the others in, as the 0 that they have.
    """
    if lone not in ("exclude", "miss"):
        raise FgvczooError(f"lone={lone!r}; expected 'exclude' or 'miss'")
    return values.mean() if lone == "miss" else values[counts > 0].mean()


def mean_over_classes(values: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Mean over the classes of the means over each class's queries, lone ones left out: a float64 scalar."""
    has = counts > 0
    classes, inverse = torch.unique(labels[has], return_inverse=True)
    total = torch.zeros(len(classes), dtype=torch.float64, device=values.device).index_add_(0, inverse, values[has])
    return (total / torch.bincount(inverse, minlength=len(classes))).mean()


def bootstrap_interval(
    values: Tensor, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of a mean over queries, by resampling the queries: its lower and upper end.

    values: (Q,) of the queries that count. The same seed gives the same interval.
    """
    if not len(values):
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(samples)]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class Evaluated:
    """What `RetrievalMetrics` computed of N items, of all processes, in the order of their index.

    embeddings (N, D), labels (N,), index (N,). values: each metric of each item as a query, by name, (N,) float64.
    counts: relevant items of each, (N,).
    """

    embeddings: Tensor
    labels: Tensor
    index: Tensor
    values: dict[str, Tensor]
    counts: Tensor


class RetrievalMetrics(Metric):
    """Recall@K, R-precision, MAP@R (and MAP, MRR) of a set that is its own gallery.

    Args:
        ks: of Recall@K.
        distance: of the ranking, see `retrieval_ranks`.
        full: MAP and MRR as well, which look at whole rankings.
        lone: "exclude" or "miss", see `mean_over_queries`.
        class_means: also the means over classes, `NAME_class_mean`.
        items: how many items there should be; another number at the end is an error.
        allow_repeats: items of one index may differ (augmented views); the first is kept.
        memory: bytes that blocks of the computation may take.

    `update` with embeddings (B, D), labels (B,) and the rows of the data set (B,) that they are of: an item that comes
    twice, as samplers that pad repeat it, counts once. `compute` gives float64 scalars by name, `num_queries` and
    `num_queries_without_match`; NaN, with a warning, where no query has a relevant item.

    Embeddings are kept as float32 on the CPU (on the GPU where processes speak NCCL). Over several processes every one
    evaluates its share of the queries; the result is that of one process to the bit.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    embeddings: list[Tensor]
    labels: list[Tensor]
    index: list[Tensor]
    evaluated: Evaluated  # by the last `compute`

    def __init__(
        self,
        ks: Sequence[int] = KS,
        distance: str = "euclidean",
        *,
        full: bool = False,
        lone: str = "exclude",
        class_means: bool = False,
        items: int | None = None,
        allow_repeats: bool = False,
        memory: int = MEMORY,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not ks or min(ks) < 1:
            raise FgvczooError(f"ks={list(ks)}; expected numbers of at least 1")
        self.ks, self.distance, self.full, self.lone = tuple(ks), distance, full, lone
        self.class_means, self.items, self.allow_repeats, self.memory = class_means, items, allow_repeats, memory
        for name in ("embeddings", "labels", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor, index: Tensor) -> None:
        """Adds a batch. Raises `FgvczooError` for embeddings that are not finite."""
        check_finite(embeddings, "embeddings")
        keep = embeddings.device if _speaks_nccl() else torch.device("cpu")
        self.embeddings.append(embeddings.detach().float().to(keep))
        self.labels.append(labels.detach().long().to(keep))
        self.index.append(index.detach().long().to(keep))

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, labels and index of all items, each once, in the order of their index."""
        parts = [part if isinstance(part, list) else [part] for part in (self.embeddings, self.labels, self.index)]
        if not parts[0] or not sum(len(part) for part in parts[0]):
            raise FgvczooError("retrieval: no item was given; update the metric before computing it")
        embeddings, labels, index = (torch.cat(part) for part in parts)
        index, order = index.sort(stable=True)
        embeddings, labels = embeddings[order], labels[order]
        first = torch.cat([torch.ones_like(index[:1], dtype=torch.bool), index.diff() != 0])
        if not bool(first.all()):
            kept = embeddings[first][first.cumsum(0) - 1]
            if not self.allow_repeats and not torch.allclose(embeddings, kept, rtol=1e-3, atol=1e-4):
                row = int(index[~torch.isclose(embeddings, kept, rtol=1e-3, atol=1e-4).all(1)][0])
                raise FgvczooError(
                    f"retrieval: row {row} of the data came with several embeddings; evaluate without augmentation, or "
                    "set allow_repeats"
                )
            embeddings, labels, index = embeddings[first], labels[first], index[first]
        if self.items is not None and len(index) != self.items:
            raise FgvczooError(f"retrieval: {len(index)} different items of {self.items}; every item must be evaluated")
        return embeddings, labels, index

    def _evaluate(self) -> Evaluated:
        embeddings, labels, index = self._gathered()
        world, rank = (dist.get_world_size(), dist.get_rank()) if self._is_synced else (1, 0)
        rows = slice(len(labels) * rank // world, len(labels) * (rank + 1) // world)
        counts = relevant_counts(Relevance(labels, labels), torch.arange(len(labels), device=labels.device))
        k = None if self.full else min(max(*self.ks, int(counts.max()), 1), max(1, len(labels) - 1))
        names = [*retrieval_values(torch.ones(1, 1), torch.ones(1), self.ks, full=self.full)]
        table = torch.zeros(len(names), len(labels), dtype=torch.float64, device=labels.device)
        if rows.stop > rows.start and len(labels) > 1:
            ranks, _ = retrieval_ranks(embeddings, labels, distance=self.distance, k=k, memory=self.memory, rows=rows)
            own = retrieval_values(ranks, counts[rows], self.ks, full=self.full)
            table[:, rows] = torch.stack([own[name] for name in names])
        if world > 1:
            dist.all_reduce(table)  # every query is of one process: sums with zeros, exact
        return Evaluated(embeddings, labels, index, dict(zip(names, table)), counts)

    def compute(self) -> dict[str, Tensor]:
        """The means, and the counts of queries; what each query has is in `evaluated` then."""
        self.evaluated = self._evaluate()
        values, counts, labels = self.evaluated.values, self.evaluated.counts, self.evaluated.labels
        if not bool((counts > 0).any()):
            warnings.warn(
                "retrieval: no item has another one of its class; the metrics are undefined",
                FgvczooWarning,
                stacklevel=2,
            )
        result = {name: mean_over_queries(value, counts, lone=self.lone) for name, value in values.items()}
        if self.class_means:
            result |= {f"{name}_class_mean": mean_over_classes(v, labels, counts) for name, v in values.items()}
        result["num_queries"] = torch.tensor(len(counts))
        result["num_queries_without_match"] = (counts == 0).sum()
        return result


def _speaks_nccl() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
