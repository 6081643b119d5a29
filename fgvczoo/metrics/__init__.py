"""Metrics: each a pure function and a torchmetrics class around it."""

from fgvczoo.metrics.deletion import DeletionAUC, area_under_curve, changed_share, deletion_curve
from fgvczoo.metrics.heatmaps import (
    HeatmapScores,
    class_activation,
    content_heatmap,
    heatmap,
    heatmap_iou,
    object_mask,
    outside_inside_ratio,
)
from fgvczoo.metrics.prototypes import (
    Consistency,
    Stability,
    consistency,
    own_pairs,
    part_hits,
    perturb,
    stability,
)
from fgvczoo.metrics.routing import RoutingScores, fidelity

__all__ = [
    "Consistency",
    "DeletionAUC",
    "HeatmapScores",
    "RoutingScores",
    "Stability",
    "area_under_curve",
    "changed_share",
    "class_activation",
    "consistency",
    "content_heatmap",
    "deletion_curve",
    "fidelity",
    "heatmap",
    "heatmap_iou",
    "object_mask",
    "outside_inside_ratio",
    "own_pairs",
    "part_hits",
    "perturb",
    "stability",
]
