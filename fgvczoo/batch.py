"""The batch vocabulary: every data module produces, and every module reads, a dict with these keys and no others.

B is the number of images, C of classes, h x w the size after `Preprocess`.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """One batch. `image` and `index` are always there; the rest where the data set has it and it was asked for."""

    image: Tensor  # (B, 3, h, w) float32, as `Preprocess` made it
    index: Tensor  # (B,) int64, row in the data set
    label: Tensor  # (B,) int64 in 0..C-1
    labels: Tensor  # (B, C) uint8, multi-label sets
    label_levels: Tensor  # (B, L) int64, hierarchies and superclasses
    boxes: list[Tensor]  # B tensors (n, 4) float32: x0, y0, x1, y1 in pixels of the transformed image, ends exclusive
    bbox: Tensor  # (B, 4) float32, only where a set has exactly one box an image
    mask: Tensor  # (B, h, w) int64 class index, 255 = ignore
    parts: Tensor  # (B, K, 3) float32: x, y in pixels of the transformed image, visible 0 or 1
    attributes: Tensor  # (B, A) float32
    attribute_certainty: Tensor  # (B, A) uint8, the set's own scale
    metadata: dict[str, Tensor]  # name -> (B, k) or (B, t, k) float32
    metadata_valid: dict[str, Tensor]  # name -> (B,) bool
    satellite: Tensor  # (B, 3, h', w') float32
    edited: Tensor  # (B, 3, h', w') float32
    views: list[Tensor]  # each (B, 3, h', w') float32
    size: Tensor  # (B, 2) int64: original height, width


# Keys whose entries keep one tensor an image because their sizes differ.
RAGGED_KEYS = frozenset({"boxes"})
