"""Times localisation against transcriptions: `python benchmarks/localization.py [metrics|training]`.

metrics: against the reference protocol.

Choe et al. 2020, as its evaluation goes: for each of 1000 thresholds the map is cut, all contours are traced, and every
box is compared with every ground-truth box. The protocol needs a run for MaxBoxAcc and one for MaxBoxAccV2; a pass that
shares the contours between both is timed, too. Here at most 256 cuts are traced, in the window that holds their
foreground. PxAP is part of all of them.

5,794 maps of 224 x 224 (as many as CUB-200-2011 has test images): network maps of 14 x 14 cells around one object, and
speckled ones, made and prepared beforehand. The reference runs on the first REFERENCE of them and both are compared on
those, exactly; ours runs on all. One thread. Writes results/localization_metrics.json and .md.

training: a step of BAS (forward and backward of all four losses), ResNet-50, 1000 classes, 224 x 224 pixels, against a
plain transcription that makes every class's map and picks the label's, and copies the head at every step, whose weights
then get gradients that nobody uses. Equal losses are asserted. One thread; each way in a fresh process. Writes
results/bas_step.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import cv2
import numpy as np
import torch
from report import RESULTS, one_thread, write
from timing import in_fresh_process
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.metrics.localization import BoxLocalization, PixelLocalization, sweep
from fgvczoo.metrics.localization_boxes import prepare_maps
from fgvczoo.models.bas.losses import LossWeights, loss_terms, total_loss
from fgvczoo.models.bas.network import BASNetwork

IMAGES, SIDE, CELLS = 5794, 224, 14
REFERENCE = 100
BATCH = 50
KINDS = ("smooth", "speckled")


def maps_of(kind: str, first: int, count: int) -> tuple[Tensor, list[np.ndarray], Tensor]:
    """Prepared maps (B, 224, 224), one or two boxes an image, masks."""
    generator = torch.Generator().manual_seed(first)
    cells = torch.arange(CELLS).float()
    centre = 3 + 7 * torch.rand(count, 2, generator=generator)
    spread = 2 + 2 * torch.rand(count, 2, generator=generator)
    rows, columns = ((cells - centre[:, axis, None]) / spread[:, axis, None] for axis in (0, 1))
    blob = torch.exp(-(rows[:, :, None] ** 2) - columns[:, None] ** 2)
    noise = torch.randn(count, CELLS, CELLS, generator=generator)
    raw = blob + (0.05 if kind == "smooth" else 0.4) * noise
    scale = SIDE / CELLS
    low, high = (centre - spread).mul(scale).clamp(0, SIDE - 2), (centre + spread).mul(scale).clamp(1, SIDE - 1)
    boxes = torch.cat([low.flip(1), high.flip(1)], dim=1).floor().numpy()
    truth = [box[None] if number % 3 else np.stack([box, box]) for number, box in enumerate(boxes)]
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
        mask[y0:y1, x0:x1] = 1
    return prepare_maps(raw, (SIDE, SIDE)), truth, masks


def reference(
    maps: np.ndarray, truth: list[np.ndarray], masks: np.ndarray, modes: tuple[str, ...], pixels: bool = True
) -> dict[str, Any]:
    """The protocol as it is written, for the boxes of the largest contour, of all contours, or both."""
    thresholds = np.arange(0, 1, 0.001)
    levels = np.array([0.3, 0.5, 0.7])
    single, multi = np.zeros((3, len(thresholds)), np.int64), np.zeros((3, len(thresholds)), np.int64)
    edges = np.append(thresholds, [1.0, 2.0, 3.0])
    true, false = np.zeros(len(edges) - 1, np.int64), np.zeros(len(edges) - 1, np.int64)
    for heat, boxes, mask in zip(maps, truth, masks):
        height, width = heat.shape
        grey = (heat * 255).astype(np.uint8)[..., None]
        boxes_of, counts, largest = [], [], []
        for threshold in thresholds:
            _, cut = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)
            contours = cv2.findContours(cut, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
            if not len(contours):
                boxes_of.append([0, 0, 0, 0])
                counts.append(1)
                largest.append(0)
                continue
            number = int(np.argmax([cv2.contourArea(c) for c in contours])) if "single" in modes else 0
            for contour in contours if "multi" in modes else contours[number : number + 1]:
                x, y, w, h = cv2.boundingRect(contour)
                boxes_of.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
            counts.append(len(contours) if "multi" in modes else 1)
            largest.append(number if "multi" in modes else 0)
        iou = iou_matrix(np.array(boxes_of), boxes)
        start = 0
        for place, (count, number) in enumerate(zip(counts, largest)):
            own = iou[start : start + count]
            multi[:, place] += own.max() >= levels
            single[:, place] += own[number].max() >= levels
            start += count
        if not pixels:
            continue
        true += np.histogram(heat[mask == 1], edges)[0]
        false += np.histogram(heat[mask == 0], edges)[0]
    return {"single": single, "multi": multi, "true": true, "false": false}


def iou_matrix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    low, high = np.maximum(one[:, None, :2], other[:, :2]), np.minimum(one[:, None, 2:], other[:, 2:])
    both = np.maximum(high - low + 1, 0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(1) for boxes in (one, other)]
    return both / (areas[0][:, None] + areas[1] - both)


def metrics(images: int) -> dict[str, Any]:
    """Seconds a map of both ways, for both kinds of maps."""
    rows = {}
    for kind in KINDS:
        heat, truth, masks = maps_of(kind, 0, REFERENCE)
        arrays = heat.numpy(), truth, masks.numpy()
        start = time.perf_counter()
        theirs = reference(*arrays, ("single", "multi"))
        shared = (time.perf_counter() - start) / REFERENCE
        start = time.perf_counter()
        one, other = reference(*arrays, ("single",)), reference(*arrays, ("multi",), pixels=False)
        apart = (time.perf_counter() - start) / REFERENCE
        assert (one["single"] == theirs["single"]).all() and (other["multi"] == theirs["multi"]).all()
        boxes, pixels = BoxLocalization("wsol", sweep()), PixelLocalization()
        seconds = 0.0
        for first in range(0, images, BATCH):
            if first >= REFERENCE:
                heat, truth, masks = maps_of(kind, first, min(BATCH, images - first))
                part = slice(None)
            else:
                part = slice(first, first + BATCH)
            start = time.perf_counter()
            boxes.update(heat[part], truth[part])
            pixels.update(heat[part], masks[part])
            seconds += time.perf_counter() - start
            if first + BATCH == REFERENCE:
                for name, found in (
                    ("single", boxes.correct),
                    ("multi", boxes.correct_any),
                    ("true", pixels.true),
                    ("false", pixels.false),
                ):
                    assert (found.numpy() == theirs[name]).all(), f"{kind}, {name}: the two ways disagree"
        rows[kind] = {"apart": apart, "shared": shared, "ours": seconds / images, "total": seconds, "images": images}
    return rows


def step_ours(network: BASNetwork, images: Tensor, labels: Tensor) -> Tensor:
    weights = LossWeights(guidance=1.0, area=2.0)
    return total_loss(loss_terms(network.training_output(images, labels), labels, weights), weights)


def step_plain(network: BASNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """As the equations are written down."""
    features = network.features(images)
    class_maps = network.class_maps(features)
    scores = class_maps.mean(dim=(2, 3))
    maps = torch.sigmoid(network.generator(features))
    foreground = torch.stack([maps[image, label] for image, label in enumerate(labels)])[:, None]
    frozen = copy.deepcopy(network.head)
    background = frozen(features.detach() * (1 - foreground)).mean(dim=(2, 3))
    guided = (class_maps * F.avg_pool2d(foreground, 2)).mean(dim=(2, 3))
    ratios = []
    for image, label in enumerate(labels):
        above, below = F.relu(background[image, label]), F.relu(scores[image, label]).detach()
        ratios.append(torch.ones(()) if above > below else above / (below + 1e-8))
    classification, guidance = F.cross_entropy(scores, labels), F.cross_entropy(guided, labels)
    return classification + guidance + torch.stack(ratios).mean() + 2 * foreground.mean()


def measure_step(way: str, batch: int, runs: int) -> dict[str, Any]:
    """For a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = BASNetwork(1000, "resnet50").train()
    images, labels = torch.randn(batch, 3, SIDE, SIDE), torch.arange(batch) * 7
    step, losses, times = {"ours": step_ours, "plain": step_plain}[way], [], []
    for _ in range(runs + 1):
        network.zero_grad()
        start = time.perf_counter()
        loss = step(network, images, labels)
        loss.backward()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return {"losses": losses, "seconds": statistics.median(times[1:]), "best": min(times[1:])}


def training(batch: int, runs: int, about: str) -> None:
    """Both ways in turns, written to results/bas_step.*."""
    rows = {way: in_fresh_process(measure_step, way, batch, runs) for way in ("plain", "ours")}
    first, second = (rows[way].pop("losses") for way in ("plain", "ours"))
    assert np.allclose(first, second, rtol=1e-4), f"the two ways disagree: {first}, {second}"
    plain, ours = rows["plain"], rows["ours"]
    lines = [
        "# A training step of BAS",
        "",
        (
            f"ResNet-50, 1000 classes, {batch} images of {SIDE} x {SIDE}, forward and backward. {about}; median (best) "
            f"of {runs} steps. `python benchmarks/localization.py training` writes this file."
        ),
        "",
        "| | every map, head copied | here | ratio |",
        "| --- | --- | --- | --- |",
        (
            f"| seconds | {plain['seconds']:.2f} ({plain['best']:.2f}) | {ours['seconds']:.2f} ({ours['best']:.2f}) | "
            f"{plain['seconds'] / ours['seconds']:.2f} ({plain['best'] / ours['best']:.2f}) |"
        ),
    ]
    write(RESULTS, "bas_step", {"about": about, "batch": batch, "rows": rows}, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["metrics", "training"], help="default: both")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    about = one_thread(f"OpenCV {cv2.__version__}", f"numpy {np.__version__}")
    if arguments.part != "metrics":
        training(arguments.batch, arguments.runs, about)
    if arguments.part != "training":
        measure_metrics(arguments.images, about)


def measure_metrics(images: int, about: str) -> None:
    """Both ways, written to results/localization_metrics.*."""
    rows = metrics(images)
    lines = [
        "# Localisation metrics",
        "",
        (
            f"MaxBoxAcc, MaxBoxAccV2 and PxAP at 1000 thresholds over {images:,} maps of {SIDE} x {SIDE}, "
            f"counts equal to the reference's on {REFERENCE} of them. {about}. `python benchmarks/localization.py "
            "metrics` writes this file."
        ),
        "",
        "| maps | reference, a run for each, ms a map | reference, shared pass | here | ratios | here, all maps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, row in rows.items():
        lines.append(
            f"| {kind} | {1e3 * row['apart']:.1f} | {1e3 * row['shared']:.1f} | {1e3 * row['ours']:.2f} | "
            f"{row['apart'] / row['ours']:.1f}, {row['shared'] / row['ours']:.1f} | {row['total']:.0f} s |"
        )
    write(RESULTS, "localization_metrics", {"about": about, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
