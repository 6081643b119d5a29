"""Localisation metrics against a plain transcription of the protocol; their edge cases; two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics import (
    DIALECTS,
    BoxLocalization,
    PixelLocalization,
    box_iou,
    class_ranks,
    map_boxes,
    peak_iou,
    pixel_average_precision,
    pixel_histograms,
    prepare_maps,
    sweep,
    truth_boxes,
)
from tests.metrics.processes import in_two_processes

SIDE = 24


def some_maps(seed: int, count: int = 4, cells: int = 6) -> tuple[Tensor, list[np.ndarray]]:
    """Prepared maps (B, 24, 24) and one or two boxes an image."""
    generator = torch.Generator().manual_seed(seed)
    maps = prepare_maps(torch.randn(count, cells, cells, generator=generator).exp(), (SIDE, SIDE))
    corners = torch.randint(0, SIDE - 8, (count, 2, 2), generator=generator).numpy()
    truth = [np.concatenate([own, own + 7], axis=1)[: 1 + n % 2] for n, own in enumerate(corners)]
    return maps, truth


def plain_boxes(heat: np.ndarray, threshold: float) -> tuple[list[list[int]], int]:
    """The protocol's boxes at one threshold and the kept one, straight from its description."""
    height, width = heat.shape
    grey = (255 * heat).astype(np.uint8)
    cut = (grey > int(threshold * grey.max())).astype(np.uint8)
    contours, _ = cv2.findContours(cut, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return [[0, 0, 0, 0]], 0
    boxes = []
    for contour in contours:
        (x0, y0), (x1, y1) = contour.reshape(-1, 2).min(0), contour.reshape(-1, 2).max(0)
        boxes.append([int(x0), int(y0), min(int(x1) + 1, width - 1), min(int(y1) + 1, height - 1)])
    order = [(cv2.contourArea(c), int(c[0, 0, 1]), int(c[0, 0, 0])) for c in contours]
    return boxes, order.index(max(order))


def plain_iou(one: list[int], other: list[int]) -> float:
    """Pixel by pixel."""
    cells = [{(x, y) for x in range(b[0], b[2] + 1) for y in range(b[1], b[3] + 1)} for b in (one, other)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


@given(seed=st.integers(0, 10_000), cells=st.sampled_from([2, 5, 24]))
def test_boxes_are_the_protocols(seed: int, cells: int) -> None:
    heat = some_maps(seed, 1, cells)[0][0].numpy()
    tau = [0.0, 0.2, 0.5, 0.51, 0.9]
    found = map_boxes(heat, tau)
    for place, threshold in enumerate(tau):
        boxes, kept = plain_boxes(heat, threshold)
        assert sorted(found.all_at(place).tolist()) == sorted(boxes)
        assert found.at(place).tolist() == boxes[kept]


@given(seed=st.integers(0, 10_000), side=st.integers(3, 7))
def test_one_peak_around_a_hole(seed: int, side: int) -> None:
    """A slope that runs around a pit has one component at every cut, and a hole at the low ones."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    heat = np.pad(0.6 + 0.1 * np.arctan2(y, x) / np.pi, 2)
    generator = np.random.default_rng(seed)
    row, column = generator.integers(3, side + 1, 2) if side > 3 else (3, 3)
    heat[row, column] = generator.uniform(0, 0.5)
    heat /= heat.max()
    tau = np.linspace(0, 0.99, 40)
    found = map_boxes(heat, tau)
    for place, threshold in enumerate(tau):
        boxes, kept = plain_boxes(heat, threshold)
        assert sorted(found.all_at(place).tolist()) == sorted(boxes)
        assert found.at(place).tolist() == boxes[kept]


@given(seed=st.integers(0, 10_000))
def test_a_sweep_counts_as_every_threshold_alone(seed: int) -> None:
    """Cuts that are shared between thresholds, or left out because no box could count, change nothing."""
    maps, truth = some_maps(seed)
    metric, tau = BoxLocalization(), sweep()
    metric.update(maps, truth)
    for place in range(0, len(tau), 37):
        single, every = np.zeros(3, int), np.zeros(3, int)
        for heat, boxes in zip(maps.numpy(), truth):
            found, kept = plain_boxes(heat, tau[place])
            ious = [max(plain_iou(box, list(other)) for other in boxes.tolist()) for box in found]
            single += ious[kept] >= metric.iou_levels
            every += max(ious) >= metric.iou_levels
        assert metric.correct[:, place].tolist() == single.tolist()
        assert metric.correct_any[:, place].tolist() == every.tolist()


def test_at_most_256_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    trace = cv2.findContours
    monkeypatch.setattr(cv2, "findContours", lambda *a: calls.append(1) or trace(*a))
    map_boxes(some_maps(0, 1)[0][0], sweep(0.0001))
    assert 0 < len(calls) <= 256


@given(seed=st.integers(0, 10_000))
def test_iou_is_that_of_pixels(seed: int) -> None:
    boxes = np.random.default_rng(seed).integers(0, 8, (6, 2, 2))
    boxes = np.concatenate([boxes.min(1), boxes.max(1)], axis=1)
    ours = box_iou(boxes[:3], boxes[3:])
    assert np.allclose(ours, [[plain_iou(a, b) for b in boxes[3:].tolist()] for a in boxes[:3].tolist()])


def test_worked_by_hand() -> None:
    assert box_iou(np.array([[1, 2, 5, 6]]), np.array([[3, 1, 4, 5]])).item() == pytest.approx(8 / 27)
    one = np.array([[0, 0, 0, 0, 0], [0, 0.4, 0.4, 0.4, 0.6], [0, 0.4, 1, 0.8, 0.6], [0, 0.4, 0.4, 0.4, 0.6]])
    two = np.array([[0.4, 0, 0.2, 0.2, 0.2], [0.4, 0.4, 0, 0.4, 0], [0, 0, 0, 0.4, 0], [1, 0.6, 0.8, 0.2, 0.2]])
    for heat, expected in (
        (one, [[1, 1, 4, 3], [1, 1, 4, 3], [2, 1, 4, 3], [2, 2, 4, 3], [2, 2, 3, 3]]),
        (two, [[0, 0, 4, 3], [0, 0, 2, 2], [0, 3, 3, 3], [2, 3, 3, 3], [0, 3, 1, 3]]),
    ):
        found = map_boxes(heat, [0, 0.2, 0.4, 0.6, 0.8])
        assert [found.at(place).tolist() for place in range(5)] == expected


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_map_has_no_foreground(dialect: str, value: float) -> None:
    heat = prepare_maps(torch.full((1, 5, 5), value), (20, 30), dialect)[0]
    assert (heat == 0).all()
    expected = {"zero": [0, 0, 0, 0], "unit": [0, 0, 1, 1], "image": [0, 0, 30, 20]}[DIALECTS[dialect].empty]
    assert map_boxes(heat, [0.1], dialect).at(0).tolist() == expected


def test_most_pixels_and_its_ties() -> None:
    heat = np.zeros((8, 12))
    heat[1:3, 8:10] = heat[5:7, 1:3] = 0.5  # as large, and later
    heat[0, 0:3] = 0.5
    assert map_boxes(heat, [0.1], "bas").at(0).tolist() == [8, 1, 10, 3]


def test_truth_in_every_dialect() -> None:
    box = np.array([[10, 20, 110, 220]])
    assert truth_boxes(box, (300, 400), (224, 224)).tolist() == [[5, 14, 61, 164]]
    # To 256, then the middle.
    assert truth_boxes(box, (300, 400), (224, 224), "bas", (256, 256)).tolist() == [[0, 1, 54, 171]]
    conference = truth_boxes(box, (300, 400), (224, 224), "bas-conference", (256, 256))
    assert np.allclose(conference, [[0, 20 * 256 / 300 - 16, 54.4, 220 * 256 / 300 - 16]])
    assert truth_boxes(np.array([[390, 0, 400, 300]]), (300, 400), (512, 512), "genpromp").tolist() == [
        [499, 0, 511, 511]
    ]
    # A box of the margin is not on the evaluated picture.
    assert truth_boxes(np.array([[0, 0, 10, 10]]), (256, 256), (224, 224), "bas", (256, 256)).shape == (0, 4)
    with pytest.raises(FgvczooError, match="x0 <= x1"):
        truth_boxes(np.array([[5, 0, 1, 3]]), (10, 10), (10, 10))


def test_top_k_needs_the_class_and_the_box() -> None:
    heat = torch.zeros(3, 10, 10, dtype=torch.float64)
    heat[:2, 2:6, 2:6] = 1
    heat[2, 8:, 8:] = 1
    truth = [np.array([[2, 2, 6, 6]])] * 3
    scores = torch.eye(7)[[0, 1, 0]]
    metric = BoxLocalization("wsol", [0.2])
    metric.update(heat, truth, torch.tensor([0, 6, 0]), scores)
    values = metric.compute()
    assert [round(float(values[key]), 3) for key in ("gt_known_loc", "top1_loc", "top5_loc")] == [0.667, 0.333, 0.333]
    assert class_ranks(scores, torch.tensor([0, 6, 1])).tolist() == [0, 6, 1]


def test_the_conference_counts_by_class_and_strictly() -> None:
    heat = torch.zeros(3, 10, 10, dtype=torch.float64)
    heat[:, :4, :4] = 1  # (0, 0, 4, 4): 25 pixels with inclusive ends
    truth = [np.array([[0, 0, 9, 4]]), np.array([[0, 0, 4, 4]]), np.array([[0, 0, 4, 4]])]  # IoU 0.5, 1, 1
    labels = torch.tensor([0, 0, 1])
    rates = {}
    for dialect in ("bas", "bas-conference"):
        metric = BoxLocalization(dialect, [0.5], num_classes=2)
        metric.update(heat, truth, labels)
        rates[dialect] = float(metric.compute()["gt_known_loc"])
    assert rates == {"bas": 1.0, "bas-conference": 0.75}


def test_images_without_boxes_are_skipped_and_counted() -> None:
    maps, truth = some_maps(1)
    metric = BoxLocalization()
    metric.update(maps, [*truth[:3], np.zeros((0, 4))])
    values = metric.compute()
    assert int(values["images"]) == 3 and int(values["skipped"]) == 1
    assert np.isnan(float(BoxLocalization().compute()["max_box_acc"]))


def test_maps_of_several_sizes() -> None:
    metric = BoxLocalization("bas", [0.5])
    metric.update([torch.ones(4, 6), torch.ones(9, 3)], [np.array([[0, 0, 6, 4]]), np.array([[0, 0, 3, 9]])])
    assert float(metric.compute()["mean_iou"]) == 1


def test_mistakes_are_told() -> None:
    maps, truth = some_maps(2)
    with pytest.raises(FgvczooError, match=r"image 1 .*in \[0, 1\]"):
        BoxLocalization().update([maps[0], 2 * maps[1]], truth[:2])
    with pytest.raises(FgvczooError, match="expected as many"):
        BoxLocalization().update(maps, truth[:2])
    with pytest.raises(FgvczooError, match="labels are missing"):
        BoxLocalization().update(maps, truth, scores=torch.zeros(4, 2))
    with pytest.raises(FgvczooError, match=r"dialect='wsoll'.*wsol"):
        BoxLocalization("wsoll")
    with pytest.raises(FgvczooError, match="map 1 is NaN"):
        prepare_maps(torch.stack([maps[0], maps[1] * torch.nan]), (8, 8))
    with pytest.raises(FgvczooError, match="labels from 0 to 5"):
        class_ranks(torch.zeros(2, 3), torch.tensor([0, 5]))


def plain_pixels(maps: Tensor, masks: Tensor, interval: float) -> tuple[float, float]:
    """PxAP and peak IoU, a threshold at a time."""
    values, kinds = maps.flatten().numpy(), masks.flatten().numpy()
    values, on = values[kinds != 255], kinds[kinds != 255] > 0
    area, best, before = 0.0, 0.0, None
    for threshold in [1.0, *sweep(interval)[::-1]]:
        hot = values >= threshold
        hits, wrong = (hot & on).sum(), (hot & ~on).sum()
        recall = hits / on.sum()
        if before is not None and hits + wrong:
            area += hits / (hits + wrong) * (recall - before)
        elif before is None:  # the first bin counts from nothing
            area += hits / (hits + wrong) * recall if hits + wrong else 0
        best, before = max(best, hits / (wrong + on.sum())), recall
    return area, best


@given(seed=st.integers(0, 10_000), interval=st.sampled_from([0.001, 0.01, 0.3]))
def test_pixels_are_the_protocols(seed: int, interval: float) -> None:
    maps, _ = some_maps(seed)
    masks = torch.randint(0, 3, maps.shape, generator=torch.Generator().manual_seed(seed))
    masks[masks == 2] = 255
    true, false = pixel_histograms(maps, masks, interval)
    area, best = plain_pixels(maps, masks, interval)
    assert float(pixel_average_precision(true, false)) == pytest.approx(area, abs=1e-12)
    assert float(peak_iou(true, false, interval)[0]) == pytest.approx(best, abs=1e-12)
    edges = np.append(sweep(interval), [1.0, 2.0, 3.0])
    assert true.tolist() == np.histogram(maps[masks == 1].numpy(), edges)[0].tolist()
    assert false.tolist() == np.histogram(maps[masks == 0].numpy(), edges)[0].tolist()


def test_a_constant_map_has_the_share_of_the_foreground() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2, :3] = True
    values = PixelLocalization()
    values.update(torch.zeros(1, 4, 4), masks)
    found = values.compute()
    assert float(found["pxap"]) == float(found["peak_iou"]) == 6 / 16


def test_no_foreground_at_all_is_an_error() -> None:
    metric = PixelLocalization()
    metric.update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(FgvczooError, match="no mask has a foreground pixel"):
        metric.compute()


def test_two_processes_are_one(tmp_path: Path) -> None:
    maps, truth = some_maps(3, 6)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    scores = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    masks = maps > 0.4

    def measure(rows: slice) -> dict[str, Any]:
        boxes, pixels = BoxLocalization("bas-conference", [0.1, 0.5], 2), PixelLocalization()
        boxes.update(maps[rows], truth[rows], labels[rows], scores[rows])
        pixels.update(maps[rows], masks[rows])
        return {**boxes.compute(), **{f"pixel_{key}": value for key, value in pixels.compute().items()}}

    one = measure(slice(None))
    for two in in_two_processes(lambda rank: measure([slice(0, 4), slice(4, 6)][rank]), tmp_path):
        assert {key: float(value) for key, value in two.items()} == pytest.approx(
            {key: float(value) for key, value in one.items()}, nan_ok=True
        )
