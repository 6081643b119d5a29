"""`patch_attention` on an NVIDIA GPU: chooses blocks, launches the kernels of `kernels.py`.

Nothing here waits for the GPU or asks what a tensor holds, so that a CUDA graph can capture it; every sum has a fixed
order. Arguments as of the operators in `__init__.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fgvczoo.ops.patch_attention import kernels, layout

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 turns it off unless asked

# Programs of the bias's gradient, at least: two for each of 132 multiprocessors. Fewer tiles than these take the images
# in parts.
PROGRAMS = 2 * 132


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
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        if normalize == "patches":
            block = choose("attend", query.dtype, shape)
            kernels.attend[(heads(query) * triton.cdiv(shape[1], block.queries),)](
                query, *steps(query), key, *steps(key), value, *steps(value), *with_steps(bias, query),
                output, *steps(output), totals, scale,
                **constants(block, query, shape), BLOCK_D=padded(shape[3]), BLOCK_E=padded(shape[4]),
                BIAS=bias is not None,
            )  # fmt: skip
            return output, shares, totals
        won = shares if train else layout.shares(query, key)
        block = choose("compete", query.dtype, shape)
        options = constants(block, query, shape)
        kernels.compete[(heads(query) * triton.cdiv(shape[2], block.patches),)](
            query, *steps(query), key, *steps(key), *with_steps(bias, query), won, scale,
            **options, BLOCK_D=min(block.depth, padded(shape[3])), BIAS=bias is not None,
        )  # fmt: skip
        width = min(block.depth, padded(shape[4]))
        kernels.gather[(heads(query) * triton.cdiv(shape[4], width),)](
            won, value, *steps(value), output, *steps(output), totals, 1.0,
            **options, COLUMNS=shape[4], BLOCK_E=width, RENORMALIZE=True,
        )  # fmt: skip
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
    of_query, of_key, of_value, _ = found
    query, key, value, grad = (with_rows(tensor) for tensor in (query, key, value, grad))
    shape = sizes(query, key, value)
    delta = query.new_empty(totals.shape, dtype=torch.float32)
    operands = (query, *steps(query), key, *steps(key), value, *steps(value), *with_steps(bias, query))
    given = (grad, *steps(grad))
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        kernels.deltas[(heads(query) * triton.cdiv(shape[1], 32),)](
            *given, output, *steps(output), delta, SHAPE=shape, BLOCK_Q=32, BLOCK_E=min(128, padded(shape[4])),
            num_warps=4, **OPTIONS,
        )  # fmt: skip
        if normalize == "patches":
            widths = {"BLOCK_D": padded(shape[3]), "BLOCK_E": padded(shape[4])}
            block = choose("patch_gradient", query.dtype, shape)
            kernels.patch_gradient[(heads(query) * triton.cdiv(shape[2], block.patches),)](
                *operands, *given, totals, delta, of_key, *steps(of_key), of_value, *steps(of_value), scale,
                **constants(block, query, shape), **widths, BIAS=bias is not None,
            )  # fmt: skip
            block = choose("query_gradient", query.dtype, shape)
            kernels.query_gradient[(heads(query) * triton.cdiv(shape[1], block.queries),)](
                *operands, *given, totals, delta, of_query, *steps(of_query), scale,
                **constants(block, query, shape), **widths, BIAS=bias is not None,
            )  # fmt: skip
            if of_bias:
                block = choose("bias_gradient", query.dtype, shape)
                tiles = shape[0] * triton.cdiv(shape[1], block.queries) * triton.cdiv(shape[2], block.patches)
                each = triton.cdiv(len(query), min(len(query), triton.cdiv(PROGRAMS, tiles)))
                parts = triton.cdiv(len(query), each)
                sums = query.new_empty(parts, *found[3].shape, dtype=torch.float32)
                kernels.bias_gradient[(tiles * parts,)](
                    *operands, *given, totals, delta, sums, scale, len(query), each,
                    **constants(block, query, shape), BLOCK_D=min(block.depth, padded(max(shape[3:]))),
                )  # fmt: skip
                torch.sum(sums, 0, out=found[3]) if found[3].dtype == torch.float32 else found[3].copy_(sums.sum(0))
            return found
        block = choose("compete_gradient", query.dtype, shape)
        slopes = torch.empty_like(shares)
        kernels.compete_gradient[(heads(query) * triton.cdiv(shape[2], block.patches),)](
            query, *steps(query), value, *steps(value), *given, shares, totals, delta, slopes,
            of_key, *steps(of_key), of_value, *steps(of_value), scale,
            **constants(block, query, shape), BLOCK_D=min(block.depth, padded(max(shape[3:]))),
        )  # fmt: skip
        width = min(block.depth, padded(shape[3]))
        kernels.gather[(heads(query) * triton.cdiv(shape[3], width),)](
            slopes, key, *steps(key), of_query, *steps(of_query), totals, scale,
            **constants(choose("compete", query.dtype, shape), query, shape),
            COLUMNS=shape[3], BLOCK_E=width, RENORMALIZE=False,
        )  # fmt: skip
        if of_bias:
            found[3].copy_(slopes[..., : shape[1]].sum(0, dtype=torch.float32).mT)
    return found


def choose(kernel: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> Blocks:
    """The blocks of a kernel for these operands: of those that spill no registers, with eight warps or more on a
    multiprocessor."""
    exact = precision(dtype) == "tf32x3"
    if kernel.startswith("compete"):
        queries = padded(shape[1])
        if exact:
            return Blocks(queries, 16, 32, 8, 2, 224 if kernel == "compete" else None)
        half = dtype != torch.float32
        return Blocks(queries, 64 if queries <= 64 else 32, 64, 4 if queries <= (128 if half else 64) else 8, 2)
    deep = max(shape[3:]) > 64
    if exact:
        return Blocks(16, 16, 32, 8, 1) if deep else Blocks(16, 32, 32, 4, 1, 224)
    if kernel == "patch_gradient" and dtype != torch.float32 and not deep:
        return Blocks(32, 32, 64, 4, 2)
    if kernel == "patch_gradient" or dtype == torch.float32:
        return Blocks(32, 64, 64, 8, 2)
    return Blocks(64, 32 if deep or kernel == "bias_gradient" else 64, 64, 4, 2)


def constants(
    block: Blocks, query: Tensor, shape: tuple[int, int, int, int, int]
) -> dict[str, str | int | tuple[int, ...]]:
    return {
        "SHAPE": shape,
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


def sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int]:
    return query.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3]


def heads(query: Tensor) -> int:
    return query.shape[0] * query.shape[1]


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def steps(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def with_steps(bias: Tensor | None, query: Tensor) -> tuple[Tensor, int, int, int]:
    """The bias (h, Nq, Nk) and its strides; anything where there is none."""
    return (query, 0, 0, 0) if bias is None else (bias, bias.stride(0), bias.stride(1), bias.stride(2))
