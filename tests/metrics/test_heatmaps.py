"""Heat maps against OpenCV and plain loops; their edge cases; two processes."""

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
from torchmetrics.functional.classification import binary_jaccard_index

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics import (
    HeatmapScores,
    class_activation,
    content_heatmap,
    heatmap,
    heatmap_iou,
    object_mask,
    outside_inside_ratio,
)
from tests.metrics.processes import in_two_processes

SIZES = [(40, 31), (17, 52), (40, 31), (33, 33), (17, 52)]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int) -> tuple[Tensor, list[Tensor]]:
    """Activation maps and masks of several sizes; the mask of one picture is empty, that of another all of it."""
    maps = torch.randn(len(SIZES), 5, 7, generator=random(seed))
    masks = [torch.rand(size, generator=random(seed + 1)) > 0.6 for size in SIZES]
    masks[1], masks[3] = torch.zeros_like(masks[1]), torch.ones_like(masks[3])
    return maps, masks


def plain_heat(activation: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    heat = cv2.resize(activation, size[::-1], interpolation=cv2.INTER_CUBIC)
    return (heat - heat.min()) / (heat.max() - heat.min())


def plain_scores(heat: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Pixel by pixel, as the card of the paper says it; None where a division by nothing would be needed."""
    inside, outside, hit, either = [], [], 0, 0
    for value, is_object in zip(heat.ravel().tolist(), mask.ravel().tolist()):
        (inside if is_object else outside).append(value)
        hit += value >= 0.5 and is_object
        either += value >= 0.5 or is_object
    scores = {"iou": hit / (either + 1e-8)}
    if inside:
        scores["content_heatmap"] = sum(inside) / len(inside)
    if inside and outside:
        scores["oirr"] = sum(outside) / len(outside) / scores["content_heatmap"]
    return scores


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_scores_are_those_of_plain_loops(seed: int) -> None:
    maps, masks = pictures(seed)
    each = [plain_scores(plain_heat(a.numpy(), m.shape), m.numpy()) for a, m in zip(maps, masks)]
    metric = HeatmapScores()
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(maps[part], masks[part])
    found = metric.compute()
    for name in ("content_heatmap", "oirr", "iou"):
        values = [scores[name] for scores in each if name in scores]
        assert found[name].item() == pytest.approx(np.mean(values), rel=1e-4), name
    assert (found["images"], found["content_heatmap_skipped"], found["oirr_skipped"]) == (5, 1, 2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 60), width=st.integers(1, 60))
def test_functions_are_those_of_plain_loops(seed: int, height: int, width: int) -> None:
    heat = heatmap(torch.randn(3, 4, 6, generator=random(seed)), (height, width))
    mask = torch.rand(3, height, width, generator=random(seed + 1)) > 0.5
    assert heat.min() >= 0 and heat.max() <= 1
    for function in (content_heatmap, outside_inside_ratio, heatmap_iou):
        name = {"outside_inside_ratio": "oirr", "heatmap_iou": "iou"}.get(function.__name__, function.__name__)
        for value, one, where in zip(function(heat, mask).tolist(), heat, mask):
            expected = plain_scores(one.numpy(), where.numpy()) if one[where].any() else {"iou": value}
            if name not in expected:
                assert math.isnan(value) or not one[where].any()
            else:
                assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-7)


def test_iou_is_torchmetrics() -> None:
    heat, mask = torch.rand(4, 9, 9, generator=random(0)), torch.rand(4, 9, 9, generator=random(1)) > 0.5
    for one, where, value in zip(heat, mask, heatmap_iou(heat, mask, 0.3)):
        assert value.item() == pytest.approx(binary_jaccard_index((one >= 0.3).int(), where).item())


def test_class_activation_is_the_mean_of_the_classes_prototypes() -> None:
    maps, class_of = torch.randn(3, 5, 2, 4), torch.tensor([0, 2, 0, 0, 2])
    found = class_activation(maps, class_of, torch.tensor([2, 1, 0]))
    torch.testing.assert_close(found[0], maps[0, [1, 4]].mean(0))
    assert not found[1].any()  # a class without prototypes
    torch.testing.assert_close(found[2], maps[2, [0, 2, 3]].mean(0))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-20, 1e20])
def test_a_constant_map_is_no_heat_and_counted(value: float) -> None:
    """Also where upsampling rounds its pixels apart, and where the network rounded its cells apart."""
    maps = torch.full((2, 5, 3), value)
    maps[1, 2, 1] *= 1 + 1e-7
    assert not heatmap(maps, (31, 47)).any()
    metric = HeatmapScores()
    metric.update(torch.cat([maps, torch.rand(1, 5, 3)]), torch.eye(47)[:31].bool().expand(3, -1, -1))
    found = metric.compute()
    assert found["constant_maps"] == 2 and found["images"] == 3
    assert found["content_heatmap_skipped"] == 0 and found["oirr_skipped"] == 2


def test_a_single_cell_and_a_single_pixel_are_constant() -> None:
    assert not heatmap(torch.tensor([[[3.0]]]), (8, 8)).any()
    assert not heatmap(torch.randn(1, 4, 4), (1, 1)).any()


def test_masks_without_inside_or_outside() -> None:
    heat = torch.tensor([[[0.0, 1.0]]]).expand(4, -1, -1)
    mask = torch.tensor([[[0, 0]], [[1, 1]], [[1, 0]], [[0, 1]]]).bool()
    expected = {
        content_heatmap: [torch.nan, 0.5, 0.0, 1.0],
        outside_inside_ratio: [torch.nan, torch.nan, torch.nan, 0.0],  # the third object has no heat at all
        heatmap_iou: [0.0, 0.5, 0.0, 1.0],
    }
    for function, values in expected.items():
        found = function(heat, mask)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), equal_nan=True)
    assert heatmap_iou(torch.tensor([[[0.5, 0.49]]]), torch.tensor([[[True, False]]])).tolist() == [1.0]
    assert heatmap_iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).bool()).tolist() == [0.0]


def test_any_first_channel_of_a_mask_file_is_object() -> None:
    mask = torch.zeros(2, 3, 4, dtype=torch.uint8)
    mask[0, 0, 0], mask[1, 2, 0], mask[0, 1, 1], mask[..., 3] = 1, 255, 200, 255
    assert object_mask(mask).tolist() == [[True, False, False], [False, False, True]]
    assert torch.equal(object_mask(mask[..., 0]), object_mask(mask))


def test_nothing_seen_is_nan() -> None:
    metric = HeatmapScores()
    metric.update(torch.zeros(0, 7, 7), [])
    found = metric.compute()
    assert all(math.isnan(found[name]) for name in ("content_heatmap", "oirr", "iou")) and found["images"] == 0


def test_mistakes_are_named() -> None:
    heat, mask = torch.rand(2, 4, 4), torch.ones(2, 4, 4)
    for function in (content_heatmap, outside_inside_ratio, heatmap_iou):
        with pytest.raises(FgvczooError, match="mask bool"):
            function(heat, mask)
        with pytest.raises(FgvczooError, match=r"expected both \(B, h, w\)"):
            function(heat, mask.bool()[:, :3])
    with pytest.raises(FgvczooError, match="diverged"):
        heatmap(torch.full((1, 2, 2), torch.nan), (4, 4))
    with pytest.raises(FgvczooError, match="one mask an image"):
        HeatmapScores().update(heat, [mask[0].bool()])
    with pytest.raises(FgvczooError, match=r"\(B, H, W\)"):
        heatmap(heat[0], (4, 4))
    with pytest.raises(FgvczooError, match="channels"):
        object_mask(mask[None])


@pytest.mark.parametrize("first", [0, 2, 5])
def test_two_processes_are_one(first: int, tmp_path: Path) -> None:
    """Whatever number of images each has, none among them."""
    maps, masks = pictures(7)
    whole = HeatmapScores()
    whole.update(maps, masks)

    def work(rank: int) -> dict[str, Tensor]:
        metric, part = HeatmapScores(), slice(0, first) if rank == 0 else slice(first, None)
        if len(maps[part]):
            metric.update(maps[part], masks[part])
        return metric.compute()

    for found in in_two_processes(work, tmp_path):
        torch.testing.assert_close(found, whole.compute(), rtol=1e-12, atol=0)
