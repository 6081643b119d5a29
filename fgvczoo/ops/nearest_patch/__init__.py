"""For every image and prototype: the feature patch most like the prototype, and how alike they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.ops.backend import is_fused
from fgvczoo.ops.nearest_patch import cpu, reference

METRICS = ("l2", "cosine", "dot")

# The smallest norm that a vector is divided by: zero vectors stay zero (the default of F.normalize).
EPS = 1e-12

# Products with fewer vectors run other code (seen up to 11), which sums some rows in another order: equal patches would
# no longer tie.
FEWEST = 16


def nearest_patch(patches: Tensor, prototypes: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The best patch of each feature map for each prototype: (value, index), both (B, P).

    Args:
        patches: feature maps (B, D, H, W), any strides; B may be 0.
        prototypes: (P, D), or (P, D, h, w): then a patch is an h x w window, stride 1, no padding. With one more
            dimension in front, (B, P, D) or (B, P, D, h, w), every image has prototypes of its own, as when each is
            compared with those of its class only.
        metric: "l2": the smallest squared Euclidean distance, >= 0, exactly 0 for a prototype that is a patch.
            "cosine": the largest cosine, in [-1, 1] up to rounding; norms are at least 1e-12, so a zero vector gives
            0. A window counts as one vector. "dot": the largest dot product.

    Returns:
        value: float32, or float64 if an input is float64; other types, and autocast, compute in float32.
        index: int64, the patch's place y * (W - w + 1) + x; the lowest of equally good ones.

    A NaN or infinite entry in a feature map or prototype gives value NaN and index 0 for all its pairs. Gradients flow
    to prototypes and to the chosen patches only, deterministic on the CPU.

    Raises:
        FgvczooError: unknown metric, wrong ranks, dimensions or types, an empty map, a window larger than the map.

    Source: ProtoPNet (arXiv 1806.10574), section 2.1: the distance and its minimum; Deformable ProtoPNet and
    ST-ProtoPNet (arXiv 2301.04011): cosine and projection.
    """
    rows, vectors = _rows_and_vectors("nearest_patch", patches, prototypes, metric)
    kind = "l2" if metric == "l2" else "dot"  # the cosine is the dot product of the normalised rows and vectors
    count = vectors.shape[-2]
    if 0 < count < FEWEST:
        vectors = F.pad(vectors, (0, 0, 0, FEWEST - count))
    with _no_autocast(rows.device):
        fused = is_fused(rows.device) and vectors.ndim == 2
        value, index = (_fused if fused else reference.nearest)(rows, vectors, kind)
    return value[:, :count], index[:, :count]


def similarity_map(patches: Tensor, prototypes: Tensor, metric: str = "l2") -> Tensor:
    """The whole maps whose optimum `nearest_patch` finds: (B, P, H - h + 1, W - w + 1), for display.

    Arguments, types and errors as `nearest_patch`; "l2" gives squared distances, small where alike. It stores every
    pair: for training and projection use `nearest_patch`.
    """
    rows, vectors = _rows_and_vectors("similarity_map", patches, prototypes, metric)
    with _no_autocast(rows.device):
        if metric == "l2":
            # Without the matrix product, whose rounding hides distances near 0.
            maps = torch.cdist(vectors, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        else:
            maps = vectors @ rows.transpose(1, 2)
    height, width = _window(prototypes)
    return maps.view(*maps.shape[:2], patches.shape[2] - height + 1, patches.shape[3] - width + 1)


def _window(prototypes: Tensor) -> tuple[int, int]:
    return (prototypes.shape[-2], prototypes.shape[-1]) if prototypes.ndim >= 4 else (1, 1)


def _rows_and_vectors(name: str, patches: Tensor, prototypes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Checks the arguments; gives patches as rows (B, N, K) and prototypes (P, K) or (B, P, K) in the type that
    computes."""
    given = f"{name}: patches {tuple(patches.shape)}, prototypes {tuple(prototypes.shape)}"
    if metric not in METRICS:
        raise FgvczooError(
            f"{given}: unknown metric {metric!r}: one of {', '.join(METRICS)}{did_you_mean(metric, METRICS)}"
        )
    of_each_image = prototypes.ndim in (3, 5)
    if patches.ndim != 4 or not 2 <= prototypes.ndim <= 5 or (of_each_image and len(prototypes) != len(patches)):
        raise FgvczooError(f"{given}: expected (B, D, H, W) and (P, D) or (P, D, h, w), or one such set for each image")
    if not (patches.is_floating_point() and prototypes.is_floating_point()):
        raise FgvczooError(f"{given}: expected floating-point numbers, got {patches.dtype} and {prototypes.dtype}")
    sets = prototypes.shape[: 2 if of_each_image else 1]
    if of_each_image:
        prototypes = prototypes.flatten(0, 1)
    if patches.shape[1] != prototypes.shape[1]:
        raise FgvczooError(f"{given}: both need the same number of channels (dimension 1)")
    if 0 in patches.shape[1:] or 0 in prototypes.shape[1:]:
        raise FgvczooError(f"{given}: channels, map and window must not be empty")
    window = _window(prototypes)
    if window[0] > patches.shape[2] or window[1] > patches.shape[3]:
        raise FgvczooError(f"{given}: the prototypes' window is larger than the map")
    dtype = torch.float64 if torch.float64 in (patches.dtype, prototypes.dtype) else torch.float32
    columns = patches.to(dtype).flatten(2) if window == (1, 1) else F.unfold(patches.to(dtype), window)
    rows, vectors = columns.transpose(1, 2), prototypes.to(dtype).flatten(1)
    if metric == "cosine":
        # Norms along memory are five times faster than across it.
        rows, vectors = F.normalize(rows.contiguous(), dim=2, eps=EPS), F.normalize(vectors, dim=1, eps=EPS)
    return rows, vectors.view(*sets, vectors.shape[1])


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


@torch.library.custom_op("fgvczoo::nearest_patch", mutates_args=(), device_types="cpu")
def _fused(rows: Tensor, vectors: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return cpu.forward(rows, vectors, metric)


@torch.library.custom_op("fgvczoo::nearest_patch_backward", mutates_args=(), device_types="cpu")
def _fused_backward(grad: Tensor, rows: Tensor, vectors: Tensor, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return cpu.backward(grad, rows, vectors, index, metric)


@_fused.register_fake
def _(rows: Tensor, vectors: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], vectors.shape[0])
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int64)


@_fused_backward.register_fake
def _(grad: Tensor, rows: Tensor, vectors: Tensor, index: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), vectors.new_empty(vectors.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    rows, vectors, ctx.metric = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, vectors, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    rows, vectors, index = ctx.saved_tensors
    return *_fused_backward(grad, rows, vectors, index, ctx.metric), None


_fused.register_autograd(_gradients, setup_context=_save)
