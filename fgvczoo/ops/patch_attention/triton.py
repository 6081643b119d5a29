"""`patch_attention` on an NVIDIA GPU: chooses blocks, launches the kernels of `kernels.py`.

Nothing here waits for the GPU or asks what a tensor holds, so that a CUDA graph can capture it; every sum has a fixed
order. Arguments as of the operators in `__init__.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.ops.patch_attention import kernels, layout

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 turns it off unless asked

# Bytes of slopes that are stored at once: the images take turns.
SLOPES = 2**27
# No block has more queries or patches, but for competing queries, which are all in one.
TILE = 128

Shape = tuple[int, int, int, int, int]  # heads, queries, patches, numbers of a query and of a value


class Blocks(NamedTuple):
    """Queries and patches of a tile, and numbers of their vectors, that are multiplied at once; warps and load stages
    of the program that does so."""

    queries: int
    patches: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, shares and totals, as `layout.results` says."""
    query, key, value = (with_rows(tensor) for tensor in (query, key, value))
    output, shares, totals = layout.results(query, key, value, normalize, train)
    if output.numel() == 0:
        return output, shares, totals
    shape = sizes(query, key, value)
    added, margins = addend(bias, query)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        if normalize == "patches":
            block = choose("attend", query.dtype, shape)
            kernels.attend[(heads(query) * triton.cdiv(shape[1], block.queries),)](
                query, *steps(query), key, *steps(key), value, *steps(value), added, output, *steps(output),
                totals, scale,
                **constants(block, query), SHAPE=shape, BLOCK_D=padded(shape[3]), BLOCK_E=padded(shape[4]),
                BIAS=margins,
            )  # fmt: skip
            return output, shares, totals
        won = shares if train else layout.shares(query, key)
        block = choose("compete", query.dtype, shape)
        kernels.compete[(heads(query) * triton.cdiv(shape[2], block.patches),)](
            query, *steps(query), key, *steps(key), added, won, scale,
            **constants(block, query), SHAPE=shape, BLOCK_D=min(block.depth, padded(shape[3])), BIAS=margins,
        )  # fmt: skip
        weights, width = torch.empty_like(won), min(32, won.shape[3])
        kernels.renormalize[(heads(query) * won.shape[3] // width,)](
            won, weights, totals, SHAPE=shape, PITCH=won.shape[3], BLOCK_Q=width, BLOCK_K=64, num_warps=4, **OPTIONS
        )
        multiply(weights, value, 1.0, output)
    return output, shares, totals


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    shares: Tensor,
    totals: Tensor,
    scale: float,
    normalize: str,
    of_bias: bool,
) -> layout.Gradients:
    found = layout.gradients(query, key, value, bias, of_bias)
    if output.numel() == 0:
        for gradient in found:
            gradient.zero_()
        return found
    query, key, value, grad = (with_rows(tensor) for tensor in (query, key, value, grad))
    shape = sizes(query, key, value)
    delta = query.new_empty(totals.shape, dtype=torch.float32)
    added, margins = addend(bias if normalize == "patches" else None, query)
    slopes = layout.slopes(query, key, normalize, SLOPES)
    of_bias_32 = found[3] if found[3].dtype == torch.float32 else torch.empty_like(found[3], dtype=torch.float32)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        rows = 32 if shape[4] <= 128 else 8
        kernels.deltas[(heads(query) * triton.cdiv(shape[1], rows),)](
            grad, *steps(grad), output, *steps(output), delta,
            SHAPE=shape, BLOCK_Q=rows, BLOCK_E=min(128, padded(shape[4])), num_warps=4, **OPTIONS,
        )  # fmt: skip
        for first in range(0, len(query), len(slopes)):
            part = slice(first, first + len(slopes))
            q, k, v, g, of_query, of_key, of_value = (t[part] for t in (query, key, value, grad, *found[:3]))
            slope = slopes[: len(q)]
            fixed = {"SHAPE": shape, "PITCH": slope.shape[3]}
            given = (q, *steps(q), v, *steps(v), g, *steps(g))
            results = (slope, of_key, *steps(of_key), of_value, *steps(of_value), scale)
            if normalize == "patches":
                block = choose("patch_gradient", query.dtype, shape)
                kernels.patch_gradient[(heads(q) * triton.cdiv(shape[2], block.patches),)](
                    k, *steps(k), *given, added, totals[part], delta[part], *results,
                    **constants(block, query), **fixed, BLOCK_D=padded(shape[3]), BLOCK_E=padded(shape[4]),
                    BIAS=margins,
                )  # fmt: skip
                block = choose("query_gradient", query.dtype, shape)
                kernels.query_gradient[(heads(q) * triton.cdiv(shape[1], block.queries),)](
                    slope, k, *steps(k), of_query, *steps(of_query), scale,
                    **constants(block, query), **fixed, BLOCK_D=padded(shape[3]),
                )  # fmt: skip
            else:
                block = choose("compete_gradient", query.dtype, shape)
                kernels.compete_gradient[(heads(q) * triton.cdiv(shape[2], block.patches),)](
                    *given, shares[part], totals[part], delta[part], *results,
                    **constants(block, query), SHAPE=shape, BLOCK_D=min(block.depth, padded(max(shape[3:]))),
                )  # fmt: skip
                multiply(slope, k, scale, of_query)
            if of_bias:
                tiles = shape[0] * triton.cdiv(shape[1], 64) * triton.cdiv(shape[2], 16)
                kernels.bias_gradient[(tiles,)](
                    slope, of_bias_32, len(q), **fixed, BLOCK_Q=64, BLOCK_K=16, ADD=first > 0,
                    num_warps=4, num_stages=4, **OPTIONS,
                )  # fmt: skip
    if of_bias and of_bias_32 is not found[3]:
        found[3].copy_(of_bias_32)
    return found


def multiply(weights: Tensor, rows: Tensor, scale: float, output: Tensor) -> None:
    """Weighted sums over the patches of rows (B, h, Nk, e), times scale, into (B, h, Nq, e); weights as shares are."""
    sums = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
    flat = sums.flatten(0, 1)
    left = weights[..., : output.shape[2]].mT.flatten(0, 1)
    torch.baddbmm(flat, left, rows.flatten(0, 1), beta=0, alpha=scale, out=flat)
    if sums is not output:
        output.copy_(sums)


def addend(bias: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The bias (h, Nq, Nk) as float32 with margins of -inf, and its sizes with these; anything and (0, 0) where there
    is none."""
    if bias is None:
        return query, (0, 0)
    rows, columns = (triton.cdiv(size, TILE) * TILE for size in bias.shape[1:])
    margins = (0, columns - bias.shape[2], 0, rows - bias.shape[1])
    return F.pad(bias.float(), margins, value=float("-inf")).contiguous(), (rows, columns)


def choose(kernel: str, dtype: torch.dtype, shape: Shape) -> Blocks:
    """The blocks of a kernel for these operands: of those that spill no registers, with eight warps or more on a
    multiprocessor."""
    exact, half = precision(dtype) == "tf32x3", dtype != torch.float32
    deep = max(shape[3:]) > 64
    if kernel.startswith("compete"):
        queries = padded(shape[1])
        if exact:
            return Blocks(queries, 16, 32, 8, 2, 224 if kernel == "compete" else None)
        if not half and kernel == "compete_gradient":
            return Blocks(queries, 32, 64, 4 if queries <= 128 else 8, 2)
        return Blocks(queries, 64, 64, 4 if queries <= 128 else 8, 3 if half else 2)
    if kernel == "query_gradient":
        return Blocks(32, 32, 64, 4, 2) if exact else Blocks(128, 64 if half else 32, 64, 4, 2)
    if exact:
        if kernel == "patch_gradient":
            return Blocks(16, 16, 32, 4, 1)
        return Blocks(16, 16, 32, 8, 1) if deep else Blocks(16, 32, 32, 4, 1, 224)
    if kernel == "attend":
        return Blocks(64, 32, 64, 4, 2 if deep else 3) if half else Blocks(32, 64, 64, 8 if deep else 4, 2)
    if half:
        return Blocks(32, 64, 64, 8, 2) if deep else Blocks(32, 64, 64, 4, 1)
    return Blocks(32, 32, 64, 8, 2) if deep else Blocks(16, 64, 64, 4, 2)


def constants(block: Blocks, query: Tensor) -> dict[str, Any]:
    return {
        "BLOCK_Q": block.queries,
        "BLOCK_K": block.patches,
        "PRECISION": precision(query.dtype),
        "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": block.warps,
        "num_stages": block.stages,
        "maxnreg": block.registers,
        **OPTIONS,
    }


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied, by `torch.set_float32_matmul_precision`: "highest" in three tf32 products, which come
    near float32's own; else in one. Nothing for half types."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # torch's newer setting contradicts this one: it alone allows tf32
        return "tf32"


def sizes(query: Tensor, key: Tensor, value: Tensor) -> Shape:
    return query.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3]


def heads(query: Tensor) -> int:
    return query.shape[0] * query.shape[1]


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def steps(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)
