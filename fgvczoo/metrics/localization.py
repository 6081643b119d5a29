"""Weakly supervised localisation: MaxBoxAcc, MaxBoxAccV2, Top-k and GT-known Loc, PxAP, peak IoU.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020 (arXiv 2001.07437) and TPAMI
(arXiv 2007.04178). All values are shares in [0, 1]; papers print them in percent. B images, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from fgvczoo.errors import FgvczooError
from fgvczoo.metrics.localization_boxes import Dialect, dialect_of, map_boxes

IOU_LEVELS = (0.3, 0.5, 0.7)
GT_KNOWN = 0.5


def sweep(interval: float = 0.001) -> np.ndarray:
    """The thresholds 0, i, 2i, ... below 1: (T,) float64. Raises `FgvczooError` for an interval outside (0, 1]."""
    if not 0 < interval <= 1:
        raise FgvczooError(f"interval={interval}; expected a number in (0, 1]")
    return np.arange(0, 1, interval)


class BoxLocalization(Metric):
    """How well boxes of maps hit the objects.

    Args:
        dialect: a name of `DIALECTS`; the published numbers mix them.
        thresholds: those that are tried; None: 0, 0.001, ... below 1. One value is a fixed threshold.
        num_classes: for dialects whose rates are means over classes.
        iou_levels: of MaxBoxAccV2 and of `loc_30`, `loc_50`, `loc_70`.

    `update` with prepared maps (`prepare_maps`), the ground-truth boxes on them (`truth_boxes`), and where they are
    known the labels and the classifier's scores. The maps are those of the true class: a localisation counts only where
    the class is right, so one map an image serves all of them.

    `compute` gives scalars:
        max_box_acc, max_box_acc_threshold: share of images whose kept box has an IoU of 0.5, at the best threshold. The
            threshold is one for the whole data set.
        max_box_acc_v2: mean over the IoU levels of the share of images of which any box reaches it, each level at its
            own best threshold; max_box_acc_v2_30, ..., and max_box_acc_v2_30_threshold, ... (dialects by area).
        threshold: the one of largest GT-known Loc (or GT-known + Top-1 Loc, as the dialect says), the lowest of equals;
            gt_known_loc, top1_loc, top5_loc, loc_30, ..., and for given thresholds mean_iou, of the kept box, at it.
        images that count; skipped: images without a ground-truth box, which do not.
    Shares are NaN before the first image that counts, and top-k ones without scores.

    Counts and one sum in float64: the order of images and the number of processes change nothing but that sum's last
    digits, memory does not grow with the number of images.
    """

    is_differentiable = False
    full_state_update = False
    correct: Tensor
    correct_any: Tensor
    known: Tensor
    iou: Tensor
    counted: Tensor
    scored: Tensor
    skipped: Tensor

    def __init__(
        self,
        dialect: str | Dialect = "wsol",
        thresholds: Sequence[float] | np.ndarray | None = None,
        num_classes: int = 1,
        iou_levels: Sequence[float] = IOU_LEVELS,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.dialect = dialect_of(dialect)
        self.thresholds = sweep() if thresholds is None else np.asarray(thresholds, np.float64).reshape(-1)
        if not len(self.thresholds) or not ((self.thresholds >= 0) & (self.thresholds < 1)).all():
            raise FgvczooError(f"thresholds={np.asarray(thresholds).tolist()}; expected numbers in [0, 1)")
        if not all(0 < level <= 1 for level in iou_levels):
            raise FgvczooError(f"iou_levels={tuple(iou_levels)}; expected numbers in (0, 1]")
        self.iou_levels = np.asarray(iou_levels, np.float64)
        # IoU below all levels is worth knowing only for its mean: a sweep leaves it out, and saves the cuts of it.
        self.least = 0.0 if thresholds is not None else min(GT_KNOWN, float(self.iou_levels.min()))
        self.rates = num_classes if self.dialect.per_class else 1
        count = len(self.thresholds)
        for name, shape in (
            ("correct", (len(self.iou_levels), count)),
            ("correct_any", (len(self.iou_levels), count)),
            ("known", (3, self.rates, count)),  # GT-known, Top-1, Top-5
            ("counted", (self.rates,)),
            ("scored", (self.rates,)),
            ("skipped", ()),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("iou", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        maps: Tensor | Sequence[Tensor],
        truth: Sequence[np.ndarray | Tensor],
        labels: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Adds B images.

        maps: (B, h, w), or B maps of any sizes, in [0, 1]. truth: B arrays (n, 4). labels: (B,). scores: (B, C), of
        which only the order counts; equal scores rank by class.

        Raises `FgvczooError` when numbers differ, for maps outside [0, 1], and for scores without labels.
        """
        if len(maps) != len(truth):
            raise FgvczooError(f"{len(maps)} maps, boxes of {len(truth)} images; expected as many")
        if labels is None and (scores is not None or self.rates > 1):
            raise FgvczooError("labels are missing; scores, and rates of each class, need them")
        levels = torch.from_numpy(self.iou_levels)[:, None]
        rank = None if scores is None or labels is None else class_ranks(scores, labels)
        for number, (heat, boxes) in enumerate(zip(maps, truth)):
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
            if not len(boxes):
                self.skipped += 1
                continue
            try:
                found = map_boxes(heat, self.thresholds, self.dialect, boxes, self.least)
            except FgvczooError as error:
                raise FgvczooError(f"image {number} of the batch: {error}") from None
            single, every = (torch.from_numpy(values) for values in found.best_iou(boxes))
            self.correct += self._reached(single, levels, self.dialect.strict).to(self.correct)
            self.correct_any += self._reached(every, levels, self.dialect.strict).to(self.correct)
            self.iou += single.to(self.iou)
            row = int(labels[number]) if labels is not None and self.rates > 1 else 0
            self.counted[row] += 1
            self.known[0, row] += self._reached(single, GT_KNOWN, self.dialect.strict).to(self.known)
            if rank is not None:
                self.scored[row] += 1
                hit = self._reached(single, GT_KNOWN, self.dialect.strict_top).to(self.known)
                for place, k in ((1, 1), (2, 5)):
                    if rank[number] < k:
                        self.known[place, row] += hit

    @staticmethod
    def _reached(iou: Tensor, level: Tensor | float, strict: bool) -> Tensor:
        return iou > level if strict else iou >= level

    def rates_by_threshold(self) -> dict[str, Tensor]:
        """GT-known, Top-1 and Top-5 Loc, the shares that reach each IoU level, and (of given thresholds) the mean IoU,
        at every threshold."""
        counts = [self.counted, self.scored, self.scored]
        names = ["gt_known_loc", "top1_loc", "top5_loc"]
        rates = {name: _mean_rate(hits, count) for name, hits, count in zip(names, self.known, counts)}
        images = self.counted.sum()
        for level, hits in zip(self.iou_levels, self.correct):
            rates[f"loc_{round(100 * level)}"] = hits.double() / images
        if not self.least:
            rates["mean_iou"] = self.iou / images
        return rates

    def compute(self) -> dict[str, Tensor]:
        """The shares, their thresholds and the counts."""
        images = self.counted.sum()
        tau = torch.from_numpy(self.thresholds).to(images.device)
        result: dict[str, Tensor] = {}
        rates = self.rates_by_threshold()
        half = int(np.argmin(np.abs(self.iou_levels - GT_KNOWN)))
        if self.iou_levels[half] == GT_KNOWN:
            result["max_box_acc"], result["max_box_acc_threshold"] = _best(self.correct[half] / images.double(), tau)
        if self.dialect.component == "area":
            names = [f"max_box_acc_v2_{round(100 * level)}" for level in self.iou_levels]
            for name, hits in zip(names, self.correct_any):
                result[name], result[f"{name}_threshold"] = _best(hits / images.double(), tau)
            result["max_box_acc_v2"] = torch.stack([result[name] for name in names]).mean()
        watched = rates["gt_known_loc"]
        if self.dialect.by_sum and self.scored.any():
            watched = watched + rates["top1_loc"]
        place = int(torch.argmax(watched))
        result["threshold"] = tau[place]
        result |= {name: values[place] for name, values in rates.items()}
        return result | {"images": images, "skipped": self.skipped}


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes rank before the true one: scores (B, C), labels (B,) -> (B,). Of equal scores the lower class
    ranks first. Raises `FgvczooError` for a label out of range and for scores that are NaN."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise FgvczooError(f"labels from {int(labels.min())} to {int(labels.max())}; expected 0..{scores.shape[1] - 1}")
    if scores.isnan().any():
        raise FgvczooError("scores are NaN; the network has diverged, train it anew")
    labels = labels.to(scores.device)
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & lower)).sum(1)


def _mean_rate(hits: Tensor, counts: Tensor) -> Tensor:
    """Hits (R, T), counts (R,) -> the mean over the R classes that have images (T,)."""
    there = counts > 0
    return (hits[there].double() / counts[there].double()[:, None]).mean(0)


def _best(values: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    place = int(torch.argmax(values))
    return values[place], tau[place]


def pixel_histograms(maps: Tensor, masks: Tensor, interval: float = 0.001) -> tuple[Tensor, Tensor]:
    """Map values of foreground and of background pixels, counted in the bins [0, i), [i, 2i), ..., [1, 2), [2, 3]: two
    int64 (T + 2,).

    maps: (B, h, w) in [0, 1]. masks: (B, h, w), bool, or class indices where 0 is background and 255 is left out.

    Raises `FgvczooError` when shapes differ and for maps that are NaN or outside [0, 1].
    """
    if maps.shape != masks.shape or maps.ndim != 3:
        raise FgvczooError(f"maps {tuple(maps.shape)}, masks {tuple(masks.shape)}; expected both (B, h, w)")
    edges = torch.from_numpy(sweep(interval)).to(maps.device)
    size = len(edges) + 2
    counts = torch.zeros(3 * size, dtype=torch.int64, device=maps.device)
    # Image by image: what one needs stays in the processor's cache.
    for number, (heat, mask) in enumerate(zip(maps, masks.to(maps.device))):
        values = heat.double().flatten()
        if values.numel() and not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
            raise FgvczooError(
                f"map {number} of the batch has values that are NaN or outside [0, 1]; prepare_maps makes others"
            )
        # The bin by division, never too low, then by its edge: a search among the edges takes ten times as long.
        bins = (values / interval + 1e-6).to(torch.int32).clamp_(max=len(edges) - 1)
        bins -= (values < edges[bins]).to(torch.int32)
        bins[values >= 1] = len(edges)
        kind = torch.where(mask == 255, 2, (mask != 0).int()) if mask.dtype != torch.bool else mask
        counts += torch.bincount(bins + size * kind.flatten().to(torch.int32), minlength=3 * size)
    background, foreground, _ = counts.view(3, size)
    return foreground, background


def pixel_average_precision(true: Tensor, false: Tensor) -> Tensor:
    """PxAP of the histograms (K,) of foreground and background pixels: the area under the precision-recall curve over
    all pixels, float64 scalar. Raises `FgvczooError` when there is no foreground pixel at all."""
    hits, wrong = _from_the_top(true, false)
    precision, recall = hits / (hits + wrong), hits / hits[-1]
    # The first point, and those before any pixel, add nothing.
    return ((recall[1:] - recall[:-1]) * precision[1:]).nansum()


def peak_iou(true: Tensor, false: Tensor, interval: float = 0.001) -> tuple[Tensor, Tensor]:
    """The largest IoU of {map >= threshold} and the foreground, over all pixels of the data set, and its threshold."""
    hits, wrong = _from_the_top(true, false)
    iou, place = (hits / (wrong + hits[-1])).flip(0).max(0)
    return iou, (place * interval).double().clamp(max=1)


def _from_the_top(true: Tensor, false: Tensor) -> tuple[Tensor, Tensor]:
    if not true.sum():
        raise FgvczooError("no mask has a foreground pixel; PxAP needs objects")
    hits, wrong = (histogram.flip(0).cumsum(0).double() for histogram in (true, false))
    return hits, wrong


class PixelLocalization(Metric):
    """PxAP and peak IoU: how well maps separate the pixels of objects from the others.

    `update` with prepared maps (B, h, w) in [0, 1] and masks of that size, see `pixel_histograms`. `compute` gives
    scalars: pxap, peak_iou, peak_iou_threshold, images. One curve over the pixels of all images: large objects weigh
    more. Counts only: exact over any number of processes, memory does not grow. Masks without foreground count.
    """

    is_differentiable = False
    full_state_update = False
    true: Tensor
    false: Tensor
    images: Tensor

    def __init__(self, interval: float = 0.001, **options: Any) -> None:
        super().__init__(**options)
        self.interval = interval
        for name in ("true", "false"):
            state = torch.zeros(len(sweep(interval)) + 2, dtype=torch.int64)
            self.add_state(name, state, dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Adds a batch; errors as `pixel_histograms`."""
        true, false = pixel_histograms(maps, masks, self.interval)
        self.true += true.to(self.true.device)
        self.false += false.to(self.false.device)
        self.images += len(maps)

    def compute(self) -> dict[str, Tensor]:
        """The values over all images. Raises `FgvczooError` when no mask had a foreground pixel."""
        iou, threshold = peak_iou(self.true, self.false, self.interval)
        return {
            "pxap": pixel_average_precision(self.true, self.false),
            "peak_iou": iou,
            "peak_iou_threshold": threshold,
            "images": self.images,
        }
