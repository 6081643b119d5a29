"""The SNR distance (the paper's definition of the signal-to-noise ratio between two features).

One feature of a pair is the signal (the anchor), the difference of the two is noise; the distance is the variance of
the noise over that of the signal, 1/SNR. Not symmetric, no triangle inequality: a metric in name only. Moving either
feature by a constant changes nothing; nor does scaling both by one factor. d(x, x) = 0, d(x, constant) = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.embeddings import squared_distances

# Of the anchor's variance: a constant feature has no signal, and its distances are large but finite.
SMALLEST_VARIANCE = 1e-12


def snr_distance(anchors: Tensor, others: Tensor | None = None, *, normalize: bool = False) -> Tensor:
    """SNR distances of all pairs: anchors (Q, M), others (G, M) -> (Q, G); rows are anchors. others None: of the
    anchors with themselves, (Q, Q), with a diagonal of 0.

    normalize: rows of unit length first, which the paper does not do: with means near zero that is nearly the squared
    Euclidean distance.

    One product of centred rows instead of Q x G x M differences, in float64: near duplicates keep their digits. The
    result has the type of the anchors, float32 at least. Raises `FgvczooError` for fewer than 2 dimensions.
    """
    a, c = _centred(anchors, normalize), None if others is None else _centred(others, normalize)
    distance = squared_distances(a, c) / _energy(a)[:, None]
    return distance.to(torch.promote_types(anchors.dtype, torch.float32))


def snr_distance_pairs(anchors: Tensor, others: Tensor, *, normalize: bool = False) -> Tensor:
    """SNR distance of row i of both: (N, M), (N, M) -> (N,)."""
    a, c = _centred(anchors, normalize), _centred(others, normalize)
    distance = (a - c).square().sum(1) / _energy(a)
    return distance.to(torch.promote_types(anchors.dtype, torch.float32))


def _centred(rows: Tensor, normalize: bool) -> Tensor:
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise FgvczooError(f"SNR distance of {tuple(rows.shape)}: expected (N, M) with at least 2 dimensions")
    rows = rows.double()
    if normalize:
        rows = F.normalize(rows, dim=1)
    return rows - rows.mean(dim=1, keepdim=True)


def _energy(centred: Tensor) -> Tensor:
    """M times the variance, of (N, M): (N,)."""
    return centred.square().sum(1).clamp(min=SMALLEST_VARIANCE * centred.shape[1])
