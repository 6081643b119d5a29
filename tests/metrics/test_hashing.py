"""The numbers of hashing: against plain loops, and one process against two."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.retrieval_hashing import HashingMetrics
from tests.metrics.processes import in_two_processes


def some(seed: int, tags: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and labels of 7 queries and a gallery of 30."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(37, 6, generator=generator)
    labels = torch.randint(0, 4, (37,), generator=generator)
    if tags:
        labels = torch.randint(0, 2, (37, 5), generator=generator)
        labels[0] = 0  # has no relevant item
    return outputs[:7], labels[:7], outputs[7:], labels[7:]


def written(outputs: Tensor, labels: Tensor, gallery: Tensor, others: Tensor, k: int) -> dict[str, float]:
    """As the literature writes them, query by query."""
    values: dict[str, list[float]] = {"map": [], "map_min": [], "radius_precision": [], "empty_balls": []}
    for output, label in zip(outputs, labels):
        distance = [sum((a >= 0) != (b >= 0) for a, b in zip(output.tolist(), row.tolist())) for row in gallery]
        order = sorted(range(len(gallery)), key=lambda place: distance[place])
        like = [bool((label * other).any()) if label.ndim else bool(label == other) for other in others]
        hits, precisions = 0, []
        for rank, place in enumerate(order[:k], 1):
            if like[place]:
                hits += 1
                precisions.append(hits / rank)
        values["map"].append(sum(precisions) / hits if hits else 0.0)
        values["map_min"].append(sum(precisions) / min(sum(like), k) if any(like) else 0.0)
        ball = [place for place in order if distance[place] <= 2]
        values["radius_precision"].append(sum(like[place] for place in ball) / len(ball) if ball else 0.0)
        values["empty_balls"].append(float(not ball))
    return {name: sum(row) / len(row) for name, row in values.items()}


@given(seed=st.integers(0, 10_000), tags=st.booleans(), k=st.sampled_from([1, 8, None]))
def test_numbers_are_the_written_ones(seed: int, tags: bool, k: int | None) -> None:
    outputs, labels, gallery, others = some(seed, tags)
    metric = HashingMetrics(k, memory=2000)
    for place in reversed(range(7)):  # in any order, one of them twice
        metric.update(outputs[place : place + 1], labels[place : place + 1], torch.tensor([place]), gallery=False)
    metric.update(outputs[:1], labels[:1], torch.tensor([0]), gallery=False)
    metric.update(gallery, others, torch.arange(30), gallery=True)
    found = metric.compute()
    for name, value in written(outputs, labels, gallery, others, k or 30).items():
        assert math.isclose(float(found[name]), value, abs_tol=1e-12), name
    assert 0 <= float(found["map_tie_averaged"]) <= 1
    assert int(found["distinct_codes"]) == len({tuple(row) for row in (gallery >= 0).tolist()})


def test_mistakes() -> None:
    with pytest.raises(FgvczooError, match="k=0"):
        HashingMetrics(0)
    metric = HashingMetrics()
    metric.update(torch.ones(1, 4), torch.ones(1), torch.zeros(1), gallery=False)
    with pytest.raises(FgvczooError, match="no item of the gallery"):
        metric.compute()
    with pytest.raises(FgvczooError, match="row 0 is not finite"):
        metric.update(torch.full((1, 4), torch.nan), torch.ones(1), torch.zeros(1), gallery=True)


def test_two_processes_are_one(tmp_path: Path) -> None:
    outputs, labels, gallery, others = some(0, tags=True)

    def work(rank: int) -> dict[str, Tensor]:
        metric = HashingMetrics()
        metric.update(outputs[rank::2], labels[rank::2], torch.arange(7)[rank::2], gallery=False)
        metric.update(gallery[rank::2], others[rank::2], torch.arange(30)[rank::2], gallery=True)
        return metric.compute()

    one = HashingMetrics()
    one.update(outputs, labels, torch.arange(7), gallery=False)
    one.update(gallery, others, torch.arange(30), gallery=True)
    expected = one.compute()
    for found in in_two_processes(work, tmp_path):
        assert all(torch.equal(found[key], value) for key, value in expected.items())
