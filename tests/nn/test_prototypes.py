"""Comparing images with the prototypes of their class only."""

from __future__ import annotations

import torch

from fgvczoo.models.protopnet.network import Head
from fgvczoo.nn.prototypes import Projector, class_members, own_class


def test_members_of_uneven_classes() -> None:
    members = class_members(torch.tensor([2, 0, 2, 2, 3]), 5)
    assert members.tolist() == [[1, -1, -1], [-1, -1, -1], [0, 2, 3], [4, -1, -1], [-1, -1, -1]]


def test_own_classes_are_the_masked_whole() -> None:
    """With classes of different sizes, one without prototypes, and copies of images."""
    generator = torch.Generator().manual_seed(0)
    class_of = torch.tensor([0, 2, 0, 1, 2, 2])
    head = Head(4, 4, class_of, 4)
    features = torch.rand(9, 4, 3, 2, generator=generator)
    features[5] = features[4]
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 2, 1, 2])
    with torch.no_grad():
        value, cell = head.nearest(features)
        own_value, own_cell, which = head.nearest_own(features, labels)
        for image in range(9):
            mine = which[image][which[image] >= 0]
            assert mine.tolist() == torch.nonzero(own_class(labels, class_of)[image])[:, 0].tolist()
            torch.testing.assert_close(own_value[image, : len(mine)], value[image, mine])
            assert torch.equal(own_cell[image, : len(mine)], cell[image, mine])
        one, other = Projector(class_of), Projector(class_of)
        one.update(features, value, cell, labels, torch.arange(9))
        other.update(features, own_value, own_cell, labels, torch.arange(9), which)
        assert torch.equal(one.sample, other.sample) and torch.equal(one.cell, other.cell)
