"""What `patch_attention` computes, in plain torch. Every other implementation is held against this one.

query (B, h, Nq, d), key (B, h, Nk, d), value (B, h, Nk, e), bias broadcastable to (h, Nq, Nk).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the shares of "queries" before they are renormalised (Slot Attention): a query that wins no patch takes the
# mean of them all.
EPSILON = 1e-8


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, normalize: str
) -> tuple[Tensor, Tensor]:
    """Output (B, h, Nq, e) and weights (B, h, Nq, Nk), both float32, or float64 if the query is."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scores = scale * query @ key.mT
    if bias is not None:
        scores = scores + bias.to(dtype)
    if normalize == "patches":
        weights = softmax(scores, -1)
    else:
        shares = softmax(scores, -2) + EPSILON
        weights = shares / shares.sum(-1, keepdim=True)
    return weights @ value, weights


def softmax(scores: Tensor, dim: int) -> Tensor:
    """As `torch.softmax`, but 0, without NaN in its gradient, where all scores are minus infinity."""
    top = scores.detach().amax(dim, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(dim, keepdim=True)  # 1 or more, or 0
    return exponentials / (total + (total == 0))
