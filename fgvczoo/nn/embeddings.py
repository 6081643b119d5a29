"""Embedding networks, distances between the items of a batch, and the batch of all processes.

B images, N items, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone


class EmbeddingNetwork(nn.Module):
    """A trunk, mean pooling and one linear layer: images (B, 3, h, w) -> embeddings (B, `dim`).

    backbone, out_index, backbone_options: the trunk, as `nn.backbones.Backbone` takes them. normalize: rows of unit
    length. seed: of the linear layer's start, so that several networks begin apart; None: from torch's generator.
    """

    def __init__(
        self,
        backbone: str,
        dim: int,
        *,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        normalize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise FgvczooError(f"embedding_dim={dim}; an embedding needs at least 2 dimensions")
        self.backbone = Backbone(backbone, out_index=out_index, options=backbone_options)
        self.dim, self.normalize = dim, normalize
        if seed is None:
            self.head = nn.Linear(self.backbone.channels, dim)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head = nn.Linear(self.backbone.channels, dim)

    def pooled(self, images: Tensor) -> Tensor:
        """The trunk's features, averaged over the picture: (B, channels)."""
        return self.backbone(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.head(self.pooled(images))
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings


def squared_distances(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances between the rows of (N, D) and (K, D), or of the first alone: float64 (N, K).

    By one product in float64, in which near duplicates keep their digits: float32 rows that are 1e-4 of their length
    apart lose half of theirs in a float32 product. What is below the product's own rounding is 0, with gradient 0.
    """
    a = first.double()
    b = a if second is None else second.double()
    norm_a = a.square().sum(1)[:, None]
    norm_b = norm_a.T if second is None else b.square().sum(1)
    scale = norm_a + norm_b
    squared = scale - 2 * a @ b.T
    squared = squared.masked_fill(squared.detach() <= 1e-14 * scale.detach(), 0.0)
    if second is None:
        squared = squared.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), 0.0)
    return squared


def euclidean_distances(first: Tensor, second: Tensor | None = None, *, eps: float = 1e-12) -> Tensor:
    """Euclidean distances (N, K) in the type of the rows (float32 at least); squared ones are clamped at `eps`, whose
    gradient is 0. The diagonal of a set with itself is 0."""
    distances = squared_distances(first, second).clamp(min=eps).sqrt()
    if second is None:
        distances = distances.masked_fill(torch.eye(len(first), dtype=torch.bool, device=first.device), 0.0)
    return distances.to(torch.promote_types(first.dtype, torch.float32))


def gather_batch(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the ranks; itself in a single process. As many in each process.

    Gradients flow to every process's own rows: where each computes the same loss of all rows, averaging gradients, as
    DDP does, gives the gradients of one process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    if rows.requires_grad:
        return torch.cat(list(all_gather(rows)))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
