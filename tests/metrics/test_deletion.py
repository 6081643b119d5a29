"""Deletion and insertion curves against a plain loop; their edge cases; two processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics import DeletionAUC, area_under_curve, changed_share, deletion_curve
from tests.metrics.processes import in_two_processes


class Scorer:
    """Probabilities that every pixel has a part in; remembers how many images it was shown at once."""

    def __init__(self, height: int, width: int) -> None:
        self.weight = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(1)).double()
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return torch.einsum("bchw,kchw->bk", images.double(), self.weight).softmax(1)


def problem(seed: int, count: int, height: int, width: int) -> tuple[Scorer, Tensor, Tensor]:
    """Heat with many ties."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, generator=generator)
    return Scorer(height, width), images, torch.rand(count, height, width, generator=generator).mul(9).round().div(9)


def plain_curve(score: Scorer, image: Tensor, heat: Tensor, step: int, insert: bool, baseline: float) -> list[float]:
    """One image, one pixel after the other."""
    height, width = heat.shape
    order = sorted(range(height * width), key=lambda place: (-heat.flatten()[place].item(), place))
    current = torch.full_like(image, baseline) if insert else image.clone()
    target = int(score(image[None]).argmax())
    scores = [score(current[None])[0, target].item()]
    for start in range(0, len(order), step):
        for place in order[start : start + step]:
            y, x = divmod(place, width)
            current[:, y, x] = image[:, y, x] if insert else baseline
        scores.append(score(current[None])[0, target].item())
    return scores


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 12),
    step=st.none() | st.integers(1, 60),
    insert=st.booleans(),
    batch_size=st.integers(1, 40),
)
def test_curve_is_that_of_a_plain_loop(
    seed: int, count: int, height: int, width: int, step: int | None, insert: bool, batch_size: int
) -> None:
    score, images, heat = problem(seed, count, height, width)
    curve = deletion_curve(score, images, heat, insert=insert, baseline=0.3, step=step, batch_size=batch_size)
    used = step or 8 * width
    assert curve.shape == (count, math.ceil(height * width / used) + 1)
    assert max(score.batches, default=0) <= batch_size
    for image, one, scores in zip(images, heat, curve):
        expected = plain_curve(score, image, one, used, insert, 0.3)
        assert scores.tolist() == pytest.approx(expected, rel=1e-9)


def test_area_is_the_papers_sum() -> None:
    """224 x 224: 28 steps of 1792 pixels, AUC = (sum - (first + last) / 2) / 28; and a last step that is smaller."""
    share = changed_share(224, 224)
    assert len(share) == 29 and share[1] == 1792 / 224**2
    scores = torch.rand(3, 29, generator=torch.Generator().manual_seed(0)).double()
    expected = (scores.sum(1) - (scores[:, 0] + scores[:, -1]) / 2) / 28
    torch.testing.assert_close(area_under_curve(scores, share), expected)
    assert changed_share(10, 10, 40).tolist() == [0, 0.4, 0.8, 1]
    assert area_under_curve(torch.tensor([[1.0, 0.5, 0.0, 0.0]]), changed_share(10, 10, 40)).item() == pytest.approx(
        0.4
    )


def test_variants_of_several_images_share_batches() -> None:
    score, images, heat = problem(0, 5, 16, 4)  # 3 points each
    deletion_curve(score, images, heat, torch.zeros(5, dtype=torch.int64), batch_size=6)
    assert score.batches == [6, 6, 3]


def test_deletion_and_insertion_meet() -> None:
    """What deletion leaves of an image with nothing deleted is what insertion ends with."""
    score, images, heat = problem(3, 4, 9, 7)
    blurred = images.roll(1, dims=3)
    deleted = deletion_curve(score, images, heat, baseline=blurred)
    inserted = deletion_curve(score, images, heat, insert=True, baseline=blurred)
    torch.testing.assert_close(deleted[:, 0], inserted[:, -1])
    torch.testing.assert_close(deleted[:, -1], inserted[:, 0])


def test_a_constant_map_counts_and_goes_from_the_top() -> None:
    images = torch.arange(1.0, 5).view(1, 1, 4, 1).expand(1, 1, 4, 2)
    heat = torch.zeros(1, 4, 2)
    curve = deletion_curve(lambda x: x.sum((2, 3)), images, heat, step=2)
    assert curve.tolist() == [[20, 18, 14, 8, 0]]
    metric = DeletionAUC(step=2)
    metric.update(lambda x: x.sum((2, 3)), images, heat)
    found = metric.compute()
    assert found["images"] == 1 and found["constant_maps"] == 1 and found["deletion_auc"] == (18 + 14 + 8 + 10) / 4


def test_nothing_seen_is_nan() -> None:
    metric = DeletionAUC(insert=True)
    metric.update(Scorer(8, 8), torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8))
    assert math.isnan(metric.compute()["insertion_auc"])


def test_mistakes_are_named() -> None:
    score, images, heat = problem(0, 2, 8, 8)
    with pytest.raises(FgvczooError, match=r"expected \(B, C, h, w\)"):
        deletion_curve(score, images, heat[:, :4])
    with pytest.raises(FgvczooError, match="step=0"):
        deletion_curve(score, images, heat, step=0)
    with pytest.raises(FgvczooError, match="batch_size=0"):
        deletion_curve(score, images, heat, batch_size=0)
    with pytest.raises(FgvczooError, match="diverged"):
        deletion_curve(score, images, heat * torch.nan)


@pytest.mark.parametrize("first", [0, 2])
def test_two_processes_are_one(first: int, tmp_path: Path) -> None:
    score, images, heat = problem(5, 7, 20, 6)
    whole = DeletionAUC()
    whole.update(score, images, heat)

    def work(rank: int) -> dict[str, Tensor]:
        metric, part = DeletionAUC(batch_size=5), slice(0, first) if rank == 0 else slice(first, None)
        if len(images[part]):
            metric.update(score, images[part], heat[part])
        return metric.compute()

    for found in in_two_processes(work, tmp_path):
        torch.testing.assert_close(found, whole.compute(), rtol=1e-9, atol=0)
