"""Embedding networks, BN-Inception, and distances of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgvczoo import FgvczooError
from fgvczoo.nn.backbones import Backbone
from fgvczoo.nn.embeddings import EmbeddingNetwork, euclidean_distances, squared_distances


@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from([1.0, 1e-4]), st.sampled_from([0.0, 10.0]))
def test_distances_keep_their_digits(seed: int, dim: int, near: float, mean: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, dim, generator=generator) + mean
    rows[1] = rows[0] + near * rows[2]
    truth = (rows.double()[:, None] - rows.double()).square().sum(2)
    torch.testing.assert_close(squared_distances(rows), truth, rtol=1e-5, atol=1e-12)
    assert squared_distances(rows).dtype == torch.float64 and not squared_distances(rows).diagonal().any()
    assert euclidean_distances(rows.bfloat16()).dtype == torch.float32


def test_heads_of_equal_seeds_are_equal() -> None:
    torch.manual_seed(0)
    one, two, other = (EmbeddingNetwork("test_resnet", 4, out_index=1, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    with pytest.raises(FgvczooError, match="at least 2 dimensions"):
        EmbeddingNetwork("test_resnet", 1)


def test_bn_inception_is_a_trunk_of_any_size() -> None:
    with torch.device("meta"):
        trunk = Backbone("bn_inception")
        assert trunk.channels == 1024
        for size, cells in ((224, 7), (227, 7), (200, 7), (64, 2)):
            assert trunk(torch.zeros(1, 3, size, size)).shape == (1, 1024, cells, cells)
