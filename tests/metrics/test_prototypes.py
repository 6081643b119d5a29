"""Consistency and stability against plain loops over images and prototypes; their edge cases; two processes."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics import Consistency, Stability, consistency, own_pairs, part_hits, perturb, stability
from fgvczoo.metrics.prototypes import peaks
from tests.metrics.processes import in_two_processes

SIZE, HALF = (45, 60), 9


class Problem:
    """Images of four classes, of which the last has none; three prototypes a class; five parts."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.class_of = torch.arange(4).repeat_interleave(3)
        self.labels = torch.randint(0, 3, (14,), generator=generator)
        self.maps = torch.randn(14, 12, 5, 6, generator=generator)
        self.noisy = self.maps + 0.3 * torch.randn(14, 12, 5, 6, generator=generator)
        place = torch.rand(14, 5, 2, generator=generator) * torch.tensor([60.0, 45.0])
        place[:, 0] = 30.5  # a part that stays in place, and prototypes that look at it
        self.maps[:, ::3, 3, 3] += 9
        visible = torch.rand(14, 5, 1, generator=generator) > 0.3
        visible[:, 4] = False
        self.parts = torch.cat([place, visible], dim=2)

    def pairs(self, images: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hits, hits under noise, visible, prototype of the pairs of some images."""
        image, prototype = own_pairs(self.labels[images], self.class_of)
        parts = self.parts[images][image]
        hits, noisy = (part_hits(maps[images][image, prototype], parts, SIZE, HALF) for maps in (self.maps, self.noisy))
        return hits, noisy, parts[..., 2] > 0, prototype


def plain_hits(activation: np.ndarray, parts: np.ndarray) -> list[int]:
    big = cv2.resize(activation, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    row, column = divmod(int(big.argmax()), SIZE[1])
    top, bottom = max(row - HALF, 0), min(row + HALF, SIZE[0])
    left, right = max(column - HALF, 0), min(column + HALF, SIZE[1])
    return [int(v > 0 and left <= int(x) <= right and top <= int(y) <= bottom) for x, y, v in parts]


def plain_scores(problem: Problem) -> tuple[float, float]:
    """As the definition reads: one prototype after the other, on the images of its class."""
    consistent, stable = [], []
    for prototype, owner in enumerate(problem.class_of.tolist()):
        images = [n for n, label in enumerate(problem.labels.tolist()) if label == owner]
        if not images:
            continue
        hits, noisy = (
            [plain_hits(maps[n, prototype].numpy(), problem.parts[n].numpy()) for n in images]
            for maps in (problem.maps, problem.noisy)
        )
        shares = []
        for part in range(5):
            seen = [hit[part] for n, hit in zip(images, hits) if problem.parts[n, part, 2] > 0]
            shares.append(sum(seen) / len(seen) if seen else 0)
        consistent.append(max(shares) >= 0.8)
        stable.append(sum(a == b for a, b in zip(hits, noisy)) / len(images))
    return 100 * float(np.mean(consistent)), 100 * float(np.mean(stable))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 14))
def test_scores_are_those_of_plain_loops(seed: int, cut: int) -> None:
    problem = Problem(seed)
    consistent, stable = Consistency(12, 5), Stability(12)
    for part in (slice(0, cut), slice(cut, None)):
        hits, noisy, visible, prototype = problem.pairs(part)
        consistent.update(hits, visible, prototype)
        stable.update(hits, noisy, prototype)
    expected = plain_scores(problem)
    found = consistent.compute() | stable.compute()
    assert found["consistency"].item() == pytest.approx(expected[0])
    assert found["stability"].item() == pytest.approx(expected[1])
    absent = 12 - 3 * len(problem.labels.unique())
    assert found["prototypes_left_out"] == absent
    hits, noisy, visible, prototype = problem.pairs()
    each = consistency(hits, visible, prototype, 12), stability(hits, noisy, prototype, 12)
    assert [100 * values.nanmean().item() for values in each] == pytest.approx(expected)
    assert all(values.isnan().sum() == absent for values in each)


def test_peak_of_a_constant_map_is_the_first_pixel() -> None:
    maps = torch.full((3, 7, 7), 0.1)
    maps[1, 3, 3] += 1
    assert peaks(maps, (63, 35)).tolist() == [[0, 0], [17, 31], [0, 0]]
    assert peaks(maps[:0], (224, 224)).shape == (0, 2)


def test_a_part_on_the_border_of_the_square_is_hit() -> None:
    """Locations are cut to whole pixels; both borders belong to the square; invisible parts are never hit."""
    maps = torch.zeros(1, 7, 7)
    maps[0, 3, 3] = 1  # peak at 31, 31
    parts = torch.tensor([[[41.9, 21.0, 1], [42.0, 31, 1], [31, 20.9, 1], [31, 31, 0], [21, 41, 1]]])
    assert part_hits(maps, parts, (63, 63), half_size=10).tolist() == [[True, False, False, False, True]]


def test_four_of_five_is_consistent() -> None:
    hits = torch.tensor([[1, 0]] * 4 + [[0, 0]]).bool()
    prototype = torch.zeros(5, dtype=torch.int64)
    assert consistency(hits, torch.ones(5, 2).bool(), prototype, 1).tolist() == [1]
    assert consistency(hits[1:], torch.ones(4, 2).bool(), prototype[1:], 1).tolist() == [0]


def test_no_visible_part_is_neither_consistent_nor_moved() -> None:
    hits, prototype = torch.zeros(2, 3).bool(), torch.tensor([0, 0])
    assert consistency(hits, hits, prototype, 1).tolist() == [0]
    assert stability(hits, hits, prototype, 1).tolist() == [1]


def test_prototypes_without_images_are_left_out() -> None:
    metric, other = Consistency(4, 2), Stability(4)
    nothing = torch.zeros(0, 2).bool(), torch.zeros(0, dtype=torch.int64)
    metric.update(nothing[0], *nothing)
    other.update(nothing[0], *nothing)
    for found in (metric.compute(), other.compute()):
        assert found.pop("prototypes_left_out") == 4
        assert all(math.isnan(value) for value in found.values())
    metric.update(torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), torch.tensor([2]))
    assert metric.compute() == {"consistency": 100, "prototypes_left_out": 3}


def test_noise_depends_on_seed_and_index_alone() -> None:
    images, index = torch.randn(4, 3, 30, 30), torch.tensor([5, 0, 9, 2])
    noisy = perturb(images, index)
    noise = noisy - images
    assert noise.abs().max() <= 0.25 + 1e-6 and 0.15 < noise.std() < 0.2  # 0.2 before clipping
    assert torch.equal(perturb(images[2:3], index[2:3]), noisy[2:3])
    assert not torch.equal(perturb(images, index, seed=1), noisy)
    assert not torch.equal(noise[0], noise[1])
    assert perturb(images[:0], index[:0]).shape == (0, 3, 30, 30)


def test_mistakes_are_named() -> None:
    with pytest.raises(FgvczooError, match=r"\(N, K, 3\)"):
        part_hits(torch.zeros(2, 7, 7), torch.zeros(3, 5, 3), (224, 224))
    flags = torch.zeros(2, 3).bool()
    with pytest.raises(FgvczooError, match="pairs"):
        consistency(flags, flags[:, :2], torch.tensor([0, 0]), 1)
    with pytest.raises(FgvczooError, match="pairs"):
        stability(flags, flags, torch.tensor([0]), 1)


@pytest.mark.parametrize("first", [0, 4])
def test_two_processes_are_one(first: int, tmp_path: Path) -> None:
    problem = Problem(3)

    def scores(images: slice) -> dict[str, Tensor]:
        consistent, stable = Consistency(12, 5), Stability(12)
        hits, noisy, visible, prototype = problem.pairs(images)
        consistent.update(hits, visible, prototype)
        stable.update(hits, noisy, prototype)
        return consistent.compute() | stable.compute()

    whole = scores(slice(None))
    for found in in_two_processes(lambda rank: scores(slice(0, first) if rank == 0 else slice(first, None)), tmp_path):
        assert found == whole
