"""Geometric maps that augmentation protocols draw, as transforms of albumentations."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np

IGNORE = 255  # mask value of pixels that the original picture does not have


@cache
def import_albumentations() -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask a server for its newest version
    import albumentations

    return albumentations


def draw_rotation(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Rotation by up to 15 whole degrees; the largest upright rectangle without empty corners fills the picture."""
    degrees = rng.choice((rng.randint(-15, 0), rng.randint(0, 15)))
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    inner_w, inner_h = _largest_upright(width, height, abs(sine), cosine)
    rotate = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return (
        _shift(width / 2, height / 2)
        @ np.diag([width / inner_w, height / inner_h, 1])
        @ rotate
        @ _shift(-width / 2, -height / 2)
    )


def _largest_upright(width: float, height: float, sine: float, cosine: float) -> tuple[float, float]:
    """Width and height of the largest upright rectangle inside a turned one; for angles of at most 45 degrees."""
    long, short = max(width, height), min(width, height)
    if short <= 2 * sine * cosine * long:  # two corners lie on the long sides, the others anywhere between
        half = short / 2
        return (half / sine, half / cosine) if width >= height else (half / cosine, half / sine)
    double = cosine * cosine - sine * sine
    return (width * cosine - height * sine) / double, (height * cosine - width * sine) / double


def draw_turn(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Rotation about the middle by up to 30 degrees, as large as before."""
    degrees = math.radians(rng.uniform(-30, 30))
    sine, cosine = math.sin(degrees), math.cos(degrees)
    rotate = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return _shift(width / 2, height / 2) @ rotate @ _shift(-width / 2, -height / 2)


def draw_skew(rng: random.Random, height: int, width: int) -> np.ndarray:
    """A perspective tilt: one side, or one corner, moves out of the picture by up to a fifth of the longer side."""
    amount = rng.randint(1, math.ceil(0.2 * max(width, height)))
    kind = rng.choice(("tilt", "left or right", "top or bottom", "corner"))
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    outward = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)
    moved = np.zeros((4, 2), np.float32)
    if kind == "corner":
        corner, axis = rng.randrange(4), rng.randrange(2)
        moved[corner, axis] = amount
    else:  # the two ends of a side move apart along that side
        sides = {"left": ([0, 3], 1), "right": ([1, 2], 1), "top": ([0, 1], 0), "bottom": ([2, 3], 0)}
        names = list(sides) if kind == "tilt" else kind.split(" or ")
        ends, axis = sides[rng.choice(names)]
        moved[ends, axis] = amount
    return cv2.getPerspectiveTransform(corners, corners + outward * moved)


def draw_shear(rng: random.Random, height: int, width: int) -> np.ndarray:
    """Shear by up to 10 whole degrees along x or y; the margin without pixels is cut and the rest fills the picture."""
    slope = math.tan(math.radians(rng.randint(-10, 10)))
    along, across = (width, height) if (horizontal := rng.random() < 0.5) else (height, width)
    slope = max(
        min(slope, along / (2 * across)), -along / (2 * across)
    )  # a very narrow picture keeps half of its width
    lost = slope * across
    stretch = along / (along - abs(lost))
    # along' = (along + slope * across - margin) * stretch
    row = np.array([stretch, slope * stretch, -max(lost, 0) * stretch])
    if horizontal:
        return np.array([row, [0, 1, 0], [0, 0, 1]])
    return np.array([[1, 0, 0], row[[1, 0, 2]], [0, 0, 1]])


def draw_perspective(distortion: float, rng: random.Random, height: int, width: int) -> np.ndarray:
    """Every corner moves inward by up to this share of half of the picture's width and height."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    inward = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
    most = distortion / 2 * np.array([width, height])
    moves = np.array([[rng.uniform(0, most[0]), rng.uniform(0, most[1])] for _ in corners], np.float32)
    return cv2.getPerspectiveTransform(corners, corners + inward * moves)


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def warp(
    draw: Callable[[random.Random, int, int], np.ndarray], border: int = cv2.BORDER_REPLICATE, p: float = 1
) -> Any:
    """An albumentations transform that moves the picture by a drawn 3 x 3 matrix, at its own size, bicubic.

    draw: (random numbers, height, width) -> matrix from old to new continuous coordinates. border: of OpenCV, for what
    lies outside; by default rounding alone asks for it. p: how often it is done at all.
    """

    perspective: Any = import_albumentations().Perspective

    class Warp(perspective):
        def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
            height, width = params["shape"][:2]
            matrix = _shift(-0.5, -0.5) @ draw(self.py_random, height, width) @ _shift(0.5, 0.5)
            return {"matrix": matrix, "max_height": height, "max_width": width}

    return Warp(interpolation=cv2.INTER_CUBIC, border_mode=border, fill=0, fill_mask=IGNORE, p=p)


def elastic(grid: int, magnitude: int) -> Any:
    """An albumentations transform that moves the inner nodes of a grid by up to `magnitude` whole pixels in x and y.

    albumentations' `GridElasticDeform` warps the whole picture once for each cell: 240 ms against 5.
    """
    albumentations = import_albumentations()
    dual_transform: Any = albumentations.DualTransform

    class Elastic(dual_transform):
        _targets = (albumentations.core.type_definitions.Targets.IMAGE,)

        @property
        def targets(self) -> dict[str, Any]:
            return {"image": self.apply, "mask": self.apply_to_mask, "keypoints": self.apply_to_keypoints}

        def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
            moves = np.zeros((grid + 1, grid + 1, 2))
            moves[1:-1, 1:-1] = self.random_generator.integers(
                -magnitude, magnitude, (grid - 1, grid - 1, 2), endpoint=True
            )
            return {"moves": moves}

        def apply(self, img: np.ndarray, moves: np.ndarray, flags: int = cv2.INTER_CUBIC, **_: Any) -> np.ndarray:
            height, width = img.shape[:2]
            rows, columns = _hat(np.arange(height) + 0.5, height, grid), _hat(np.arange(width) + 0.5, width, grid)
            x, y = (rows @ moves[..., axis] @ columns.T for axis in (0, 1))
            x, y = x + np.arange(width), y + np.arange(height)[:, None]
            return cv2.remap(img, x.astype(np.float32), y.astype(np.float32), flags, borderMode=cv2.BORDER_REPLICATE)

        def apply_to_mask(self, mask: np.ndarray, moves: np.ndarray, **_: Any) -> np.ndarray:
            return self.apply(mask, moves, cv2.INTER_NEAREST)

        def apply_to_keypoints(self, keypoints: np.ndarray, moves: np.ndarray, **params: Any) -> np.ndarray:
            # The picture is read at target + move(target): the target of a source is found by iteration.
            height, width = params["shape"][:2]
            source = keypoints[:, :2] + 0.5
            target = source
            for _ in range(30):
                rows, columns = _hat(target[:, 1], height, grid), _hat(target[:, 0], width, grid)
                target = source - np.einsum("nr,rca,nc->na", rows, moves, columns)
            return np.concatenate([target - 0.5, keypoints[:, 2:]], axis=1)

    return Elastic(p=1)


def _hat(positions: np.ndarray, length: int, grid: int) -> np.ndarray:
    """(n,) positions in 0..length -> (n, grid + 1) weights of linear interpolation between the nodes of a grid."""
    places = np.clip(positions * grid / length, 0, grid)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(grid + 1)))
