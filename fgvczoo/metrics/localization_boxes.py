"""From a localisation map to boxes, in the dialects that papers use.

Boxes are x0, y0, x1, y1 in pixels of the map; (h, w) is its height and width. The definitions are those of Choe et al.,
"Evaluating Weakly Supervised Object Localization Methods Right" (CVPR 2020, arXiv 2001.07437), the table of dialects is
in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.metrics.heatmaps import is_constant


@dataclass(frozen=True)
class Dialect:
    """How a family of papers goes from maps to a number. See docs/metrics.md for the table.

    interpolation: of the model's map to the evaluated size, "bicubic" or "bilinear".
    normalize_first: the min-max normalisation comes before the resizing, not after.
    eps: added to the range when normalising.
    quantized: the map is cut to 8 bits and the threshold is a share of its maximum; else it is a value of the map.
    component: which one is kept: of the largest "area" of the polygon through its pixels' centres (holes are filled,
        lines have none), or of the most "pixels".
    end: of boxes; "last" is one past the last pixel, but no more than w - 1, "past" is one past it.
    empty: the box where nothing is above the threshold.
    strict, strict_top: an IoU of exactly the level is too little, for GT-known Loc and for Top-k Loc.
    whole_truth: ground-truth boxes are cut to whole pixels. clip_truth: they are clipped to the evaluated picture.
    per_class: rates are means of the classes' rates.
    by_sum: of several thresholds, the one with the largest GT-known + Top-1 Loc is reported, not GT-known alone.
    """

    interpolation: str = "bilinear"
    normalize_first: bool = False
    eps: float = 0.0
    quantized: bool = False
    component: str = "area"
    end: str = "past"
    empty: str = "image"
    strict: bool = False
    strict_top: bool = False
    whole_truth: bool = True
    clip_truth: bool = True
    per_class: bool = False
    by_sum: bool = False

    def empty_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The box of a map without foreground."""
        return {"zero": (0, 0, 0, 0), "unit": (0, 0, 1, 1), "image": (0, 0, width, height)}[self.empty]


DIALECTS: dict[str, Dialect] = {
    # Choe et al. 2020: the community's protocol.
    "wsol": Dialect(interpolation="bicubic", quantized=True, end="last", empty="zero", clip_truth=False),
    # BAS, IJCV 2023.
    "bas": Dialect(normalize_first=True, eps=1e-5, component="pixels", by_sum=True),
    # BAS, CVPR 2022.
    "bas-conference": Dialect(
        normalize_first=True,
        component="pixels",
        strict=True,
        strict_top=True,
        whole_truth=False,
        per_class=True,
        by_sum=True,
    ),
    # TS-CAM, GenPromp.
    "genpromp": Dialect(quantized=True, empty="unit", strict_top=True),
}


def dialect_of(name: str | Dialect) -> Dialect:
    """A dialect by its name. Raises `FgvczooError` for an unknown one."""
    if isinstance(name, Dialect):
        return name
    if name not in DIALECTS:
        raise FgvczooError(f"dialect={name!r}; expected one of {', '.join(DIALECTS)}{did_you_mean(name, DIALECTS)}")
    return DIALECTS[name]


def prepare_maps(maps: Tensor, size: tuple[int, int], dialect: str | Dialect = "wsol") -> Tensor:
    """A model's maps (B, H, W), of any range, as maps in [0, 1] of the evaluated size: float64 (B, h, w) on the CPU.

    A constant map has no foreground: it becomes 0 everywhere. Raises `FgvczooError` for another shape and for maps that
    are NaN or infinite.
    """
    rules = dialect_of(dialect)
    if maps.ndim != 3:
        raise FgvczooError(f"prepare_maps: maps {tuple(maps.shape)}; expected (B, H, W)")
    if not maps.isfinite().all():
        wrong = int(torch.nonzero(~maps.isfinite().flatten(1).all(dim=1))[0])
        raise FgvczooError(f"prepare_maps: map {wrong} is NaN or infinite; the network has diverged, train it anew")
    # One by one in float32 as the papers' image libraries do; the normalisation in float64.
    maps = maps.detach().cpu()
    if rules.normalize_first:
        heat = _resize(_normalize(maps.double(), rules.eps).float(), size, rules.interpolation).clamp(0, 1).double()
    else:
        heat = _normalize(_resize(maps.float(), size, rules.interpolation).double(), rules.eps)
    if not len(maps):
        return heat
    # Resizing leaves rounding on a constant map, which must not be stretched to a range of its own.
    return heat.masked_fill(is_constant(maps)[:, None, None], 0)


def _resize(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=size, mode=mode, align_corners=False)[:, 0]


def _normalize(maps: Tensor, eps: float) -> Tensor:
    if not maps.numel():
        return maps
    low, high = (t[:, None, None] for t in maps.flatten(1).aminmax(dim=1))
    span = high - low + eps
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1), 0)


def truth_boxes(
    boxes: np.ndarray,
    original: tuple[int, int],
    size: tuple[int, int],
    dialect: str | Dialect = "wsol",
    resized: tuple[int, int] | None = None,
) -> np.ndarray:
    """Ground-truth boxes (n, 4) of the original picture on the evaluated one: float64 (m, 4).

    original: height, width of the picture. size: of the evaluated one. resized: what the picture was resized to before
    the middle of `size` was cut out of it; None: it was not cut.

    A box that has nothing inside of the evaluated picture is left out: m may be smaller than n, and 0. Dialects that do
    not clip keep all. Raises `FgvczooError` for a box that ends before it begins.
    """
    rules = dialect_of(dialect)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if (boxes[:, 2:] < boxes[:, :2]).any() or not np.isfinite(boxes).all():
        wrong = boxes[(boxes[:, 2:] < boxes[:, :2]).any(axis=1) | ~np.isfinite(boxes).all(axis=1)][0]
        raise FgvczooError(f"box {wrong.tolist()}; expected x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
    goal = resized or size
    scale = np.array([goal[1], goal[0]] * 2, np.float64)
    # Product first: where the quotient is a whole number it comes out as one.
    moved = boxes * scale / np.array([original[1], original[0]] * 2, np.float64)
    moved -= np.array([(goal[1] - size[1]) // 2, (goal[0] - size[0]) // 2] * 2)
    if rules.whole_truth:
        moved = np.trunc(moved)
    if rules.clip_truth:
        end = np.array([size[1] - 1, size[0] - 1]) if rules.whole_truth else np.array([size[1], size[0]])
        moved = np.concatenate([np.maximum(moved[:, :2], 0), np.minimum(moved[:, 2:], end)], axis=1)
        moved = moved[(moved[:, 2:] >= moved[:, :2]).all(axis=1)]
    return moved


def box_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of boxes (n, 4) and (m, 4) whose ends are inclusive pixels: float64 (n, m). Without a union it is 0."""
    one, other = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (one, other))
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    both = np.prod(np.maximum(high - low + 1, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - both
    iou: np.ndarray = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return iou


@dataclass(frozen=True)
class MapBoxes:
    """The boxes of one map at T thresholds. Equal cuts are computed once: `cut` (T,) says which of L is whose.

    single: (L, 4) the box of the kept component. all: (N, 4) of every component, `level` (N,) the cut that it belongs
    to, ascending; in dialects by area the borders of holes count as components.
    """

    cut: np.ndarray
    single: np.ndarray
    all: np.ndarray
    level: np.ndarray

    def at(self, place: int) -> np.ndarray:
        """The kept box at threshold number `place`: (4,)."""
        box: np.ndarray = self.single[self.cut[place]]
        return box

    def all_at(self, place: int) -> np.ndarray:
        """All boxes at threshold number `place`: (n, 4), at least one."""
        boxes: np.ndarray = self.all[self.level == self.cut[place]]
        return boxes

    def best_iou(self, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best IoU with any of the ground-truth boxes (n, 4): of the kept box, of any box; (T,) each."""
        single = box_iou(self.single, truth).max(axis=1)
        starts = np.searchsorted(self.level, np.arange(len(self.single)))
        every = np.maximum.reduceat(box_iou(self.all, truth).max(axis=1), starts)
        return single[self.cut], every[self.cut]


def map_boxes(
    heat: np.ndarray | Tensor,
    thresholds: Sequence[float] | np.ndarray,
    dialect: str | Dialect = "wsol",
    truth: np.ndarray | None = None,
    least: float = 0.0,
) -> MapBoxes:
    """Boxes of one map (h, w) in [0, 1] at every threshold.

    truth, least: cuts of which no box can have an IoU of `least` with any of these boxes (n, 4) are not computed; their
        box has no area.

    Foreground is what is strictly above: in quantised dialects trunc(255 map) > trunc(tau * its maximum), so that there
    are at most 256 cuts whatever the number of thresholds; in the others map > tau. Components are 8-connected.

    Ties: of equal polygon areas the component whose first pixel is lowest, then rightmost; of equally many pixels the
    first in raster order. Raises `FgvczooError` for another shape, NaN, and values outside [0, 1].
    """
    rules = dialect_of(dialect)
    values = heat.detach().cpu().numpy() if isinstance(heat, Tensor) else np.asarray(heat)
    if values.ndim != 2 or not values.size:
        raise FgvczooError(f"map_boxes: a map {values.shape}; expected (h, w)")
    if not (values.min() >= 0 and values.max() <= 1):
        raise FgvczooError(
            f"map_boxes: values from {values.min():g} to {values.max():g}; expected a map in [0, 1], as prepare_maps"
            " gives it"
        )
    tau = np.asarray(thresholds, np.float64)
    if rules.quantized:
        pixels = (255 * values.astype(np.float64)).astype(np.uint8)
        cuts, which = np.unique((tau * int(pixels.max())).astype(np.int64), return_inverse=True)
    else:
        pixels = np.ascontiguousarray(values, np.float64)
        cuts, which = np.unique(tau, return_inverse=True)
    find = _by_area if rules.component == "area" else _by_pixels
    height, width = pixels.shape
    windows = _windows(pixels, cuts)
    top, bottom, left, right = windows.T
    empty = top >= bottom
    searched = ~empty
    if least > 0 and truth is not None:
        searched &= _may_reach(windows, truth, least)
    alone = searched & _alone(np.asarray(values, np.float64), pixels, cuts, windows)
    searched &= ~alone
    rectangles: list[Rectangle] = []
    counts, kept = np.ones(len(cuts), np.int64), np.zeros(len(cuts), np.int64)
    numbers = np.flatnonzero(searched)
    for number, (y0, y1, x0, x1), cut in zip(numbers.tolist(), windows[numbers].tolist(), cuts[numbers].tolist()):
        found, kept[number] = find(pixels[y0:y1, x0:x1], cut)
        counts[number] = len(found)
        rectangles += found
    level = np.repeat(np.arange(len(cuts)), counts)
    boxes = np.empty((len(level), 4), np.int64)
    boxes[empty[level]] = rules.empty_box(height, width)
    boxes[(~empty & ~searched)[level]] = _NOWHERE
    inside = np.empty((len(level), 4), np.int64)  # x, y, width, height in the window
    inside[alone[level]] = np.stack([np.zeros_like(left), np.zeros_like(top), right - left, bottom - top], 1)[alone]
    inside[searched[level]] = np.fromiter(chain.from_iterable(rectangles), np.int64, 4 * len(rectangles)).reshape(-1, 4)
    own = (searched | alone)[level]
    x, y, w, h = inside[own].T
    x, y = x + left[level[own]], y + top[level[own]]
    end_x, end_y = (width - 1, height - 1) if rules.end == "last" else (width, height)
    boxes[own] = np.stack([x, y, np.minimum(x + w, end_x), np.minimum(y + h, end_y)], axis=1)
    return MapBoxes(which.reshape(-1), boxes[np.cumsum(counts) - counts + kept], boxes, level)


_NOWHERE = (-1, -1, -2, -2)
Rectangle = Sequence[int]  # x, y, width, height


def _windows(pixels: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """(L, 4) top, bottom, left, right of the smallest window that holds all that is above each cut; components outside
    of it do not exist, so only it is searched."""
    found = []
    for highest in (pixels.max(axis=1), pixels.max(axis=0)):
        before = np.searchsorted(np.maximum.accumulate(highest), cuts, side="right")
        after = np.searchsorted(np.maximum.accumulate(highest[::-1]), cuts, side="right")
        found += [before, len(highest) - after]
    return np.stack(found, axis=1)


def _alone(values: np.ndarray, pixels: np.ndarray, cuts: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Which cuts, ascending, certainly leave one component without holes, whose rectangle is the window: (L,) bool.

    Every component has a peak, a pixel with no higher one around it; every hole a pit, with no lower one beside it.
    Pixels of a plateau count as both, so both are looked for in the map (values) before it is quantised (pixels).
    """
    peaks = (values == cv2.dilate(values, _AROUND)).view(np.uint8)
    plateaus, _ = cv2.findContours(peaks, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    heights = sorted(pixels[plateau[0, 0, 1], plateau[0, 0, 0]] for plateau in plateaus)
    single: np.ndarray = cuts >= heights[-2] if len(heights) > 1 else np.ones(len(cuts), bool)
    if not single.any():
        return single
    top, bottom, left, right = windows[int(np.argmax(single))].tolist()
    rows, columns = np.nonzero((values == cv2.erode(values, _BESIDE))[top:bottom, left:right])
    rows, columns = rows + top, columns + left
    top, bottom, left, right = windows[single].T[:, :, None]
    pits = (pixels[rows, columns] <= cuts[single, None]) & (rows > top) & (rows < bottom - 1)
    single[single] = ~(pits & (columns > left) & (columns < right - 1)).any(axis=1)
    return single


_AROUND = np.ones((3, 3), np.uint8)
_BESIDE = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)


def _may_reach(windows: np.ndarray, truth: np.ndarray, least: float) -> np.ndarray:
    """Whether a box inside of each window (L, 4) can have this IoU with one of the boxes (n, 4): (L,)."""
    top, bottom, left, right = windows.T[:, :, None]
    x0, y0, x1, y1 = np.asarray(truth, np.float64).reshape(-1, 4).T
    # Ends of boxes are one past the last pixel, and inclusive.
    across = np.maximum(np.minimum(x1, right) - np.maximum(x0, left) + 1, 0)
    down = np.maximum(np.minimum(y1, bottom) - np.maximum(y0, top) + 1, 0)
    possible: np.ndarray = (across * down / ((x1 - x0 + 1) * (y1 - y0 + 1)) >= least).any(axis=1)
    return possible


def _by_area(pixels: np.ndarray, cut: float) -> tuple[list[Rectangle], int]:
    """Every contour's rectangle, and which of them encloses the largest polygon."""
    _, binary = cv2.threshold(pixels, cut, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(binary, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) == 1:
        return [cv2.boundingRect(contours[0])], 0
    rectangles = [cv2.boundingRect(contour) for contour in contours]
    largest, tied = -1.0, [0]
    for number, (_, _, w, h) in enumerate(rectangles):
        if (w - 1) * (h - 1) < largest:  # the most that its polygon can have
            continue
        area = cv2.contourArea(contours[number])
        if area > largest:
            largest, tied = area, [number]
        elif area == largest:
            tied.append(number)
    return rectangles, max(tied, key=lambda number: tuple(contours[number][0, 0, ::-1]))


def _by_pixels(pixels: np.ndarray, cut: float) -> tuple[list[Rectangle], int]:
    """Every component's rectangle, and which of them has the most pixels."""
    binary = (pixels > cut).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    counts = stats[1:, cv2.CC_STAT_AREA]
    tied = np.flatnonzero(counts == counts.max())
    if len(tied) > 1:  # labels do not follow the raster order to the pixel
        flat = labels.ravel()
        tied = tied[[int(np.argmin([np.argmax(flat == number + 1) for number in tied]))]]
    return stats[1:, :4].tolist(), int(tied[0])
