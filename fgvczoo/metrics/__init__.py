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
from fgvczoo.metrics.localization import (
    BoxLocalization,
    PixelLocalization,
    class_ranks,
    peak_iou,
    pixel_average_precision,
    pixel_histograms,
    sweep,
)
from fgvczoo.metrics.localization_boxes import (
    DIALECTS,
    Dialect,
    box_iou,
    map_boxes,
    prepare_maps,
    truth_boxes,
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
from fgvczoo.metrics.segmentation import SeedIoU, seed_labels

__all__ = [
    "DIALECTS",
    "BoxLocalization",
    "Consistency",
    "DeletionAUC",
    "Dialect",
    "HeatmapScores",
    "PixelLocalization",
    "RoutingScores",
    "SeedIoU",
    "Stability",
    "area_under_curve",
    "box_iou",
    "changed_share",
    "class_activation",
    "class_ranks",
    "consistency",
    "content_heatmap",
    "deletion_curve",
    "fidelity",
    "heatmap",
    "heatmap_iou",
    "map_boxes",
    "object_mask",
    "outside_inside_ratio",
    "own_pairs",
    "part_hits",
    "peak_iou",
    "perturb",
    "pixel_average_precision",
    "pixel_histograms",
    "prepare_maps",
    "seed_labels",
    "stability",
    "sweep",
    "truth_boxes",
]
