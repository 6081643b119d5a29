"""A cohort of embedding networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.embeddings import EmbeddingNetwork


class Cohort(nn.Module):
    """K networks, each a trunk, mean pooling and a linear layer; they share nothing but the pictures.

    Args:
        backbones: of the members, as `nn.backbones.Backbone` takes them.
        dims: of the members' embeddings.
        out_index, backbone_options: of every trunk.
        head_seed: member i's linear layer starts from `head_seed + i`: model diversity, where trunks start alike.
    """

    def __init__(
        self,
        backbones: Sequence[str],
        dims: Sequence[int],
        *,
        out_index: int | None = None,
        backbone_options: dict[str, Any] | None = None,
        head_seed: int = 0,
    ) -> None:
        super().__init__()
        if not backbones or len(backbones) != len(dims):
            raise FgvczooError(f"{len(backbones)} backbones and {len(dims)} dimensions; expected one each a member")
        self.members = nn.ModuleList(
            EmbeddingNetwork(
                backbone, dim, out_index=out_index, backbone_options=backbone_options, seed=head_seed + number
            )
            for number, (backbone, dim) in enumerate(zip(backbones, dims))
        )

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[EmbeddingNetwork]:
        return iter(self.members)  # type: ignore[arg-type]

    def raw(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Each member's output (B, D_i) on its own view (B, 3, h, w)."""
        return [member(view) for member, view in zip(self, views)]

    def forward(self, images: Tensor, member: int | None = None) -> Tensor:
        """The ensemble's embedding (B, sum of D_i), or one member's (B, D_i); rows of unit length."""
        if member is not None:
            return F.normalize(self.members[member](images), dim=1)
        return ensemble([F.normalize(net(images), dim=1) for net in self])


def ensemble(embeddings: Sequence[Tensor]) -> Tensor:
    """K unit embeddings (B, D_i) as one (B, sum of D_i) of unit length, whose squared distances are their mean."""
    return torch.cat(list(embeddings), dim=1) / len(embeddings) ** 0.5
