"""The Triton kernels of `patch_attention`; `triton.py` launches them.

SHAPE is (h, Nq, Nk, d, e). Operands (B, h, N, d) have any strides but 1 for the last dimension; a *head* is one of the
B x h matrices. All sizes but B are constants of a compiled kernel. The bias comes as `triton.addend` makes it, (h,
*BIAS): so large that no tile leaves it, -inf where there is no query or patch; BIAS is (0, 0) where there is none.

"patches" is flash attention: no score is stored, the gradient makes them again. "queries" is one pass over the patches:
the softmax of a patch needs no other patch, and the renormalisation is a division in the end. Its *shares*, what each
query wins of each patch, are next to nothing beside keys and values, and are kept.

*Slopes*, gradients of the scores, and shares are (B, h, Nk, pitch), a patch's queries side by side. Slopes are stored,
once, for a part of the images at a time: the gradients of queries and bias are sums over them whose order never varies.
For competing queries cuBLAS takes these products: nothing is left to fuse there.
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


# -- "patches" --------------------------------------------------------------------------------------------------------


@triton.jit
def attend(
    query, q0, q1, q2, key, k0, k1, k2, value, v0, v1, v2, bias, output, o0, o1, o2, totals, scale,
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
    bias += head % H * (BIAS[0] * BIAS[1])
    q = _load(query + _head(head, (q0, q1), H), n, d, q2, SHAPE[1], SHAPE[3])
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        k = _load(key, m, d, k2, SHAPE[2], SHAPE[3])
        products = _multiply(q, tl.trans(k), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION, UPCAST)
        scores = products * (scale * LOG2E)
        if BIAS[1]:
            scores += tl.load(bias + n[:, None] * BIAS[1] + m[None, :]) * LOG2E
        else:
            scores = tl.where(m[None, :] < SHAPE[2], scores, float("-inf"))
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
def patch_gradient(
    key, k0, k1, k2, query, q0, q1, q2, value, v0, v1, v2, grad, g0, g1, g2, bias, totals, delta, slopes,
    key_gradient, d0, d1, d2, value_gradient, e0, e1, e2, scale,
    SHAPE: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys and values of BLOCK_K patches of one head, and the slopes of their scores, through all queries."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[2], BLOCK_K)
    head = tl.program_id(0) // BLOCKS
    m = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    query += _head(head, (q0, q1), H)
    grad += _head(head, (g0, g1), H)
    bias += head % H * (BIAS[0] * BIAS[1])
    slopes += head.to(tl.int64) * SHAPE[2] * PITCH
    k = _load(key + _head(head, (k0, k1), H), m, d, k2, SHAPE[2], SHAPE[3])
    v = _load(value + _head(head, (v0, v1), H), m, e, v2, SHAPE[2], SHAPE[4])
    of_key = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    of_value = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for first in range(0, SHAPE[1], BLOCK_Q):
        n = first + tl.arange(0, BLOCK_Q)
        q = _load(query, n, d, q2, SHAPE[1], SHAPE[3])
        g = _load(grad, n, e, g2, SHAPE[1], SHAPE[4])
        at = head * SHAPE[1] + n
        total = tl.load(totals + at, mask=n < SHAPE[1], other=float("inf"))  # beyond the last query all weights are 0
        row = tl.load(delta + at, mask=n < SHAPE[1], other=0.0)
        nothing = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        scores = _multiply(k, tl.trans(q), nothing, PRECISION, UPCAST) * (scale * LOG2E)
        if BIAS[1]:
            scores += tl.load(bias + n[None, :] * BIAS[1] + m[:, None]) * LOG2E
        weights = tl.exp2(scores - total[None, :])
        slope = _multiply(v, tl.trans(g), nothing, PRECISION, UPCAST)
        slope = (weights * (slope - row[None, :])).to(q.dtype)
        _store(slopes, m, n, PITCH, slope, SHAPE[2], PITCH)
        of_value = _multiply(weights.to(g.dtype), g, of_value, PRECISION, UPCAST)
        of_key = _multiply(slope, q, of_key, PRECISION, UPCAST)
    _store(key_gradient + _head(head, (d0, d1), H), m, d, d2, of_key * scale, SHAPE[2], SHAPE[3])
    _store(value_gradient + _head(head, (e0, e1), H), m, e, e2, of_value, SHAPE[2], SHAPE[4])


@triton.jit
def query_gradient(
    slopes, key, k0, k1, k2, gradient, d0, d1, d2, scale,
    SHAPE: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head, through all its patches."""
    H: tl.constexpr = SHAPE[0]
    BLOCKS: tl.constexpr = triton.cdiv(SHAPE[1], BLOCK_Q)
    head = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    slopes += head.to(tl.int64) * SHAPE[2] * PITCH
    key += _head(head, (k0, k1), H)
    sums = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        slope = _load(slopes, m, n, PITCH, SHAPE[2], PITCH)
        k = _load(key, m, d, k2, SHAPE[2], SHAPE[3])
        sums = _multiply(tl.trans(slope), k, sums, PRECISION, UPCAST)
    _store(gradient + _head(head, (d0, d1), H), n, d, d2, sums * scale, SHAPE[1], SHAPE[3])


@triton.jit(do_not_specialize=["images"])
def bias_gradient(
    slopes, gradient, images,
    SHAPE: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One tile of one head, through all images; added to what is there, if ADD."""
    ROWS: tl.constexpr = triton.cdiv(SHAPE[1], BLOCK_Q)
    COLUMNS: tl.constexpr = triton.cdiv(SHAPE[2], BLOCK_K)
    h = tl.program_id(0) // (ROWS * COLUMNS)
    n = tl.program_id(0) // COLUMNS % ROWS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m = tl.program_id(0) % COLUMNS * BLOCK_K + tl.arange(0, BLOCK_K)
    slopes += h.to(tl.int64) * SHAPE[2] * PITCH
    sums = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    for _ in range(images):
        sums += _load(slopes, m, n, PITCH, SHAPE[2], PITCH).to(tl.float32)
        slopes += SHAPE[0] * SHAPE[2] * PITCH
    sums = tl.trans(sums)
    gradient += h * SHAPE[1] * SHAPE[2]
    if ADD:
        sums += _load(gradient, n, m, SHAPE[2], SHAPE[1], SHAPE[2])
    _store(gradient, n, m, SHAPE[2], sums, SHAPE[1], SHAPE[2])


# -- "queries" --------------------------------------------------------------------------------------------------------


@triton.jit
def compete(
    query, q0, q1, q2, key, k0, k1, k2, bias, shares, scale,
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
    if BIAS[1]:
        scores += tl.load(bias + head % H * (BIAS[0] * BIAS[1]) + n[None, :] * BIAS[1] + m[:, None]) * LOG2E
    else:
        scores = tl.where(n[None, :] < SHAPE[1], scores, float("-inf"))
    top = tl.max(scores, 1)
    won = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(won, 1)
    won = won / tl.where(total == 0, 1.0, total)[:, None]
    _store(shares + head.to(tl.int64) * SHAPE[2] * BLOCK_Q, m, n, BLOCK_Q, won, SHAPE[2], BLOCK_Q)


@triton.jit
def renormalize(
    shares, weights, totals,
    SHAPE: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_Q queries of one head: the shares + EPSILON over the sum of these, which goes to `totals`."""
    BLOCKS: tl.constexpr = PITCH // BLOCK_Q
    head = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    at = head.to(tl.int64) * SHAPE[2] * PITCH
    total = tl.full((BLOCK_Q,), SHAPE[2] * EPSILON, tl.float32)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        total += tl.sum(_load(shares + at, m, n, PITCH, SHAPE[2], PITCH).to(tl.float32), 0)
    for first in range(0, SHAPE[2], BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        each = _load(shares + at, m, n, PITCH, SHAPE[2], PITCH).to(tl.float32)
        _store(weights + at, m, n, PITCH, (each + EPSILON) / total[None, :], SHAPE[2], PITCH)
    tl.store(totals + head * SHAPE[1] + n, total, mask=n < SHAPE[1])


@triton.jit
def compete_gradient(
    query, q0, q1, q2, value, v0, v1, v2, grad, g0, g1, g2, shares, totals, delta, slopes,
    key_gradient, d0, d1, d2, value_gradient, e0, e1, e2, scale,
    SHAPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys and values of BLOCK_K patches of one head, and the slopes of their scores."""
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
