"""Fused operations. Each is a folder: `reference.py` is its definition, the other files compute the same faster."""

from fgvczoo.ops.backend import BACKENDS, use_backend
from fgvczoo.ops.nearest_patch import METRICS, nearest_patch, similarity_map

__all__ = ["BACKENDS", "METRICS", "nearest_patch", "similarity_map", "use_backend"]
