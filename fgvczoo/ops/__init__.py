"""Fused operations. Each is a folder: `reference.py` is its definition, the other files compute the same faster."""

from fgvczoo.ops.backend import BACKENDS, use_backend
from fgvczoo.ops.nearest_patch import ACTIVATIONS, METRICS, activate, nearest_patch, similarity_map
from fgvczoo.ops.patch_attention import NORMALIZATIONS, patch_attention

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "METRICS",
    "NORMALIZATIONS",
    "activate",
    "nearest_patch",
    "patch_attention",
    "similarity_map",
    "use_backend",
]
