"""For every image and prototype: the feature patch most like the prototype, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.ops.autocast import half_type, no_autocast
from fgvczoo.ops.backend import is_fused
from fgvczoo.ops.nearest_patch import cpu, layout, reference
from fgvczoo.ops.nearest_patch.reference import EPS, activate

__all__ = ["ACTIVATIONS", "EPS", "METRICS", "activate", "nearest_patch", "similarity_map"]

METRICS = ("l2", "cosine", "dot")
ACTIVATIONS = ("log", "exp")


@overload
def nearest_patch(
    patches: Tensor, prototypes: Tensor, metric: str | Sequence[str] = "l2", *, k: int | None = None
) -> tuple[Tensor, Tensor]: ...


@overload
def nearest_patch(
    patches: Tensor, prototypes: Tensor, metric: str = "l2", *, k: int | None = None, activation: str
) -> tuple[Tensor, Tensor, Tensor]: ...


def nearest_patch(
    patches: Tensor,
    prototypes: Tensor,
    metric: str | Sequence[str] = "l2",
    *,
    k: int | None = None,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """The best patch of each feature map for each prototype: (value, index), both (B, P).

    Args:
        patches: feature maps (B, D, H, W), any strides; B may be 0.
        prototypes: (P, D), or (P, D, h, w): then a patch is an h x w window, stride 1, no padding. With one more
            dimension in front, (B, P, D) or (B, P, D, h, w), every image has prototypes of its own, as when each is
            compared with those of its class only.
        metric: "l2": the smallest squared Euclidean distance, >= 0, exactly 0 for a prototype that is a patch.
            "cosine": the largest cosine, in [-1, 1] up to rounding; norms are at least 1e-12, so a zero vector gives
            0. A window counts as one vector. "dot": the largest dot product. Two of them, as ("dot", "cosine"), share
            one pass: the results are (2, B, P).
        k: the k best patches instead, best first: the results have one more dimension at the end, (B, P, k).
        activation: a similarity made of the squared distance d of "l2", as a third result: "log", which is
            ln((d + 1) / (d + 1e-4)), or "exp", e^-sqrt(d).

    Returns:
        value: float32, or float64 if an input is float64.
        index: int64, the patch's place y * (W - w + 1) + x; the lowest of equally good ones.
        activated: as value, where an activation is given.

    Half types, and autocast, compute in float32; but on a GPU vectors are rounded as torch's matrix products round
    them: to the half type of autocast or of both inputs, and float32 as `torch.set_float32_matmul_precision` says
    ("highest": not; "high": to the sum of two bfloat16; "medium": to bfloat16). Sums are float32 always, and values are
    those of the rounded vectors.

    A NaN or infinite entry in a feature map or prototype gives value NaN and index 0 for all its pairs. Gradients flow
    to prototypes and to the chosen patches only, and are deterministic.

    Raises:
        FgvczooError: unknown metric or activation, wrong ranks, dimensions or types, an empty map, a window larger than
            the map, more patches asked for than there are.

    Source: ProtoPNet (arXiv 1806.10574), section 2.1: the distance and its minimum; Deformable ProtoPNet and
    ST-ProtoPNet (arXiv 2301.04011): cosine and projection; ProtoTree (arXiv 2012.02046): e^-sqrt(d).
    """
    metrics = [metric] if isinstance(metric, str) else list(metric)
    prototypes = _checked("nearest_patch", patches, prototypes, metrics)
    ranks = 1 if k is None else k
    _check_choices(patches, prototypes, metrics, ranks, activation)
    device = patches.device
    fused = is_fused(device) and prototypes.ndim == 4
    if device.type != "cpu" and torch.float64 in (patches.dtype, prototypes.dtype):
        fused = False
    half = half_type(device)
    with no_autocast(device):
        if fused:
            value, index, activated = _nearest(patches, prototypes, " ".join(metrics), ranks, activation or "", half)
        else:
            best = [reference.nearest(patches, prototypes, name, ranks) for name in metrics]
            value, index = (torch.cat(part, dim=1) for part in zip(*best))
            activated = activate(value, activation) if activation else value
    results = (value, index, activated) if activation else (value, index)  # (B, metrics x ranks, P)
    if k is not None:
        return tuple(_by_metric(part.unflatten(1, (-1, k)).mT, metric) for part in results)
    return tuple(_by_metric(part, metric) for part in results)


def _by_metric(part: Tensor, metric: str | Sequence[str]) -> Tensor:
    """(B, metrics, ...) -> (metrics, B, ...), or (B, ...) if the metric was given by its name alone."""
    return part.squeeze(1) if isinstance(metric, str) else part.transpose(0, 1)


def similarity_map(patches: Tensor, prototypes: Tensor, metric: str = "l2") -> Tensor:
    """The whole maps whose optimum `nearest_patch` finds: (B, P, H - h + 1, W - w + 1), for display.

    Arguments, types and errors as `nearest_patch`; "l2" gives squared distances, small where alike. It stores every
    pair: for training and projection use `nearest_patch`.
    """
    prototypes = _checked("similarity_map", patches, prototypes, [metric])
    with no_autocast(patches.device):
        rows, vectors = reference.rows_and_vectors(patches, prototypes, metric)
        if metric == "l2":
            # Without the matrix product, whose rounding hides distances near 0.
            maps = torch.cdist(vectors, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        else:
            maps = vectors @ rows.transpose(1, 2)
    height, width = (side - window + 1 for side, window in zip(patches.shape[2:], prototypes.shape[-2:]))
    return maps.view(*maps.shape[:2], height, width)


def _checked(name: str, patches: Tensor, prototypes: Tensor, metrics: Sequence[str]) -> Tensor:
    """The prototypes as (P, D, h, w) or (B, P, D, h, w), after a check of all arguments."""
    given = f"{name}: patches {tuple(patches.shape)}, prototypes {tuple(prototypes.shape)}"
    for metric in metrics:
        if metric not in METRICS:
            raise FgvczooError(
                f"{given}: unknown metric {metric!r}: one of {', '.join(METRICS)}{did_you_mean(metric, METRICS)}"
            )
    of_each_image = prototypes.ndim in (3, 5)
    if patches.ndim != 4 or not 2 <= prototypes.ndim <= 5 or (of_each_image and len(prototypes) != len(patches)):
        raise FgvczooError(f"{given}: expected (B, D, H, W) and (P, D) or (P, D, h, w), or one such set for each image")
    if not (patches.is_floating_point() and prototypes.is_floating_point()):
        raise FgvczooError(f"{given}: expected floating-point numbers, got {patches.dtype} and {prototypes.dtype}")
    if prototypes.ndim <= 3:
        prototypes = prototypes[..., None, None]
    if patches.shape[1] != prototypes.shape[-3]:
        raise FgvczooError(f"{given}: both need the same number of channels (dimension 1)")
    if 0 in patches.shape[1:] or 0 in prototypes.shape[-3:]:
        raise FgvczooError(f"{given}: channels, map and window must not be empty")
    if any(window > side for window, side in zip(prototypes.shape[-2:], patches.shape[2:])):
        raise FgvczooError(f"{given}: the prototypes' window is larger than the map")
    return prototypes


def _check_choices(
    patches: Tensor, prototypes: Tensor, metrics: Sequence[str], ranks: int, activation: str | None
) -> None:
    """What `nearest_patch` asks beyond `_checked`; prototypes (P, D, h, w) or (B, P, D, h, w)."""
    if not 1 <= len(metrics) <= 2:
        raise FgvczooError(f"nearest_patch: metric {tuple(metrics)}; expected one metric or two")
    rows, columns = (side - window + 1 for side, window in zip(patches.shape[2:], prototypes.shape[-2:]))
    if not 1 <= ranks <= rows * columns:
        raise FgvczooError(f"nearest_patch: k={ranks}; expected 1 to {rows * columns}, the patches of a map")
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise FgvczooError(
            f"nearest_patch: activation {activation!r}; expected {names}{did_you_mean(activation, ACTIVATIONS)}"
        )
    if activation is not None and list(metrics) != ["l2"]:
        raise FgvczooError(f"nearest_patch: activation {activation!r} is of l2 distances, metric is {tuple(metrics)}")


# -- the operator -----------------------------------------------------------------------------------------------------
#
# patches (B, D, H, W), prototypes (P, D, h, w); `metrics` are names, separated by blanks. Results are (B, S, P) with
# S = metrics x ranks. `half` is the type of autocast.


@torch.library.custom_op("fgvczoo::nearest_patch", mutates_args=(), device_types="cpu")
def _nearest(
    patches: Tensor, prototypes: Tensor, metrics: str, ranks: int, activation: str, half: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.forward(patches, prototypes, metrics.split(), ranks, activation)


@torch.library.custom_op("fgvczoo::nearest_patch_backward", mutates_args=(), device_types="cpu")
def _nearest_backward(
    grad: Tensor,
    grad_activated: Tensor,
    patches: Tensor,
    prototypes: Tensor,
    value: Tensor,
    index: Tensor,
    metrics: str,
    activation: str,
    half: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return cpu.backward(grad, grad_activated, patches, prototypes, value, index, metrics.split(), activation)


@_nearest.register_kernel("cuda")
def _(
    patches: Tensor, prototypes: Tensor, metrics: str, ranks: int, activation: str, half: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    from fgvczoo.ops.nearest_patch import triton  # not before it is needed: not every machine has Triton

    return triton.forward(patches, prototypes, metrics.split(), ranks, activation, half)


@_nearest_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    grad_activated: Tensor,
    patches: Tensor,
    prototypes: Tensor,
    value: Tensor,
    index: Tensor,
    metrics: str,
    activation: str,
    half: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    from fgvczoo.ops.nearest_patch import triton

    return triton.backward(grad, grad_activated, patches, prototypes, value, index, metrics.split(), activation, half)


@_nearest.register_fake
def _(
    patches: Tensor, prototypes: Tensor, metrics: str, ranks: int, activation: str, half: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return layout.results(patches, prototypes, len(metrics.split()) * ranks, activation)


@_nearest_backward.register_fake
def _(
    grad: Tensor,
    grad_activated: Tensor,
    patches: Tensor,
    prototypes: Tensor,
    value: Tensor,
    index: Tensor,
    metrics: str,
    activation: str,
    half: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return layout.gradients(patches, prototypes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    patches, prototypes, ctx.metrics, _, ctx.activation, ctx.half = inputs
    value, index, activated = output
    ctx.mark_non_differentiable(index) if ctx.activation else ctx.mark_non_differentiable(index, activated)
    ctx.save_for_backward(patches, prototypes, value, index)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None, grad_activated: Tensor) -> tuple[Tensor | None, ...]:
    patches, prototypes, value, index = ctx.saved_tensors
    found = _nearest_backward(
        grad, grad_activated, patches, prototypes, value, index, ctx.metrics, ctx.activation, ctx.half
    )
    return *found, None, None, None, None


_nearest.register_autograd(_gradients, setup_context=_save)
