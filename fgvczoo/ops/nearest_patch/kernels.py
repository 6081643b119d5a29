"""The Triton kernels of `nearest_patch`; `triton.py` launches them.

SHAPE is (cells of a map, cells in a row of it, rows and columns of a prototype's window, D); N windows fit a map. An
*operand* is (high, low, norm): vectors of D numbers, of patches (B, cells, D), of prototypes (cells of the window, P,
D); `low` is what `high` rounded off, where it is SPLIT; norm is the squared norm of each vector. DEEP operands lie the
other way round, (B, D, cells) and (cells of the window, D, P): what float32 arithmetic reads without conflicts between
banks, where matrix units want the numbers of a vector side by side. *Pairs* (B, S, P) are of an image and a prototype,
S times: metrics x ranks.

Prototypes lie on the rows of a product tile and patches on its columns, so that a row, where the winner is searched,
stays in one warp. N and D are constants of a compiled kernel: masks are left to the last tile, loads are 16 bytes wide.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from fgvczoo.ops.nearest_patch import reference

SMALLEST = tl.constexpr(reference.EPS**2)
EPSILON = tl.constexpr(reference.EPSILON)
ROOT_EPSILON = tl.constexpr(reference.ROOT_EPSILON)
# Squared distances below this share of the prototype's squared norm are computed again, from the difference. Above it
# the expanded square has lost five bits at most.
CLOSE = tl.constexpr(1 / 32)


# -- packed operands --------------------------------------------------------------------------------------------------


@triton.jit
def _place(row, d, rows, D: tl.constexpr, DEEP: tl.constexpr):
    """Where channel d of a vector is, among `rows` of them."""
    if DEEP:
        return d * rows + row
    return row * D + d


@triton.jit
def _pack(
    source, strides, rows, channels, packed, rows_packed, block,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """One block of rows of one image, read in any layout; zeros where there is none."""
    high, low, norm = packed
    image_stride, channel_stride, row_stride = strides
    blocks = tl.cdiv(rows_packed, BLOCK_N)
    image = (block // blocks).to(tl.int64)
    n = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        at = image * image_stride + n[:, None] * row_stride + d[None, :] * channel_stride
        exact = tl.load(source + at, mask=(n[:, None] < rows) & (d[None, :] < channels), other=0.0).to(tl.float32)
        to = image * rows_packed * D + _place(n[:, None], d[None, :], rows_packed, D, DEEP)
        inside = n[:, None] < rows_packed
        rounded = exact.to(high.dtype.element_ty)
        tl.store(high + to, rounded, mask=inside)
        value = rounded.to(tl.float32)
        if SPLIT:
            rest = (exact - value).to(low.dtype.element_ty)
            tl.store(low + to, rest, mask=inside)
            value += rest.to(tl.float32)
        # Of the rounded row: with these norms the expanded square is the exact distance of the rounded vectors.
        square += tl.sum(tl.where(tl.abs(value) < float("inf"), value * value, float("nan")), 1)
    tl.store(norm + image * rows_packed + n, square, mask=n < rows_packed)


@triton.jit(do_not_specialize=["patch_blocks", "count", "count_packed"])
def pack(
    patches, image_stride, channel_stride, cell_stride, cells, cells_packed, patch_blocks, x, x_low, x_norm,
    prototypes, place_stride, prototype_channel_stride, prototype_stride, count, count_packed, p, p_low, p_norm,
    channels, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Packs patches (the first `patch_blocks` programs) and prototypes: an image of P cells per place of the window.

    The norm is NaN where an entry is not finite.
    """
    block = tl.program_id(0)
    if block < patch_blocks:
        strides = (image_stride, channel_stride, cell_stride)
        packed = (x, x_low, x_norm)
        _pack(patches, strides, cells, channels, packed, cells_packed, block, D, BLOCK_N, BLOCK_D, SPLIT, DEEP)
    else:
        strides = (place_stride, prototype_channel_stride, prototype_stride)
        packed = (p, p_low, p_norm)
        block -= patch_blocks
        _pack(prototypes, strides, count, channels, packed, count_packed, block, D, BLOCK_N, BLOCK_D, SPLIT, DEEP)


@triton.jit
def _cell(n, SHAPE: tl.constexpr):
    """The upper left cell of the n-th window."""
    WINDOWS: tl.constexpr = SHAPE[1] - SHAPE[3] + 1  # in a row of the map
    if SHAPE[3] == 1:
        return n
    return n // WINDOWS * SHAPE[1] + n % WINDOWS


@triton.jit
def _shift(place, SHAPE: tl.constexpr):
    """From the upper left cell of a window to its cell at `place`."""
    if SHAPE[2] * SHAPE[3] == 1:
        return 0
    return place // SHAPE[3] * SHAPE[1] + place % SHAPE[3]


@triton.jit
def _rows(source, row, d, rows, keep, MASKED: tl.constexpr, D: tl.constexpr, DEEP: tl.constexpr):
    """Vectors (n,) among the `rows` of a packed operand, of which channels d (m,): (n, m)."""
    at = source + _place(row[:, None], d[None, :], rows, D, DEEP)
    if MASKED:
        return tl.load(at, mask=keep[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _patch_norm(norm, cell, keep, SHAPE: tl.constexpr):
    """Squared norms of the windows at cells (n,); 0 where not to `keep`."""
    total = tl.zeros(cell.shape, tl.float32)
    for place in range(0, SHAPE[2] * SHAPE[3]):
        total += tl.load(norm + cell + _shift(place, SHAPE), mask=keep, other=0.0)
    return total


@triton.jit
def _prototype_norm(norm, row, count_packed, keep, SHAPE: tl.constexpr):
    """Squared norms of prototypes (n,); 0 where not to `keep`."""
    total = tl.zeros(row.shape, tl.float32)
    for place in range(0, SHAPE[2] * SHAPE[3]):
        total += tl.load(norm + place * count_packed + row, mask=keep, other=0.0)
    return total


@triton.jit
def _any(true):
    # By way of a matrix: Triton 3.6 fails to compile the reduction of a vector of winners for sm_100.
    return tl.max(tl.max(true.to(tl.int32)[None, :], 1), 0) > 0


@triton.jit
def _inverse(square):
    """One over the norm."""
    return tl.rsqrt(tl.maximum(square, SMALLEST))


# -- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _multiply(p, x, sums, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter would multiply the bits of a bfloat16 as whole numbers
        p, x = p.to(tl.float32), x.to(tl.float32)
    return tl.dot(p, tl.trans(x), sums, input_precision="ieee")


@triton.jit
def _products(
    held, p, x, row, count_packed, cell, cells_packed, keep,
    MASKED: tl.constexpr, SHAPE: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Products of prototypes (BP,) and windows at cells (BN,); `held` are the prototypes, if they fit one tile."""
    D: tl.constexpr = SHAPE[4]
    STEPS: tl.constexpr = D // BLOCK_D
    PLACES: tl.constexpr = SHAPE[2] * SHAPE[3]
    sums = tl.zeros((row.shape[0], cell.shape[0]), tl.float32)
    for step in range(0, PLACES * STEPS):
        d = step % STEPS * BLOCK_D + tl.arange(0, BLOCK_D)
        place = step // STEPS
        at = cell + _shift(place, SHAPE)
        patch = _rows(x[0], at, d, cells_packed, keep, MASKED, D, DEEP)
        prototype, rest = held
        of_place = place * count_packed * D
        if PLACES * STEPS > 1:
            prototype = _rows(p[0] + of_place, row, d, count_packed, row, False, D, DEEP)
        if SPLIT:  # the product of both rests is below float32's own rounding
            if PLACES * STEPS > 1:
                rest = _rows(p[1] + of_place, row, d, count_packed, row, False, D, DEEP)
            sums = _multiply(prototype, _rows(x[1], at, d, cells_packed, keep, MASKED, D, DEEP), sums, UPCAST)
            sums = _multiply(rest, patch, sums, UPCAST)
        sums = _multiply(prototype, patch, sums, UPCAST)
    return sums


@triton.jit
def _select(
    products, norm, n, best, last,
    METRIC: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """The running winner of every row, score and place (BP,), after the tile of patches n (BN,).

    Of equal patches the first wins: within the tile by the reduction's rule, across tiles because a later one must be
    better. NaN never is. AFTER: only patches behind the winner `last` count.
    """
    if METRIC == "l2":  # the nearest patch has the largest x.p - |x|^2 / 2
        score = products - 0.5 * norm[None, :]
    elif METRIC == "cosine":
        score = products * _inverse(norm)[None, :]
    else:
        score = products
    if MASKED:
        score = tl.where(n[None, :] < N, score, float("-inf"))
    if AFTER:
        top, place = last
        behind = (score < top[:, None]) | ((score == top[:, None]) & (n[None, :] > place[:, None]))
        score = tl.where(behind, score, float("-inf"))
    top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
    better = top > best[0]
    return tl.where(better, top, best[0]), tl.where(better, tl.min(n, 0) + place, best[1])


@triton.jit
def _distance(
    p, x, row, count_packed, cell, cells_packed, SHAPE: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr
):
    """Squared distances (n,) of prototypes to the windows at cells, from the differences."""
    D: tl.constexpr = SHAPE[4]
    total = tl.zeros(row.shape, tl.float32)
    for place in range(0, SHAPE[2] * SHAPE[3]):
        at = cell + _shift(place, SHAPE)
        of_place = place * count_packed * D
        for first in range(0, D, 16):
            d = first + tl.arange(0, 16)
            difference = _rows(x[0], at, d, cells_packed, row, False, D, DEEP).to(tl.float32)
            difference -= _rows(p[0] + of_place, row, d, count_packed, row, False, D, DEEP).to(tl.float32)
            if SPLIT:
                difference += _rows(x[1], at, d, cells_packed, row, False, D, DEEP).to(tl.float32)
                difference -= _rows(p[1] + of_place, row, d, count_packed, row, False, D, DEEP).to(tl.float32)
            total += tl.sum(difference * difference, 1)
    return total


@triton.jit
def _activate(distance, ACTIVATION: tl.constexpr):
    if ACTIVATION == "exp":
        return tl.exp(-tl.sqrt(distance + ROOT_EPSILON))
    # log((d + 1) / (d + e)) as log1p(s), s = (1 - e) / (d + e): the quotient would round large distances to one value.
    small = (1 - EPSILON) / (distance + EPSILON)
    more = 1 + small
    return tl.where(more == 1, small, tl.log(more) * (small / (more - 1)))


@triton.jit
def _write(
    best, p, x, row, count, count_packed, cells_packed, value, index, activated,
    METRIC: tl.constexpr, ACTIVATION: tl.constexpr, SHAPE: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """What is said of the winners (BP,) to `value`, `index`, `activated` (P,)."""
    score, n = best
    p2 = _prototype_norm(p[2], row, count_packed, row >= 0, SHAPE)
    cells = tl.arange(0, triton.next_power_of_2(SHAPE[0]))
    x2 = tl.load(x[2] + cells, mask=cells < SHAPE[0], other=0.0)
    broken = (p2 != p2) | _any(x2 != x2)
    if METRIC == "l2":
        result = tl.maximum(p2 - 2 * score, 0.0)
        close = result < CLOSE * p2
        if _any(close):
            exact = _distance(p, x, row, count_packed, _cell(n, SHAPE), cells_packed, SHAPE, SPLIT, DEEP)
            result = tl.where(close, exact, result)
    elif METRIC == "cosine":
        result = score * _inverse(p2)
    else:
        result = score
    result = tl.where(broken, float("nan"), result)
    keep = row < count
    tl.store(value + row, result, mask=keep)
    tl.store(index + row, tl.where(broken, 0, n).to(tl.int64), mask=keep)
    if ACTIVATION != "":
        tl.store(activated + row, _activate(result, ACTIVATION), mask=keep)


@triton.jit
def _tile(
    first, held, p, x, row, count_packed, cells_packed, best, second, last, last_second,
    METRIC: tl.constexpr, SECOND: tl.constexpr, AFTER: tl.constexpr, MASKED: tl.constexpr, SHAPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The running winners, by one metric or two, after the BLOCK_N windows from `first`."""
    N: tl.constexpr = (SHAPE[0] // SHAPE[1] - SHAPE[2] + 1) * (SHAPE[1] - SHAPE[3] + 1)
    n = first + tl.arange(0, BLOCK_N)
    cell = _cell(n, SHAPE)
    keep = n < N
    sums = _products(
        held, p, x, row, count_packed, cell, cells_packed, keep, MASKED, SHAPE, BLOCK_D, SPLIT, DEEP, UPCAST
    )
    norm = _patch_norm(x[2], cell, keep, SHAPE)
    best = _select(sums, norm, n, best, last, METRIC, N, MASKED, AFTER)
    if SECOND != "":
        second = _select(sums, norm, n, second, last_second, SECOND, N, MASKED, AFTER)
    return best, second


@triton.jit(do_not_specialize=["count", "blocks"])
def forward(
    x, x_low, x_norm, p, p_low, p_norm, value, index, activated, count, count_packed, cells_packed, blocks,
    METRIC: tl.constexpr, SECOND: tl.constexpr, RANKS: tl.constexpr, ACTIVATION: tl.constexpr, SHAPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One image and BLOCK_P prototypes: the winners, by one metric or two, of RANKS ranks each.

    Every rank is a pass over the products of its own, which takes what is behind the rank before.
    """
    D: tl.constexpr = SHAPE[4]
    N: tl.constexpr = (SHAPE[0] // SHAPE[1] - SHAPE[2] + 1) * (SHAPE[1] - SHAPE[3] + 1)
    FULL: tl.constexpr = N // BLOCK_N * BLOCK_N
    TAIL: tl.constexpr = triton.next_power_of_2(max(N - FULL, 16))
    SLOTS: tl.constexpr = RANKS if SECOND == "" else 2 * RANKS

    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    x += image * cells_packed * D
    x_low += image * cells_packed * D
    patches = (x, x_low, x_norm + image * cells_packed)
    prototypes = (p, p_low, p_norm)
    value += image * SLOTS * count
    index += image * SLOTS * count
    activated += image * SLOTS * count

    held = (row, row)
    if D == BLOCK_D and SHAPE[2] * SHAPE[3] == 1:
        d = tl.arange(0, BLOCK_D)
        high = _rows(p, row, d, count_packed, row, False, D, DEEP)
        held = (high, _rows(p_low, row, d, count_packed, row, False, D, DEEP) if SPLIT else high)
    nothing = (tl.full((BLOCK_P,), float("-inf"), tl.float32), tl.zeros((BLOCK_P,), tl.int32))
    last = (tl.full((BLOCK_P,), float("inf"), tl.float32), tl.zeros((BLOCK_P,), tl.int32))
    last_second = last
    for rank in range(0, RANKS):
        best = nothing
        second = nothing
        for first in range(0, FULL, BLOCK_N):
            best, second = _tile(
                first, held, prototypes, patches, row, count_packed, cells_packed, best, second, last, last_second,
                METRIC, SECOND, RANKS > 1, False, SHAPE, BLOCK_N, BLOCK_D, SPLIT, DEEP, UPCAST,
            )  # fmt: skip
        if FULL < N:
            best, second = _tile(
                FULL, held, prototypes, patches, row, count_packed, cells_packed, best, second, last, last_second,
                METRIC, SECOND, RANKS > 1, True, SHAPE, TAIL, BLOCK_D, SPLIT, DEEP, UPCAST,
            )  # fmt: skip
        to = rank * count
        _write(
            best, prototypes, patches, row, count, count_packed, cells_packed, value + to, index + to, activated + to,
            METRIC, ACTIVATION, SHAPE, SPLIT, DEEP,
        )  # fmt: skip
        if SECOND != "":
            to = (RANKS + rank) * count
            _write(
                second, prototypes, patches, row, count, count_packed, cells_packed, value + to, index + to,
                activated + to, SECOND, ACTIVATION, SHAPE, SPLIT, DEEP,
            )  # fmt: skip
        last = best
        last_second = second


# -- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _slope(distance, ACTIVATION: tl.constexpr):
    """The derivative of `_activate`."""
    if ACTIVATION == "exp":
        root = tl.sqrt(distance + ROOT_EPSILON)
        return tl.exp(-root) / (-2 * root)
    return (EPSILON - 1) / ((distance + 1) * (distance + EPSILON))


@triton.jit(do_not_specialize=["slots", "slot", "count", "count_packed", "blocks"])
def weigh(
    grad, grad_activated, value, index, x_norm, p_norm, weight, patch_share, prototype_share, cells,
    slots, slot, count, count_packed, blocks,
    METRIC: tl.constexpr, RANKS: tl.constexpr, ACTIVATION: tl.constexpr, SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How each pair pulls: with w (p - s x) on its patch x and with w (x - t p) on its prototype p.

    Writes w, s, t and the winner's first cell for the RANKS selections from `slot`, those of one metric.
    """
    line = tl.program_id(0) // blocks
    image = (line // RANKS).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = row < count
    at = (image * slots + slot + line % RANKS) * count + row
    g = tl.load(grad + at, mask=keep, other=0.0)
    cell = _cell(tl.load(index + at, mask=keep, other=0).to(tl.int32), SHAPE)
    if METRIC == "l2":  # of |x - p|^2
        if ACTIVATION != "":
            slope = _slope(tl.load(value + at, mask=keep, other=0.0), ACTIVATION)
            g += slope * tl.load(grad_activated + at, mask=keep, other=0.0)
        w = -2 * g
        s = tl.full((BLOCK,), 1.0, tl.float32)
        t = s
    elif METRIC == "cosine":  # of c = x.p / (|x| |p|); a norm below the smallest is a constant
        x2 = _patch_norm(x_norm + image * SHAPE[0], cell, keep, SHAPE)
        p2 = _prototype_norm(p_norm, row, count_packed, keep, SHAPE)
        c = tl.load(value + at, mask=keep, other=0.0)
        w = g * _inverse(x2) * _inverse(p2)
        ratio = _inverse(x2) * tl.sqrt(tl.maximum(p2, SMALLEST))
        s = tl.where(x2 > SMALLEST, c * ratio, 0.0)
        t = tl.where(p2 > SMALLEST, c / ratio, 0.0)
    else:
        w = g
        s = tl.zeros((BLOCK,), tl.float32)
        t = s
    tl.store(weight + at, w, mask=keep)
    tl.store(patch_share + at, s, mask=keep)
    tl.store(prototype_share + at, t, mask=keep)
    tl.store(cells + at, cell.to(cells.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["images", "slots", "count", "count_packed"])
def prototype_gradient(
    x, p, weight, share, cells, gradient, images, slots, count, count_packed, channels,
    SHAPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One prototype, one place of its window, BLOCK_D channels: the sum over its pairs, in their order."""
    D: tl.constexpr = SHAPE[4]
    PLACES: tl.constexpr = SHAPE[2] * SHAPE[3]
    row = tl.program_id(0) // (PLACES * (D // BLOCK_D))
    place = tl.program_id(0) // (D // BLOCK_D) % PLACES
    d = tl.program_id(0) % (D // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = tl.load(p + (place * count_packed + row) * D + d).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, images * slots, BLOCK_B):
        pair = first + tl.arange(0, BLOCK_B)
        keep = pair < images * slots
        at = pair.to(tl.int64) * count + row
        w = tl.load(weight + at, mask=keep, other=0.0)
        t = tl.load(share + at, mask=keep, other=0.0)
        cell = tl.load(cells + at, mask=keep, other=0).to(tl.int64) + _shift(place, SHAPE)
        patch = _rows(x, pair // slots * SHAPE[0] + cell, d, 0, keep, True, D, False).to(tl.float32)
        # From the difference: exactly 0 where a prototype is its patch, whatever the weight.
        total += tl.sum(w[:, None] * (patch - t[:, None] * own[None, :]), 0)
    to = (row.to(tl.int64) * channels + d) * PLACES + place
    tl.store(gradient + to, total.to(gradient.dtype.element_ty), mask=d < channels)


@triton.jit(do_not_specialize=["pairs", "count", "count_packed"])
def patch_gradient(
    x, p, weight, share, order, starts, gradient, image_stride, channel_stride, cell_stride,
    pairs, count, count_packed, channels,
    SHAPE: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GROUP cells of one image, BLOCK_D channels: for each cell the sum over the pairs that won there, in their order.

    `order` has the image's pairs sorted by the first cell of their window; those of cell n are from starts[n] to
    starts[n + 1]. A group is written at once: cells lie side by side, and memory is written 32 bytes at a time.
    """
    CELLS: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[4]
    GROUPS: tl.constexpr = (CELLS + GROUP - 1) // GROUP
    image = (tl.program_id(0) // (GROUPS * (D // BLOCK_D))).to(tl.int64)
    n = tl.program_id(0) // (D // BLOCK_D) % GROUPS * GROUP + tl.arange(0, GROUP)
    d = tl.program_id(0) % (D // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight += image * pairs
    share += image * pairs
    order += image * pairs
    starts += image * (CELLS + 1)
    group = tl.zeros((GROUP, BLOCK_D), tl.float32)
    for member in range(0, GROUP):
        cell = tl.program_id(0) // (D // BLOCK_D) % GROUPS * GROUP + member
        own = tl.load(x + (image * CELLS + tl.minimum(cell, CELLS - 1)) * D + d).to(tl.float32)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for place in range(0, SHAPE[2] * SHAPE[3]):
            first = cell - _shift(place, SHAPE)
            there = tl.minimum(tl.maximum(first, 0), CELLS - 1)
            begin = tl.load(starts + there)
            end = tl.where((first >= 0) & (cell < CELLS), tl.load(starts + there + 1), begin)
            for some in range(begin, end, BLOCK_E):
                e = some + tl.arange(0, BLOCK_E)
                keep = e < end
                pair = tl.load(order + e, mask=keep, other=0).to(tl.int32)
                w = tl.load(weight + pair, mask=keep, other=0.0)
                s = tl.load(share + pair, mask=keep, other=0.0)
                prototype = _rows(p, place * count_packed + pair % count, d, 0, keep, True, D, False).to(tl.float32)
                # From the difference, as above.
                total += tl.sum(w[:, None] * (prototype - s[:, None] * own[None, :]), 0)
        group = tl.where(tl.arange(0, GROUP)[:, None] == member, total[None, :], group)
    to = image * image_stride + n[:, None] * cell_stride + d[None, :] * channel_stride
    tl.store(gradient + to, group.to(gradient.dtype.element_ty), mask=(n[:, None] < CELLS) & (d[None, :] < channels))
