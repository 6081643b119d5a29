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

Places = slice | Tensor  # rows of queries or of the gallery

DISTANCES = ("euclidean", "cosine", "snr", "hamming")
MEMORY = 256 * 2**20
"""Bytes that blocks take by default."""

_TILE = 1024  # queries and items of a block, whose distances processors keep in their caches
_CANDIDATE = 10  # bytes of one: its row, its place and its distance
_SAMPLE = 1024  # items at least of a sample of the gallery
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
        unique, number = torch.unique_consecutive(query, return_counts=True)
        rows = self.queries[unique].double()
        own = torch.arange(len(unique), device=query.device).repeat_interleave(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse tensors are in beta
            pairs = torch.sparse_csr_tensor(
                torch.nn.functional.pad(number.cumsum(0), (1, 0)),
                item,
                torch.zeros(len(query), dtype=torch.float64, device=query.device),
                size=(len(unique), len(self.gallery)),
                check_invariants=False,
            )
            products = torch.sparse.sampled_addmm(pairs, rows, self._gallery_double.T, beta=0.0).values()
        size = rows.square().sum(1)[own] + self._gallery_norm[item]
        squared: Tensor = size - 2 * products
        # Near duplicates are left with few digits: by differences.
        near = (squared <= _NEAR * size).nonzero()[:, 0]
        for part in torch.split(near, max(1, 2**17 // rows.shape[1])):
            difference = rows[own[part]] - self._gallery_double[item[part]]
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

    def finish(self, squared: Tensor, query: Places) -> Tensor:
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
    """Squared distances of a block of queries to a block of the gallery: one product each."""

    def __init__(self, space: Space) -> None:
        # Moving both to the gallery's mean makes norms, and so the rounding, small.
        centre = space.gallery.mean(0)
        exact = space.distance in ("cosine", "hamming")  # norms that are known, products that do not round
        gallery = space.gallery if exact else space.gallery - centre
        self.itself = space.queries is space.gallery
        queries = gallery if self.itself else space.queries if exact else space.queries - centre
        self.gallery_norm = _squared_norms(gallery)
        self.query_norm = self.gallery_norm if self.itself else _squared_norms(queries)
        if space.gallery_blank is not None and space.query_blank is not None:
            self.gallery_norm = self.gallery_norm.masked_fill(space.gallery_blank, 1.0)
            self.query_norm = self.query_norm.masked_fill(space.query_blank, 1.0)
        ones = torch.ones(1, 1, device=gallery.device)
        # (-2 q, |q|^2, 1) . (g, 1, |g|^2) = |q|^2 + |g|^2 - 2 q.g
        self.left = torch.cat([queries * -2, self.query_norm[:, None], ones.expand(len(queries), 1)], 1)
        self.right = torch.cat([gallery, ones.expand(len(gallery), 1), self.gallery_norm[:, None]], 1)
        self.largest = float(self.gallery_norm.max())
        self.relative = max(10.0, gallery.shape[1] ** 0.5 / 3) * torch.finfo(torch.float32).eps
        if space.distance == "hamming":  # whole numbers: nothing is rounded
            self.relative = 0.0

    def block(self, query: Places, item: Places, out: Tensor | None = None) -> Tensor:
        """|q|^2 + |g|^2 - 2 q.g: (queries, items) float32."""
        with full_precision():
            squared: Tensor = torch.mm(self.left[query], self.right[item].T, out=out)
        return squared

    def bound(self, query: Places) -> Tensor:
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
    distances = torch.empty(len(space.queries), k, device=space.queries.device)
    places = torch.empty(len(space.queries), k, dtype=torch.int64, device=space.queries.device)
    search = _Search(space, products, k, own, memory)
    for query, squared, place in search.results():
        distances[query] = space.finish(squared, query).float()
        places[query] = place
    return distances, places


class _Search:
    """Finds each query's candidates, all items up to some distance, and puts the best k in order.

    The distance comes from a sample of the gallery; queries that it misjudges are searched again with the distance of
    their k-th item. Of a set in itself each product serves both of its items.
    """

    def __init__(self, space: Space, products: _Products, k: int, own: Tensor | None, memory: int) -> None:
        self.space, self.products, self.k, self.memory = space, products, k, memory
        self.own = None if own is None else own.to(space.queries.device)
        self.count = len(space.gallery)
        self.limit = self._limits()

    def results(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries (n,), the squared distances (n, k) of their neighbours, float64, and their places (n, k)."""
        again = []
        expected = 2 * self.k * _CANDIDATE
        for group in _spans(0, len(self.space.queries), max(_TILE, self.memory // expected // _TILE * _TILE)):
            for query, squared, place in self._group(group):
                sure = ~self._missed(query, squared, place)
                again.append(query[~sure])
                yield query[sure], squared[sure], place[sure]
        missed = torch.cat(again)
        for part in torch.split(missed, max(1, self.memory // (12 * self.count))) if len(missed) else ():
            block = self._without_own(self.products.block(part, slice(None)), part)
            bound = self.products.bound(part)
            last = min(self.k, block.shape[1])
            row, item = (block <= _kth(block, last) + bound).nonzero(as_tuple=True)
            yield part, *self._ordered(part, row, item, block[row, item])

    def _limits(self) -> Tensor:
        """Up to which squared distance an item is a candidate: (Q,) float32."""
        size = min(self.count, max(_SAMPLE, self.count // 16))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(self.count, generator=generator)[:size].to(self.space.gallery.device)
        expected = (self.k + (self.own is not None)) * size / self.count
        # Three standard deviations of how many of the k are in the sample; the whole gallery is no sample.
        last = int(expected + (3 * expected**0.5 + 2 if size < self.count else 0))
        if last > size:
            return torch.full((len(self.space.queries),), torch.inf, device=chosen.device)
        limits = [
            _kth(self.products.block(query, chosen), last) + self.products.bound(query)
            for query in _spans(0, len(self.space.queries), max(1, min(_TILE, self.memory // (8 * size))))
        ]
        return torch.cat(limits)[:, 0]

    def _group(self, group: slice) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The results of neighbouring queries. Where ties make too many candidates: of half as many at a time."""
        found = self._candidates(group)
        if found is None:
            middle = (group.start + group.stop) // 2
            yield from self._group(slice(group.start, middle))
            yield from self._group(slice(middle, group.stop))
            return
        for query, parts in found:
            row, item, squared = (torch.cat(part) for part in zip(*parts))
            parts.clear()
            yield torch.arange(query.start, query.stop, device=row.device), *self._ordered(query, row, item, squared)

    def _candidates(self, group: slice) -> list[tuple[slice, list[tuple[Tensor, Tensor, Tensor]]]] | None:
        """For each tile of queries its candidates: rows of the tile, places and squared distances. None: too many."""
        tiles: list[tuple[slice, list[tuple[Tensor, Tensor, Tensor]]]]
        tiles = [(query, []) for query in _spans(group.start, group.stop, _TILE)]
        size = 0
        # One piece of memory for all blocks: what is kept of each would lie between them, and no block fit there again.
        distances = torch.empty(_TILE**2, device=self.limit.device)
        masks = torch.empty(_TILE**2, dtype=torch.bool, device=self.limit.device)

        def add(number: int, items: slice, block: Tensor) -> None:
            """Of squared distances (queries, items) those up to the limits."""
            nonlocal size
            query, parts = tiles[number]
            mask = masks[: block.numel()].view(block.shape)
            row, item = torch.le(block, self.limit[query, None], out=mask).nonzero(as_tuple=True)
            squared, item = block[row, item], item + items.start
            if self.own is not None:
                others = self.own[query][row] != item
                row, item, squared = row[others], item[others], squared[others]
            parts.append((row.short(), item.int(), squared))
            size += _CANDIDATE * len(row)

        for number, (query, _) in enumerate(tiles):
            inside = [other for other, _ in tiles[number:]] if self.products.itself else []
            first, last = (group.start, group.stop) if self.products.itself else (0, 0)
            for items in (*_spans(0, first, _TILE), *inside, *_spans(last, self.count, _TILE)):
                shape = (query.stop - query.start, items.stop - items.start)
                block = self.products.block(query, items, out=distances[: shape[0] * shape[1]].view(shape))
                add(number, items, block)
                if self.products.itself and query.start < items.start < group.stop:
                    add((items.start - group.start) // _TILE, query, block.T)
                if size > self.memory and group.stop - group.start > 1:
                    return None
        return tiles

    def _without_own(self, block: Tensor, query: Tensor) -> Tensor:
        _leave_out(block, self.own, query, slice(0, self.count))
        return block

    def _missed(self, query: Tensor, squared: Tensor, place: Tensor) -> Tensor:
        """Which queries may have nearer items than were found: (n,) bool."""
        limit = self.limit[query]
        every = limit.isinf()  # the whole gallery was looked at
        return ~every & ((place[:, -1] < 0) | (squared[:, -1] + self.products.bound(query)[:, 0] > limit))

    def _ordered(self, query: Places, row: Tensor, item: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        """The best k of the candidates of each query in order: squared distances (n, k) float64, infinite beyond the
        candidates; places (n, k), -1 there."""
        # Bits of numbers of 0 and more are in the order of the numbers.
        squared = squared.clamp(min=0.0)
        order = ((row.long() << 32) | squared.view(torch.int32)).argsort()
        row, item, squared = row.long()[order], item.long()[order], squared[order]
        norm = self.products.query_norm[query]
        number = torch.bincount(row, minlength=len(norm))
        slot = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
        width = max(self.k, int(number.max()))
        values = squared.new_full((len(norm), width), torch.inf)
        places = item.new_full((len(norm), width), -1)
        values[row, slot], places[row, slot] = squared, item
        return _order(self.space, self.products, query, values, places, self.k)


def _spans(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _leave_out(block: Tensor, own: Tensor | None, query: Places, item: slice) -> None:
    """Sets the queries' own items to infinity."""
    if own is None:
        return
    place = own[query].to(block.device) - item.start
    row = ((place >= 0) & (place < block.shape[1])).nonzero()[:, 0]
    block[row, place[row]] = torch.inf


def _kth(values: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each row: (n, 1)."""
    if values.device.type == "cpu":  # several times faster there
        return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k])
    return values.kthvalue(k, dim=1, keepdim=True).values


def _sorted(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by value; equal values in any order."""
    order = torch.from_numpy(np.argsort(values.numpy(), axis=1)) if values.device.type == "cpu" else values.argsort(1)
    return values.gather(1, order), places.gather(1, order)


def _order(
    space: Space, products: _Products, query: Places, values: Tensor, place: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each row in order, with squared distances (n, k) float64.

    values, place: (n, c), by value; infinite and -1 where there is none. Candidates that rounding could exchange, and
    near ones, get their distances by differences.
    """
    bound = products.bound(query)
    norm = products.query_norm[query][:, None]
    keep = (values <= values[:, k - 1 : k] + bound) & values.isfinite()
    width = max(k, int(keep.sum(1).max()))
    values, place, keep = values[:, :width], place[:, :width], keep[:, :width]
    close = values.diff(dim=1) <= bound
    near = values <= _SMALL * (norm + products.gallery_norm[place])
    again = torch.nn.functional.pad(close, (1, 0)) | torch.nn.functional.pad(close, (0, 1)) | near
    row, slot = (again & keep).nonzero(as_tuple=True)
    squared = values.double().clamp_(min=0.0)
    if space.distance != "hamming":
        number = row + query.start if isinstance(query, slice) else query[row]
        squared[row, slot] = space.exact(number, place[row, slot])
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
    bound = products.bound(query)
    targets = value.float()  # rounded within the bound
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
