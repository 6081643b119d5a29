"""`nearest_patch` on an NVIDIA GPU: packs the operands, chooses tiles, launches the kernels of `kernels.py`.

Nothing here waits for the GPU or asks what a tensor holds, so that a CUDA graph can capture it; every sum has a fixed
order. Arguments as of the operators in `__init__.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fgvczoo.ops.nearest_patch import kernels, layout

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 turns it off unless asked

# Fewer pairs than these leave multiprocessors idle unless tiles are small: two tiles of 128 prototypes for each of 132.
FEW = 2 * 132 * 128

# What a program of the backward pass takes at once: pairs of a prototype or of a cell, bytes of a vector (at most), and
# cells that it writes together.
PAIRS_OF_PROTOTYPE, PAIRS_OF_CELL, BYTES, GROUP = 32, 8, 256, 4

# Registers of a thread, at most. Told nothing, the assembler aims at one program more and sometimes spills for it.
MANY = 224


class Operand(NamedTuple):
    """Rows of numbers, as `kernels.py` says."""

    high: Tensor
    low: Tensor
    norm: Tensor


class Tile(NamedTuple):
    """Prototypes, patches and channels of a product; warps and load stages of the program that makes it; the most
    registers of a thread."""

    prototypes: int
    patches: int
    channels: int
    warps: int
    stages: int
    registers: int | None = MANY


def forward(
    patches: Tensor, prototypes: Tensor, metrics: Sequence[str], ranks: int, activation: str, half: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, index and, if there is an activation, activated: (B, S, P) each."""
    value, index, activated = layout.results(patches, prototypes, len(metrics) * ranks, activation)
    if value.numel() == 0:
        return value, index, activated
    dtype, split = multiplied(patches, prototypes, half)
    tile = choose(dtype, split, patches, prototypes, ranks)
    blocks = triton.cdiv(len(prototypes), tile.prototypes)
    with torch.cuda.device_of(patches):  # type: ignore[no-untyped-call]
        deep = dtype == torch.float32
        x, p, shape = pack(patches, prototypes, dtype, split, blocks * tile.prototypes, tile.channels, deep)
        kernels.forward[(len(patches) * blocks,)](
            *x, *p, value, index, activated, len(prototypes), p.norm.shape[1], x.norm.shape[1], blocks,
            METRIC=metrics[0], SECOND="".join(metrics[1:]), RANKS=ranks, ACTIVATION=activation, SHAPE=shape,
            BLOCK_P=tile.prototypes, BLOCK_N=tile.patches, BLOCK_D=tile.channels, SPLIT=split, DEEP=deep,
            UPCAST=triton.knobs.runtime.interpret,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **OPTIONS,
        )  # fmt: skip
    return value, index, activated


def backward(
    grad: Tensor,
    grad_activated: Tensor,
    patches: Tensor,
    prototypes: Tensor,
    value: Tensor,
    index: Tensor,
    metrics: Sequence[str],
    activation: str,
    half: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of patches and prototypes from those of value and activated."""
    patch_gradient, prototype_gradient = layout.gradients(patches, prototypes)
    if value.numel() == 0:
        return patch_gradient.zero_(), prototype_gradient.zero_()
    images, slots, count = value.shape
    channels, ranks, pairs = patches.shape[1], slots // len(metrics), slots * count
    dtype, split = multiplied(patches, prototypes, half)
    if split:
        dtype = torch.float32
    depth = min(BYTES // dtype.itemsize, triton.next_power_of_2(max(16, channels)))
    with torch.cuda.device_of(patches):  # type: ignore[no-untyped-call]
        x, p, shape = pack(patches, prototypes, dtype, False, count, depth, False)
        weight, patch_share, prototype_share = (torch.empty_like(value) for _ in range(3))
        cells = torch.empty_like(index, dtype=torch.int16 if shape[0] < 2**15 else torch.int32)
        blocks = triton.cdiv(count, 256)
        for number, metric in enumerate(metrics):
            kernels.weigh[(images * ranks * blocks,)](
                grad.contiguous(), grad_activated.contiguous(), value, index, x.norm, p.norm,
                weight, patch_share, prototype_share, cells, slots, number * ranks, count, count, blocks,
                METRIC=metric, RANKS=ranks, ACTIVATION=activation, SHAPE=shape, BLOCK=256, **OPTIONS,
            )  # fmt: skip
        steps = shape[4] // depth
        kernels.prototype_gradient[(count * shape[2] * shape[3] * steps,)](
            x.high, p.high, weight, prototype_share, cells, prototype_gradient, images, slots, count, count, channels,
            SHAPE=shape, BLOCK_B=PAIRS_OF_PROTOTYPE, BLOCK_D=depth, num_warps=1, **OPTIONS,
        )  # fmt: skip
        # By cell; stable, so that equal cells keep the order of their pairs.
        by_cell, order = cells.view(images, pairs).sort(dim=1, stable=True)
        every = torch.arange(shape[0] + 1, dtype=cells.dtype, device=cells.device).expand(images, -1).contiguous()
        starts = torch.searchsorted(by_cell, every, out_int32=True)
        kernels.patch_gradient[(images * triton.cdiv(shape[0], GROUP) * steps,)](
            x.high, p.high, weight, patch_share, order, starts, patch_gradient,
            *patch_gradient.flatten(2).stride(), pairs, count, count, channels,
            SHAPE=shape, GROUP=GROUP, BLOCK_E=PAIRS_OF_CELL, BLOCK_D=depth, num_warps=1, **OPTIONS,
        )  # fmt: skip
    return patch_gradient, prototype_gradient


def multiplied(patches: Tensor, prototypes: Tensor, half: torch.dtype | None) -> tuple[torch.dtype, bool]:
    """The type of the numbers that are multiplied, and whether float32 is split into two of them.

    Half types, of both inputs or of autocast (`half`), are multiplied as they are. float32 as torch multiplies float32
    matrices (`torch.set_float32_matmul_precision`): highest: itself; high: the sum of two bfloat16, in three products;
    medium: bfloat16.
    """
    dtype = half or torch.promote_types(patches.dtype, prototypes.dtype)
    if dtype != torch.float32:
        return dtype, False
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's newer setting contradicts this one: it alone allows tf32
        precision = "high"
    return (torch.float32 if precision == "highest" else torch.bfloat16), precision == "high"


def choose(dtype: torch.dtype, split: bool, patches: Tensor, prototypes: Tensor, ranks: int) -> Tile:
    """The tile for these operands: of those that spill no registers, one of which two fit a multiprocessor.

    Prototypes that fit a tile stay there (its channels are all of theirs), others come in pieces.
    """
    depth = triton.next_power_of_2(max(16, patches.shape[1]))
    whole = prototypes.shape[2] * prototypes.shape[3] == 1
    if dtype == torch.float32:
        if ranks > 1:
            return Tile(32, 64, 16, 4, 3, 255)
        return Tile(64, 32, 16, 2, 3) if patches.shape[2] * patches.shape[3] > 128 else Tile(128, 32, 16, 4, 3, 255)
    if split:
        whole = whole and depth <= 128 and operands_in_shared_memory(patches.device)
        return Tile(64, 64, depth, 4, 2) if whole else Tile(64, 64, min(32, depth), 4, 3)
    if whole and depth <= 128:
        few = ranks > 1 or len(patches) * len(prototypes) < FEW
        return Tile(64 if few else 128, 64, depth, 4, 2)
    return Tile(64, 64, 256, 4, 2) if whole and depth == 256 else Tile(128, 64, min(64, depth), 8, 3, None)


@functools.cache
def operands_in_shared_memory(device: torch.device) -> bool:
    """Whether matrix units read their operands from shared memory (Hopper, data centre Blackwell), not from registers,
    which four half-precision tiles of 64 x 128 would fill."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def pack(
    patches: Tensor, prototypes: Tensor, dtype: torch.dtype, split: bool, rows: int, depth: int, deep: bool
) -> tuple[Operand, Operand, tuple[int, int, int, int, int]]:
    """Both operands, prototypes with `rows` rows, channels padded to a multiple of `depth`; and the kernels' SHAPE.

    deep: see `kernels.py`; with room for a multiple of 16 cells, so that each channel begins where 16 bytes do.
    """
    images, channels, height, width = patches.shape
    count, _, *window = prototypes.shape
    cells, places, padded = height * width, window[0] * window[1], triton.cdiv(channels, depth) * depth
    room = triton.cdiv(cells, 16) * 16 if deep else cells

    def empty(*shape: int) -> Operand:
        high = patches.new_empty(*shape, padded, dtype=dtype)  # or, if deep, (shape[0], padded, shape[1])
        return Operand(high, torch.empty_like(high) if split else high, patches.new_empty(shape, dtype=torch.float32))

    x, p = empty(images, room), empty(places, rows)
    x_strides, p_strides = patches.flatten(2).stride(), prototypes.flatten(2).stride()
    patch_blocks = images * triton.cdiv(room, 32)
    kernels.pack[(patch_blocks + places * triton.cdiv(rows, 32),)](
        patches.flatten(2), *x_strides, cells, room, patch_blocks, *x,
        prototypes.flatten(2), p_strides[2], p_strides[1], p_strides[0], count, rows, *p,
        channels, D=padded, BLOCK_N=32, BLOCK_D=64 if padded % 64 == 0 else depth, SPLIT=split, DEEP=deep,
        **OPTIONS,
    )  # fmt: skip
    return x, p, (cells, width, window[0], window[1], padded)
