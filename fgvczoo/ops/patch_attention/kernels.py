"""The Triton kernels of `patch_attention`; `triton.py` launches them.

SHAPE is (h, Nq, Nk, d, e). Operands (B, h, N, d) have any strides but 1 for the last dimension; a *head* is one of the
B x h matrices. All sizes but B are constants of a compiled kernel.

"patches" is flash attention: no score is stored, the gradient makes them again. A program of the bias's gradient takes
one tile of one head through all images, so that nothing as large as B x h x Nq x Nk exists, and no sum has an order
that varies. "queries" is one pass over the patches: the softmax of a patch needs no other patch, and the
renormalisation is a division in the end. Its *shares*, what each query wins of each patch, (B, h, Nk, Q), Q the queries
padded to a power of two, are next to nothing beside keys and values, and are kept.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import triton
import triton.language as tl

from fgvczoo.ops.patch_attention import reference

EPSILON = tl.constexpr(reference.EPSILON)
LOG2E = tl.constexpr(1.4426950408889634)


# -- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(source, n, d, stride, N: tl.constexpr, D: tl.constexpr):
    """Rows n, columns d of a matrix (N, D); zeros where there is none."""
    return tl.load(source + n[:, None] * stride + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)


@triton.jit
def _store(target, n, d, stride, value, N: tl.constexpr, D: tl.constexpr):
    at = target + n[:, None] * stride + d[None, :]
    tl.store(at, value.to(target.dtype.element_ty), mask=(n[:, None] < N) & (d[None, :] < D))


@triton.jit
def _multiply(left, right, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter would multiply the bits of a bfloat16 as whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def _head(head, strides, H: tl.constexpr):
    """Where a head begins."""
    return (head // H).to(tl.int64) * strides[0] + head % H * strides[1]


@triton.jit
def _products(
    left, l2, right, r2, n, m,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products of rows n of a matrix (N, D) and rows m of another (M, D), BLOCK_D columns at a time."""
    sums = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        right_rows = _load(right, m, d, r2, M, D)
        sums = _multiply(_load(left, n, d, l2, N, D), tl.trans(right_rows), sums, PRECISION, UPCAST)
    return sums


@triton.jit
def _scores(products, bias, bias_strides, n, m, scale, SHAPE: tl.constexpr, BIAS: tl.constexpr):
    """Scores of queries n and patches m, times log2(e); -inf where there are none."""
    scores = products * (scale * LOG2E)
    inside = (n[:, None] < SHAPE[1]) & (m[None, :] < SHAPE[2])
    if BIAS:
        at = bias + n[:, None] * bias_strides[1] + m[None, :] * bias_strides[2]
        scores += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return tl.where(inside, scores, float("-inf"))


# -- "patches" --------------------------------------------------------------------------------------------------------


@triton.jit
def attend(
    query, q0, q1, q2, key, k0, k1, k2, value, v0, v1, v2, bias, b0, b1, b2, output, o0, o1, o2, totals, scale,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head: their outputs, and in `totals` the binary logarithm of the sum of exponentials."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[1], BLOCK_Q)
    head = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key += _head(head, (k0, k1), H)
    value += _head(head, (v0, v1), H)
    bias += head % H * b0
    q = _load(query + _head(head, (q0, q1), H), n, d, q2, SHAPE[1], SHAPE[3])
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        k = _load(key, m, d, k2, SHAPE[2], SHAPE[3])
        products = _multiply(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION, UPCAST)
        scores = _scores(products, bias, (b0, b1, b2), n, m, scale, SHAPE, BIAS)
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        top = higher
        total = total * shrink + tl.sum(shares, 1)
        v = _load(value, m, e, v2, SHAPE[2], SHAPE[4])
        sums = _multiply(shares.to(v.dtype), v, sums * shrink[:, None], PRECISION, UPCAST)
    nothing = total == 0  # all scores were -inf; an infinite total makes all shares 0 once more
    result = sums / tl.where(nothing, 1.0, total)[:, None]
    _store(output + _head(head, (o0, o1), H), n, e, o2, result, SHAPE[1], SHAPE[4])
    tl.store(totals + head * SHAPE[1] + n, tl.where(nothing, float("inf"), top + tl.log2(total)), mask=n < SHAPE[1])


@triton.jit
def deltas(
    grad, g0, g1, g2, output, o0, o1, o2, delta,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Products of every output with its gradient: what the weights' slopes of a query sum to."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[1], BLOCK_Q)
    head = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    grad += _head(head, (g0, g1), H)
    output += _head(head, (o0, o1), H)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for first in range(0, SHAPE[4], BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        left = _load(grad, n, e, g2, SHAPE[1], SHAPE[4]).to(tl.float32)
        right = _load(output, n, e, o2, SHAPE[1], SHAPE[4]).to(tl.float32)
        total += tl.sum(left * right, 1)
    tl.store(delta + head * SHAPE[1] + n, total, mask=n < SHAPE[1])


@triton.jit
def _slopes(products, slopes, bias, bias_strides, total, delta, n, m, scale, SHAPE: tl.constexpr, BIAS: tl.constexpr):
    """Weights of queries n and patches m, made again, and the slopes of their scores from those of the weights."""
    weights = tl.exp2(_scores(products, bias, bias_strides, n, m, scale, SHAPE, BIAS) - total[:, None])
    return weights, weights * (slopes - delta[:, None])


@triton.jit
def _of_queries(totals, delta, head, n, NQ: tl.constexpr):
    at = head * NQ + n
    return tl.load(totals + at, mask=n < NQ, other=float("inf")), tl.load(delta + at, mask=n < NQ, other=0.0)


@triton.jit
def query_gradient(
    query, q0, q1, q2, key, k0, k1, k2, value, v0, v1, v2, bias, b0, b1, b2, grad, g0, g1, g2, totals, delta,
    gradient, d0, d1, d2, scale,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head, through all its patches."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[1], BLOCK_Q)
    head = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    key += _head(head, (k0, k1), H)
    value += _head(head, (v0, v1), H)
    bias += head % H * b0
    q = _load(query + _head(head, (q0, q1), H), n, d, q2, SHAPE[1], SHAPE[3])
    g = _load(grad + _head(head, (g0, g1), H), n, e, g2, SHAPE[1], SHAPE[4])
    total, row = _of_queries(totals, delta, head, n, SHAPE[1])
    sums = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        k = _load(key, m, d, k2, SHAPE[2], SHAPE[3])
        v = _load(value, m, e, v2, SHAPE[2], SHAPE[4])
        nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        products = _multiply(q, tl.trans(k), nothing, PRECISION, UPCAST)
        slopes = _multiply(g, tl.trans(v), nothing, PRECISION, UPCAST)
        _, slopes = _slopes(products, slopes, bias, (b0, b1, b2), total, row, n, m, scale, SHAPE, BIAS)
        sums = _multiply(slopes.to(k.dtype), k, sums, PRECISION, UPCAST)
    _store(gradient + _head(head, (d0, d1), H), n, d, d2, sums * scale, SHAPE[1], SHAPE[3])


@triton.jit
def patch_gradient(
    query, q0, q1, q2, key, k0, k1, k2, value, v0, v1, v2, bias, b0, b1, b2, grad, g0, g1, g2, totals, delta,
    key_gradient, d0, d1, d2, value_gradient, e0, e1, e2, scale,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys and values of BLOCK_K patches of one head, through all its queries."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[2], BLOCK_K)
    head = tl.program_id(0) // BLOCKS
    m = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    query += _head(head, (q0, q1), H)
    grad += _head(head, (g0, g1), H)
    bias += head % H * b0
    k = _load(key + _head(head, (k0, k1), H), m, d, k2, SHAPE[2], SHAPE[3])
    v = _load(value + _head(head, (v0, v1), H), m, e, v2, SHAPE[2], SHAPE[4])
    of_key = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    of_value = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for first in range(0, SHAPE[1], BLOCK_Q):
        n = first + tl.arange(0, BLOCK_Q)
        q = _load(query, n, d, q2, SHAPE[1], SHAPE[3])
        g = _load(grad, n, e, g2, SHAPE[1], SHAPE[4])
        total, row = _of_queries(totals, delta, head, n, SHAPE[1])
        nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        products = _multiply(q, tl.trans(k), nothing, PRECISION, UPCAST)
        slopes = _multiply(g, tl.trans(v), nothing, PRECISION, UPCAST)
        weights, slopes = _slopes(products, slopes, bias, (b0, b1, b2), total, row, n, m, scale, SHAPE, BIAS)
        of_value = _multiply(tl.trans(weights.to(g.dtype)), g, of_value, PRECISION, UPCAST)
        of_key = _multiply(tl.trans(slopes.to(q.dtype)), q, of_key, PRECISION, UPCAST)
    _store(key_gradient + _head(head, (d0, d1), H), m, d, d2, of_key * scale, SHAPE[2], SHAPE[3])
    _store(value_gradient + _head(head, (e0, e1), H), m, e, e2, of_value, SHAPE[2], SHAPE[4])


@triton.jit(do_not_specialize=["images", "each"])
def bias_gradient(
    query, q0, q1, q2, key, k0, k1, k2, value, v0, v1, v2, bias, b0, b1, b2, grad, g0, g1, g2, totals, delta,
    gradient, scale, images, each,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of one head, through the `each` images of a part: (parts, h, Nq, Nk)."""
    H: tl.constexpr = SHAPE[0]
    ROWS: tl.constexpr = triton.cdiv(SHAPE[1], BLOCK_Q)
    COLUMNS: tl.constexpr = triton.cdiv(SHAPE[2], BLOCK_K)
    tile = tl.program_id(0) % (ROWS * COLUMNS)
    h = tl.program_id(0) // (ROWS * COLUMNS) % H
    part = tl.program_id(0) // (ROWS * COLUMNS * H)
    n = tile // COLUMNS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m = tile % COLUMNS * BLOCK_K + tl.arange(0, BLOCK_K)
    bias += h * b0
    sums = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for image in range(part * each, tl.minimum(images, (part + 1) * each)):
        head = image * H + h
        products = _products(
            query + _head(head, (q0, q1), H), q2, key + _head(head, (k0, k1), H), k2, n, m,
            SHAPE[1], SHAPE[2], SHAPE[3], BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        slopes = _products(
            grad + _head(head, (g0, g1), H), g2, value + _head(head, (v0, v1), H), v2, n, m,
            SHAPE[1], SHAPE[2], SHAPE[4], BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        total, row = _of_queries(totals, delta, head, n, SHAPE[1])
        _, slopes = _slopes(products, slopes, bias, (b0, b1, b2), total, row, n, m, scale, SHAPE, True)
        sums += slopes
    _store(gradient + (part * H + h).to(tl.int64) * SHAPE[1] * SHAPE[2], n, m, SHAPE[2], sums, SHAPE[1], SHAPE[2])


# -- "queries" --------------------------------------------------------------------------------------------------------


@triton.jit
def compete(
    query, q0, q1, q2, key, k0, k1, k2, bias, b0, b1, b2, shares, scale,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The shares of all BLOCK_Q queries in BLOCK_K patches of one head."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[2], BLOCK_K)
    head = tl.program_id(0) // BLOCKS
    m = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_Q)
    query += _head(head, (q0, q1), H)
    key += _head(head, (k0, k1), H)
    scores = _products(key, k2, query, q2, m, n, SHAPE[2], SHAPE[1], SHAPE[3], BLOCK_D, PRECISION, UPCAST)
    scores *= scale * LOG2E
    if BIAS:
        at = bias + head % H * b0 + n[None, :] * b1 + m[:, None] * b2
        scores += tl.load(at, mask=(n[None, :] < SHAPE[1]) & (m[:, None] < SHAPE[2]), other=0.0).to(tl.float32) * LOG2E
    scores = tl.where(n[None, :] < SHAPE[1], scores, float("-inf"))
    top = tl.max(scores, 1)
    won = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(won, 1)
    won = won / tl.where(total == 0, 1.0, total)[:, None]
    _store(shares + head.to(tl.int64) * SHAPE[2] * BLOCK_Q, m, n, BLOCK_Q, won, SHAPE[2], BLOCK_Q)


@triton.jit
def gather(
    shares, rows, r0, r1, r2, output, o0, o1, o2, totals, scale,
    SHAPE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    RENORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums over the patches of one head of (Nk, COLUMNS) rows, weighted: BLOCK_E columns for all queries.

    RENORMALIZE: the weights are the shares + EPSILON over their sum, which goes to `totals`. Else `shares` times scale.
    """
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(COLUMNS, BLOCK_E)
    head = tl.program_id(0) // BLOCKS
    e = tl.program_id(0) % BLOCKS * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_Q)
    shares += head.to(tl.int64) * SHAPE[2] * BLOCK_Q
    rows += _head(head, (r0, r1), H)
    sums = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    total = tl.full((BLOCK_Q,), SHAPE[2] * EPSILON, tl.float32)
    of_all = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        won = _load(shares, m, n, BLOCK_Q, SHAPE[2], BLOCK_Q)
        row = _load(rows, m, e, r2, SHAPE[2], COLUMNS)
        sums = _multiply(tl.trans(won), row, sums, PRECISION, UPCAST)
        if RENORMALIZE:
            total += tl.sum(won.to(tl.float32), 0)
            of_all += tl.sum(row.to(tl.float32), 0)
    if RENORMALIZE:
        sums = (sums + EPSILON * of_all[None, :]) / total[:, None]
        if tl.program_id(0) % BLOCKS == 0:
            tl.store(totals + head * SHAPE[1] + n, total, mask=n < SHAPE[1])
    else:
        sums *= scale
    _store(output + _head(head, (o0, o1), H), n, e, o2, sums, SHAPE[1], COLUMNS)


@triton.jit
def compete_gradient(
    query, q0, q1, q2, value, v0, v1, v2, grad, g0, g1, g2, shares, totals, delta, slopes,
    key_gradient, d0, d1, d2, value_gradient, e0, e1, e2, scale,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys and values of BLOCK_K patches of one head, and the `slopes` of their scores (B, h, Nk, Q)."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[2], BLOCK_K)
    head = tl.program_id(0) // BLOCKS
    m = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_Q)
    query += _head(head, (q0, q1), H)
    value += _head(head, (v0, v1), H)
    grad += _head(head, (g0, g1), H)
    slope = _products(value, v2, grad, g2, m, n, SHAPE[2], SHAPE[1], SHAPE[4], BLOCK_D, PRECISION, UPCAST)
    at = head.to(tl.int64) * SHAPE[2] * BLOCK_Q
    won = _load(shares + at, m, n, BLOCK_Q, SHAPE[2], BLOCK_Q).to(tl.float32)
    inverse = 1 / tl.load(totals + head * SHAPE[1] + n, mask=n < SHAPE[1], other=float("inf"))
    row = tl.load(delta + head * SHAPE[1] + n, mask=n < SHAPE[1], other=0.0)
    slope = won * (slope - row[None, :]) * inverse[None, :]
    slope = (slope - won * tl.sum(slope, 1)[:, None]).to(slopes.dtype.element_ty)
    _store(slopes + at, m, n, BLOCK_Q, slope, SHAPE[2], BLOCK_Q)
    weights = ((won + EPSILON) * inverse[None, :]).to(grad.dtype.element_ty)
    key_gradient += _head(head, (d0, d1), H)
    value_gradient += _head(head, (e0, e1), H)
    nothing = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(0, SHAPE[4], BLOCK_D):
        e = first + tl.arange(0, BLOCK_D)
        g = _load(grad, n, e, g2, SHAPE[1], SHAPE[4])
        _store(value_gradient, m, e, e2, _multiply(weights, g, nothing, PRECISION, UPCAST), SHAPE[2], SHAPE[4])
    for first in range(0, SHAPE[3], BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q = _load(query, n, d, q2, SHAPE[1], SHAPE[3])
        of_key = _multiply(slope.to(q.dtype), q, nothing, PRECISION, UPCAST)
        _store(key_gradient, m, d, d2, of_key * scale, SHAPE[2], SHAPE[3])
