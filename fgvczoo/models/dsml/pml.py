"""The SNR distance for pytorch-metric-learning: its losses and miners take it as they take their own.

from pytorch_metric_learning.losses import MultiSimilarityLoss
MultiSimilarityLoss(distance=SNRDistance())
"""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from fgvczoo.models.dsml.distance import snr_distance, snr_distance_pairs


class SNRDistance(BaseDistance):
    """As `pytorch_metric_learning.distances.SNRDistance`, without its (Q, G, M) differences, finite for constant
    features, and of the features as given: `normalize_embeddings=True` is that library's default, not the paper's."""

    def __init__(self, normalize_embeddings: bool = False, **options: Any) -> None:
        super().__init__(normalize_embeddings=normalize_embeddings, **options)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """(Q, M), (G, M) -> (Q, G); queries are anchors."""
        return snr_distance(query_emb, None if ref_emb is query_emb else ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Of row i of both: (N,)."""
        return snr_distance_pairs(query_emb, ref_emb)
