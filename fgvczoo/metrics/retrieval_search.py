"""Exact nearest neighbours, and exact ranks of relevant items, in bounded memory.

Q queries, G gallery items, D dimensions. Distances come from products of blocks, |q|^2 + |g|^2 - 2 q.g in float32: what
lies within their rounding of something that it is compared with is computed again by differences in float64. So
rankings are those of float64, equal distances in the order of the gallery, whatever the block sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError

DISTANCES = ("euclidean", "cosine", "snr", "hamming")
MEMORY = 256 * 2**20
"""Bytes that blocks take by default."""

_CACHE = 2**21  # distances of a block that processors keep in their caches
_TINY_VARIANCE = 1e-12  # of a constant anchor under the SNR distance
_NEAR = 1e-6  # share of |q|^2 + |g|^2 below which a squared distance is computed by differences
_SMALL = 0.05  # and below which not by float32


@dataclass
class Space:
    """Rows whose squared Euclidean distances rank as the distance asked for.

    queries (Q, D), gallery (G, D): float32. blank: rows (of either) whose distance to everything is `apart`, the zero
    vectors under cosine; None for other distances.
    """

    distance: str
    queries: Tensor
    gallery: Tensor
    query_blank: Tensor | None = None
    gallery_blank: Tensor | None = None

    @classmethod
    def of(cls, queries: Tensor, gallery: Tensor, distance: str) -> Space:
        """The space of a distance: "euclidean"; "cosine", 1 - similarity (0 similarity to a zero vector); "snr", the
        variance of the difference over that of the query; "hamming", of the signs, where 0 is positive.

        Raises `FgvczooError` for an unknown distance, empty or misshapen embeddings, and such as are not finite.
        """
        if distance not in DISTANCES:
            raise FgvczooError(f"distance={distance!r}; expected {', '.join(DISTANCES)}")
        for name, rows in (("queries", queries), ("gallery", gallery)):
            if rows.ndim != 2 or not len(rows) or rows.shape[1] != queries.shape[1]:
                raise FgvczooError(
                    f"{name} {tuple(rows.shape)}: expected embeddings (N, {queries.shape[-1]}), at least one"
                )
            check_finite(rows, name)
        itself = gallery is queries
        a = queries.detach().float()
        b = a if itself else gallery.detach().float()
        if distance == "snr":
            if a.shape[1] < 2:
                raise FgvczooError("distance='snr' needs at least 2 dimensions, got 1")
            a = _centred(a)
            b = a if itself else _centred(b)
        if distance == "hamming":
            a = codes(a)
            b = a if itself else codes(b)
        if distance != "cosine":
            return cls(distance, a, b)
        a, a_blank = _normalised(a)
        b, b_blank = (a, a_blank) if itself else _normalised(b)
        return cls(distance, a, b, a_blank, b_blank)

    def exact(self, query: Tensor, item: Tensor) -> Tensor:
        """Squared distances of pairs (n,) of places, queries ascending, as float64 has them: (n,) float64."""
        if not len(query):
            return torch.zeros(0, dtype=torch.float64, device=query.device)
        first, last = int(query[0]), int(query[-1]) + 1
        rows = self.queries[first:last].double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse tensors are in beta
            pairs = torch.sparse_csr_tensor(
                torch.searchsorted(query, torch.arange(first, last + 1, device=query.device)),
                item,
                torch.zeros(len(query), dtype=torch.float64, device=query.device),
                size=(last - first, len(self.gallery)),
                check_invariants=False,
            )
            products = torch.sparse.sampled_addmm(pairs, rows, self._gallery_double.T, beta=0.0).values()
        size = rows.square().sum(1)[query - first] + self._gallery_norm[item]
        squared: Tensor = size - 2 * products
        # Near duplicates are left with few digits: by differences.
        near = (squared <= _NEAR * size).nonzero()[:, 0]
        for part in torch.split(near, max(1, 2**17 // rows.shape[1])):
            difference = rows[query[part] - first] - self._gallery_double[item[part]]
            squared[part] = difference.square_().sum(1)
        if self.query_blank is not None and self.gallery_blank is not None:
            squared = squared.masked_fill(self.query_blank[query] | self.gallery_blank[item], 2.0)
        return squared

    @cached_property
    def _gallery_double(self) -> Tensor:
        return self.gallery.double()

    @cached_property
    def _gallery_norm(self) -> Tensor:
        return torch.cat([part.square().sum(1) for part in torch.split(self._gallery_double, 4096)])

    def finish(self, squared: Tensor, query: slice) -> Tensor:
        """Squared distances (n, k) of n queries in the unit of the distance asked for; float64."""
        if self.distance == "euclidean":
            return squared.sqrt()
        if self.distance == "cosine":
            return squared / 2
        if self.distance == "hamming":
            return squared / 4
        energy = self.queries[query].double().square().sum(1)
        return squared / energy.clamp(min=_TINY_VARIANCE * self.queries.shape[1])[:, None]


def check_finite(rows: Tensor, name: str) -> None:
    """Raises `FgvczooError` that names the first row with a value that is not finite."""
    if rows.is_floating_point() and not bool(torch.isfinite(rows.sum())):
        bad = (~torch.isfinite(rows)).any(1).nonzero()
        if len(bad):
            raise FgvczooError(f"{name}: row {int(bad[0])} is not finite; the network has diverged, train it anew")


def codes(values: Tensor) -> Tensor:
    """Binary codes of real outputs (N, bits): +1 where a value is 0 or more, else -1; float32."""
    return (values >= 0).float().mul_(2).sub_(1)


def _centred(rows: Tensor) -> Tensor:
    rows = rows.double()
    return (rows - rows.mean(1, keepdim=True)).float()


def _normalised(rows: Tensor) -> tuple[Tensor, Tensor]:
    norm = rows.double().norm(dim=1, keepdim=True)
    blank = norm == 0
    return (rows.double() / norm.masked_fill(blank, 1.0)).float(), blank[:, 0]


class _Products:
    """Squared distances of a block of queries to a block of the gallery, less the queries' own squared norms."""

    def __init__(self, space: Space) -> None:
        self.space = space
        # Moving both to the gallery's mean makes norms, and so the rounding, small.
        centre = space.gallery.mean(0)
        exact = space.distance in ("cosine", "hamming")  # norms that are known, products that do not round
        self.gallery = space.gallery if exact else space.gallery - centre
        same = space.queries is space.gallery
        self.queries = self.gallery if same else space.queries if exact else space.queries - centre
        self.gallery_norm, self.query_norm = (_squared_norms(rows) for rows in (self.gallery, self.queries))
        if space.gallery_blank is not None and space.query_blank is not None:
            self.gallery_norm.masked_fill_(space.gallery_blank, 1.0)
            self.query_norm.masked_fill_(space.query_blank, 1.0)
        self.largest = float(self.gallery_norm.max())
        dimensions = self.gallery.shape[1]
        self.relative = max(8.0, dimensions**0.5 / 4) * torch.finfo(torch.float32).eps
        if space.distance == "hamming":  # whole numbers: nothing is rounded
            self.relative = 0.0

    def block(self, query: slice, item: slice) -> Tensor:
        """|g|^2 - 2 q.g: (queries, items) float32. Adding |q|^2 gives squared distances."""
        with full_precision():
            queries, gallery = self.queries[query], self.gallery[item]
            products: Tensor = torch.addmm(self.gallery_norm[item], queries, gallery.T, alpha=-2.0)
        return products

    def bound(self, query: slice) -> Tensor:
        """How far two equal distances of a query may be apart by rounding: (queries, 1) float32."""
        bound: Tensor = self.relative * (self.query_norm[query] + self.largest)
        return bound[:, None]


def _squared_norms(rows: Tensor) -> Tensor:
    parts = [part.double().square().sum(1) for part in torch.split(rows, max(1, 2**22 // max(1, rows.shape[1])))]
    return torch.cat(parts).float()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in float32 as such: no autocast, no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def block_sizes(queries: int, gallery: int, memory: int) -> tuple[int, int]:
    """Rows of a block of queries and of the gallery, for whose distances `memory` bytes are enough."""
    cells = max(1, memory // 12)  # distances, a mask, and their copies
    items = min(gallery, max(4096, cells // 64))
    return max(1, min(queries, cells // items, 1024)), items


@torch.no_grad()
def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    distance: str = "euclidean",
    own: Tensor | None = None,
    memory: int = MEMORY,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery items of every query, exactly: distances (Q, k) float64 and places (Q, k) int64.

    Args:
        queries: (Q, D); compared as float32.
        gallery: (G, D); likewise.
        k: neighbours; cut to what the gallery has (less the own item, where `own` is given).
        distance: see `Space.of`.
        own: (Q,) the place in the gallery of the query's own item, which is left out whatever its rank; -1: none.
        memory: bytes that blocks may take, besides the embeddings and the result.

    Squared distances are exact to a millionth of |q|^2 + |g|^2, those of near items to all their digits. Equal ones are
    in the order of the gallery; where a query has fewer than k items because only some have an own item, the distance
    is infinite and the place -1. Raises `FgvczooError` for k below 1, and as `Space.of`.
    """
    if k < 1:
        raise FgvczooError(f"k={k}; expected at least 1")
    space = Space.of(queries, gallery, distance)
    count = len(space.gallery)
    k = min(k, count - int(own is not None and bool((own >= 0).all())))
    if k == 0:
        none = torch.zeros(len(space.queries), 0, device=space.queries.device)
        return none, none.long()
    products = _Products(space)
    rows, items = block_sizes(len(space.queries), count, memory)
    if items > (few := max(4096, 64 * k)):  # blocks that stay in the cache; after the first, few items are candidates
        rows, items = min(rows, _CACHE // few), few
    distances = torch.empty(len(space.queries), k, device=space.queries.device)
    places = torch.empty(len(space.queries), k, dtype=torch.int64, device=space.queries.device)
    for start in range(0, len(space.queries), rows):
        query = slice(start, min(start + rows, len(space.queries)))
        bound = products.bound(query)
        values, place = torch.empty(len(bound), 0, device=bound.device), places.new_empty(len(bound), 0)
        for first in range(0, count, items):
            item = slice(first, min(first + items, count))
            block = products.block(query, item)
            _leave_out(block, own, query, item)
            if values.shape[1] < k:
                more, column = _candidates(block, k, bound)
            else:
                more, column = _below(block, values[:, k - 1 : k] + bound)
            if more.shape[1]:
                values, place = _sorted(torch.cat([values, more], 1), torch.cat([place, column + first], 1))
                width = max(k, int((values <= values[:, k - 1 : k] + bound).sum(1).max())) if values.shape[1] > k else k
                values, place = values[:, :width], place[:, :width]
        squared, places[query] = _order(space, products, query, values, place, k)
        distances[query] = space.finish(squared, query).float()
    return distances, places


def _leave_out(block: Tensor, own: Tensor | None, query: slice, item: slice) -> None:
    """Sets the queries' own items to infinity."""
    if own is None:
        return
    place = own[query].to(block.device) - item.start
    row = ((place >= 0) & (place < block.shape[1])).nonzero()[:, 0]
    block[row, place[row]] = torch.inf


def _candidates(block: Tensor, k: int, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the k smallest values and all within `bound` of the k-th: values (n, c), infinite where there are
    fewer, and columns (n, c); by value."""
    rows, columns = block.shape
    if columns <= 2 * k:
        return _sorted(block, torch.arange(columns, device=block.device).expand(rows, columns))
    if columns <= 32 * k:
        return _sorted(*_below(block, _kth(block, k) + bound))
    # A sample tells about where the k-th value lies; rows that it misjudges are selected from once more.
    sample = block[:, ::16]
    guess = min(sample.shape[1], int(k / 16 + k**0.5) + 2)
    limit = _kth(sample, guess)
    values, column = _sorted(*_below(block, limit))
    kth = values[:, k - 1 : k] if values.shape[1] >= k else torch.full_like(limit, torch.inf)
    wrong = ~(kth + bound <= limit)[:, 0]
    if bool(wrong.any()):
        limit[wrong] = _kth(block[wrong], k) + bound[wrong]
        values, column = _sorted(*_below(block, limit))
    return values, column


def _kth(values: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each row: (n, 1)."""
    if values.device.type == "cpu":  # several times faster there
        return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k])
    return values.kthvalue(k, dim=1, keepdim=True).values


def _sorted(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by value; equal values in any order."""
    order = torch.from_numpy(np.argsort(values.numpy(), axis=1)) if values.device.type == "cpu" else values.argsort(1)
    return values.gather(1, order), places.gather(1, order)


def _below(block: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The values of each row up to its limit, and their columns, ascending; padded with infinity and 0."""
    row, column = (block <= limit).nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(block))
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    width = int(count.max()) if len(row) else 0
    values = block.new_full((len(block), width), torch.inf)
    columns = row.new_zeros(len(block), width)
    values[row, slot] = block[row, column]
    columns[row, slot] = column
    return values, columns


def _order(
    space: Space, products: _Products, query: slice, values: Tensor, place: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each row in order, with squared distances (n, k) float64.

    Candidates that rounding could exchange, and near ones, get their distances by differences.
    """
    bound = products.bound(query)
    norm = products.query_norm[query][:, None]
    keep = (values <= values[:, k - 1 : k] + bound) & values.isfinite()
    width = int(keep.sum(1).max())
    values, place, keep = values[:, :width], place[:, :width], keep[:, :width]
    close = values.diff(dim=1) <= bound
    near = values + norm <= _SMALL * (norm + products.gallery_norm[place])
    again = torch.nn.functional.pad(close, (1, 0)) | torch.nn.functional.pad(close, (0, 1)) | near
    row, slot = (again & keep).nonzero(as_tuple=True)
    squared = (values.double() + norm).clamp_(min=0.0)
    if space.distance != "hamming":
        squared[row, slot] = space.exact(row + query.start, place[row, slot])
    squared.masked_fill_(~keep, torch.inf)
    squared, place = _sorted(squared, place.masked_fill(~keep, -1))
    # Equal distances are still in any order.
    turned = ((squared.diff(dim=1) == 0) & (place.diff(dim=1) < 0)).any(1).nonzero()[:, 0]
    if len(turned):
        ascending, order = place[turned].sort(dim=1)
        squared[turned], order = squared[turned].gather(1, order).sort(dim=1, stable=True)
        place[turned] = ascending.gather(1, order)
    return squared[:, :k], place[:, :k]


@torch.no_grad()
def relevant_ranks(
    queries: Tensor,
    gallery: Tensor,
    relevant: Relevance,
    *,
    distance: str = "euclidean",
    own: Tensor | None = None,
    memory: int = MEMORY,
    rows: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """The ranks, from 1, of every relevant item of each query: (Q, R) float64, ascending, infinite beyond the query's
    own number of them, which is the second result (Q,) int64.

    Counts how many items come before each relevant one; the gallery is never sorted. relevant: see `Relevance`. rows:
    the queries to do. Other arguments, order and errors as `nearest`; a query's own item counts nowhere.
    """
    space = Space.of(queries, gallery, distance)
    products = _Products(space)
    count = len(space.gallery)
    rows = rows or slice(0, len(space.queries))
    size, items = block_sizes(rows.stop - rows.start, count, memory // 3)
    ranks, counts = [], []
    for start in range(rows.start, rows.stop, size):
        query = slice(start, min(start + size, rows.stop))
        mask = relevant.block(query)
        _leave_out_of(mask, own, query)
        row, place = mask.nonzero(as_tuple=True)
        number = torch.bincount(row, minlength=len(mask))
        slot = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
        width = max(1, int(number.max()))
        value = torch.full((len(mask), width), torch.inf, dtype=torch.float64, device=mask.device)
        column = torch.full((len(mask), width), count, device=mask.device)
        value[row, slot] = space.exact(row + query.start, place)
        column[row, slot] = place
        value, order = value.sort(dim=1, stable=True)
        column = column.gather(1, order)
        before = torch.zeros_like(value)
        for first in range(0, count, items):
            item = slice(first, min(first + items, count))
            before += _items_before(space, products, query, item, value, column, own)
        ranks.append((before + 1).masked_fill(value.isinf(), torch.inf))
        counts.append(number)
    width = max(part.shape[1] for part in ranks)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=torch.inf) for part in ranks]
    return torch.cat(padded), torch.cat(counts)


def _leave_out_of(mask: Tensor, own: Tensor | None, query: slice) -> None:
    if own is not None:
        place = own[query].to(mask.device)
        row = (place >= 0).nonzero()[:, 0]
        mask[row, place[row]] = False


def _items_before(
    space: Space, products: _Products, query: slice, item: slice, value: Tensor, column: Tensor, own: Tensor | None
) -> Tensor:
    """How many items of a block come before each relevant one: (n, R) float64.

    value: squared distances of the relevant items, ascending; column: their places, the gallery's size where there is
    none.
    """
    block = products.block(query, item)
    _leave_out(block, own, query, item)
    norm, bound = products.query_norm[query][:, None], products.bound(query)
    targets = (value - norm).float()  # as the block has them, rounded within the bound
    low = torch.searchsorted(targets, block - bound)
    high = torch.searchsorted(targets, block + bound, right=True)
    clear = low == high
    histogram = torch.zeros(len(block), value.shape[1] + 1, dtype=torch.float64, device=block.device)
    histogram.scatter_add_(1, low, clear.double())
    before = histogram.cumsum(1)[:, :-1]  # an item at position p comes before the relevant ones p, p + 1, ...
    row, place = (~clear & block.isfinite()).nonzero(as_tuple=True)
    step = max(1, 2**22 // value.shape[1])
    for r, p in zip(torch.split(row, step), torch.split(place, step)):
        exact = space.exact(r + query.start, p + item.start)[:, None]
        first = (exact < value[r]) | ((exact == value[r]) & ((p + item.start)[:, None] < column[r]))
        before.index_add_(0, r, first.double())
    return before


@dataclass(frozen=True)
class Relevance:
    """Which gallery items are relevant to a query: those of its label, or with at least one common tag.

    query, gallery: (Q,) and (G,) whole numbers, or (Q, C) and (G, C) where more than 0 means that a tag is there.
    """

    query: Tensor
    gallery: Tensor

    def __post_init__(self) -> None:
        if self.query.ndim != self.gallery.ndim or self.query.shape[1:] != self.gallery.shape[1:]:
            raise FgvczooError(
                f"labels {tuple(self.query.shape)} and {tuple(self.gallery.shape)}: expected (Q,) and (G,), or (Q, C) "
                "and (G, C)"
            )

    def block(self, query: slice) -> Tensor:
        """(queries, G) bool."""
        if self.query.ndim == 1:
            return self.query[query, None].long() == self.gallery.long()
        return (self.query[query] > 0).float() @ (self.gallery > 0).float().T > 0

    def at(self, query: slice, place: Tensor) -> Tensor:
        """Relevance of places (queries, k) of the gallery: bool."""
        if self.query.ndim == 1:
            return self.query[query, None].long() == self.gallery.long()[place]
        return ((self.query[query, None] > 0) & (self.gallery[place] > 0)).any(2)
