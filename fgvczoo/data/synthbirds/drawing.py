"""A bird in its scene: composed from (seed, class, index), traced into layers, painted, annotated.

Canonical coordinates are those of a bird that faces right, x to the right and y down, one unit being half the length
of its body. A scene places them in the picture by one affine map. Pixel coordinates count from the left and upper
edge of the picture, so pixel i covers i to i + 1.
"""

from __future__ import annotations

import colorsys
import itertools
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from fgvczoo.data.synthbirds.genotypes import FACTORS, Genotype, genotypes
from fgvczoo.data.synthbirds.sizes import Size, as_size, check_seed
from fgvczoo.data.synthbirds.streams import Stream, generator
from fgvczoo.errors import FgvczooError, did_you_mean

Color = tuple[int, int, int]
PALETTE: dict[str, Color] = {
    "red": (205, 35, 35),
    "yellow": (235, 200, 40),
    "black": (25, 25, 25),
    "blue": (45, 85, 205),
    "pink": (235, 130, 165),
    "white": (245, 245, 245),
}
OVERSAMPLING = 2
MARGIN = 2.0  # pixels between the bird and the frame


class Layer(IntEnum):
    """What a point of the picture shows; a later layer covers an earlier one."""

    BACKGROUND = 0
    TAIL = 1
    LEGS = 2
    BODY = 3
    BELLY = 4
    BELLY_MARK = 5
    WING = 6
    WING_MARK = 7
    BEAK = 8
    HEAD = 9
    CAP = 10
    EYE_RING = 11
    EYE = 12
    OCCLUDER = 13


BIRD = tuple(range(Layer.TAIL, Layer.OCCLUDER))
# What can be left out of a drawing, or asked for as a region.
PARTS: dict[str, tuple[int, ...]] = {
    "beak": (Layer.BEAK,),
    "eye": (Layer.EYE_RING, Layer.EYE),
    "cap": (Layer.CAP,),
    "wing": (Layer.WING, Layer.WING_MARK),
    "belly": (Layer.BELLY, Layer.BELLY_MARK),
    "tail": (Layer.TAIL,),
    "legs": (Layer.LEGS,),
    "bird": BIRD,
}

CUB_PART_NAMES = (
    *("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape"),
    *("right eye", "right leg", "right wing", "tail", "throat"),
)
# Where CUB's parts lie on a bird that faces right; of the paired parts the near one is the right one. NaN = far side.
_ANCHORS = np.array(
    [
        *[(-0.10, -0.48), (1.58, -0.42), (0.35, 0.40), (0.80, 0.10), (1.00, -0.78), (1.30, -0.65)],
        *[(np.nan, np.nan), (-0.03, 0.80), (np.nan, np.nan), (0.68, -0.50)],
        *[(1.14, -0.44), (0.27, 0.80), (-0.32, -0.12), (-1.05, -0.08), (1.12, -0.14)],
    ]
)
_MIRRORED = np.array([0, 1, 2, 3, 4, 5, 10, 11, 12, 9, 6, 7, 8, 13, 14])  # left and right parts exchanged


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0, points: int = 36) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    u, v, c, s = rx * np.cos(angle), ry * np.sin(angle), np.cos(tilt), np.sin(tilt)
    return np.stack([x + u * c - v * s, y + u * s + v * c], axis=1)


def _arc(x: float, y: float, radius: float, start: float, stop: float) -> np.ndarray:
    angle = np.radians(np.linspace(start, stop, 16))
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _leg(x: float) -> np.ndarray:
    return np.array(
        [(x - 0.05, 0.45), (x + 0.05, 0.45), (x + 0.05, 1.04), (x + 0.27, 1.06), (x + 0.27, 1.14), (x - 0.05, 1.14)]
    )


_TAILS = {
    "square": [(-0.75, -0.18), (-1.95, -0.38), (-1.95, 0.22), (-0.75, 0.16)],
    "forked": [
        (-0.75, -0.18),
        (-1.95, -0.58),
        (-1.82, -0.30),
        (-1.22, -0.08),
        (-1.82, 0.14),
        (-1.95, 0.42),
        (-0.75, 0.16),
    ],
    "pointed": [(-0.75, -0.20), (-1.25, -0.24), (-1.95, -0.08), (-1.25, 0.08), (-0.75, 0.18)],
}
_BEAKS = {
    "cone": [(1.26, -0.78), (1.80, -0.42), (1.26, -0.08)],
    "dagger": [(1.36, -0.52), (1.98, -0.43), (1.98, -0.40), (1.36, -0.32)],
    "hooked": [(1.32, -0.60), (1.72, -0.60), (1.94, -0.40), (1.98, 0.18), (1.80, -0.08), (1.66, -0.28), (1.32, -0.30)],
}
_WING_TILT = 0.12
_WING_MARKS = {
    "plain": [],
    "bars": [
        np.array([(x - 0.05, -0.12 - h), (x + 0.05, -0.12 - h), (x + 0.05, -0.12 + h), (x - 0.05, -0.12 + h)])
        for x, h in ((-0.74, 0.18), (-0.53, 0.25), (-0.32, 0.27), (-0.11, 0.25), (0.10, 0.18))
    ],
    "spots": [
        _ellipse(x, y, 0.07, 0.07, points=8)
        for x, y in (
            *((-0.78, -0.15), (-0.55, -0.28), (-0.55, -0.04), (-0.32, -0.17)),
            *((-0.30, 0.08), (-0.08, -0.27), (-0.07, -0.02), (0.14, -0.12)),
        )
    ],
}
_BELLY_MARKS = {
    "plain": [],
    "streaks": [
        np.array([(x - 0.025, y - h), (x + 0.025, y - h), (x + 0.025, y + h), (x - 0.025, y + h)])
        for x, y, h in (
            *((-0.27, 0.36, 0.07), (-0.10, 0.38, 0.09), (0.07, 0.38, 0.11), (0.24, 0.34, 0.16)),
            *((0.41, 0.28, 0.18), (0.58, 0.24, 0.18), (0.74, 0.20, 0.11)),
        )
    ],
    "spots": [
        _ellipse(x, y, 0.06, 0.06, points=8)
        for x, y in (
            *((-0.22, 0.38), (0.00, 0.43), (0.17, 0.31), (0.30, 0.45)),
            *((0.39, 0.22), (0.50, 0.36), (0.60, 0.15), (0.71, 0.27)),
        )
    ],
}


@lru_cache(maxsize=1024)
def _anatomy(genotype: Genotype) -> tuple[tuple[Layer, ...], np.ndarray, np.ndarray]:
    """The polygons of a bird in painting order: their layers, all their points (n, 2), where each ends.

    Every genotype has a cap and an eye ring: those that do not show take the colour of the head, and lie within it, so
    that a part is a region of the picture whether or not it can be seen.
    """
    cap_radius = 0.38 if genotype.cap == "none" else 0.44
    polygons: list[tuple[Layer, np.ndarray]] = [
        (Layer.TAIL, np.array(_TAILS[genotype.tail])),
        (Layer.LEGS, _leg(-0.03)),
        (Layer.LEGS, _leg(0.27)),
        (Layer.BODY, _ellipse(0, 0, 1.0, 0.58)),
        (Layer.BELLY, _ellipse(0.22, 0.19, 0.68, 0.36, -0.12)),
        *((Layer.BELLY_MARK, mark) for mark in _BELLY_MARKS[genotype.belly]),
        (Layer.WING, _ellipse(-0.32, -0.12, 0.66, 0.33, _WING_TILT)),
        *((Layer.WING_MARK, mark) for mark in _WING_MARKS[genotype.wing]),
        (Layer.BEAK, np.array(_BEAKS[genotype.beak_shape])),
        (Layer.HEAD, _ellipse(1.02, -0.45, 0.42, 0.42)),
        (Layer.CAP, _arc(1.02, -0.45, cap_radius, 202, 338)),
        (Layer.EYE_RING, _ellipse(1.14, -0.44, 0.17, 0.17, points=20)),
        (Layer.EYE, _ellipse(1.14, -0.44, 0.08, 0.08, points=12)),
    ]
    points = np.concatenate([polygon for _, polygon in polygons])
    return tuple(layer for layer, _ in polygons), points, np.cumsum([len(polygon) for _, polygon in polygons])


@lru_cache(maxsize=1)
def _reach() -> np.ndarray:
    """The outer points of all genotypes together (n, 2): a bird's place in the frame must not tell its class."""
    shapes = [_TAILS[tail] for tail in FACTORS["tail"]] + [_BEAKS[beak] for beak in FACTORS["beak_shape"]]
    outline = [_leg(-0.03), _leg(0.27), _ellipse(0, 0, 1.0, 0.58), _arc(1.02, -0.45, 0.44, 180, 360)]
    return np.concatenate([np.array(shape) for shape in shapes] + outline)


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything about an image that its annotations depend on.

    width, height: in pixels.
    genotype: what the bird looks like.
    flipped: whether it faces left.
    matrix, offset: canonical coordinates c lie at pixel coordinates `matrix @ c + offset`, (2, 2) and (2,).
    body: hue, saturation and value of the body, each in 0..1.
    occluder: the corners (n, 2) of the blob before the bird, in pixels, or none.
    occluder_color: its colour.
    """

    width: int
    height: int
    genotype: Genotype
    flipped: bool
    matrix: np.ndarray
    offset: np.ndarray
    body: tuple[float, float, float]
    occluder: np.ndarray | None
    occluder_color: Color


def compose(genotype: Genotype, size: Size, seed: int, class_id: int, index: int) -> Scene:
    """Draws the nuisances of one image; none of them depends on the class."""
    rng = generator(Stream.POSE, seed, class_id, index)
    width, height = (int(side) for side in rng.integers(size.min_side, size.max_side + 1, 2))
    unit = rng.uniform(0.15, 0.225) * min(width, height)
    angle = np.radians(rng.uniform(-18, 18))
    flipped = bool(rng.random() < 0.5)
    aspect = np.sqrt(rng.uniform(0.92, 1.08))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = unit * turn @ np.diag([-aspect if flipped else aspect, 1 / aspect])
    reach = _reach() @ matrix.T
    low, high = reach.min(axis=0), reach.max(axis=0)
    room = np.array([width, height]) - 2 * MARGIN
    shrink = min(1.0, *(room / (high - low)))
    matrix, low, high = matrix * shrink, low * shrink, high * shrink
    offset = MARGIN - low + rng.random(2) * (room - (high - low))
    body = (rng.random(), rng.uniform(0.10, 0.45), rng.uniform(0.42, 0.78))

    rng = generator(Stream.OCCLUDER, seed, class_id, index)
    occluder = None
    occluder_color = _clutter_colors(rng, 1)[0]
    if rng.random() < 0.15:
        seen = _ANCHORS[~np.isnan(_ANCHORS[:, 0])]
        center = matrix @ (seen[rng.integers(len(seen))] + rng.normal(0, 0.1, 2)) + offset
        angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        radii = unit * shrink * rng.uniform(0.25, 0.45) * rng.uniform(0.75, 1.25, 12)
        occluder = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Scene(width, height, genotype, flipped, matrix, offset, body, occluder, occluder_color)


def _clutter_colors(rng: np.random.Generator, count: int) -> list[Color]:
    """Three quarters from the palette of the parts: a colour in the picture must not tell a colour of the bird."""
    free = rng.integers(20, 246, (count, 3))
    picked = np.array(list(PALETTE.values()))[rng.integers(len(PALETTE), size=count)]
    return [tuple(color) for color in np.where(rng.random((count, 1)) < 0.75, picked, free).tolist()]


def trace(scene: Scene, left_out: tuple[int, ...] = (), *, occluded: bool = True) -> Image.Image:
    """What each point shows, as values of `Layer` in a grey picture of `OVERSAMPLING` times the size."""
    picture = Image.new("L", (OVERSAMPLING * scene.width, OVERSAMPLING * scene.height))
    pencil = ImageDraw.Draw(picture)
    layers, points, ends = _anatomy(scene.genotype)
    corners = _on_canvas(points @ scene.matrix.T + scene.offset)
    for layer, (start, end) in zip(layers, itertools.pairwise([0, *ends.tolist()])):
        if layer not in left_out:
            pencil.polygon(corners[2 * start : 2 * end], fill=int(layer))
    if occluded and scene.occluder is not None:
        pencil.polygon(_on_canvas(scene.occluder), fill=int(Layer.OCCLUDER))
    return picture


def _on_canvas(points: np.ndarray) -> list[float]:
    """Pixel coordinates as Pillow wants them: x, y, x, y, ... with whole numbers in the middle of a pixel."""
    return (OVERSAMPLING * points - 0.5).ravel().tolist()


def _layer_colors(scene: Scene) -> np.ndarray:
    """The colour of every layer, (number of layers, 3) uint8."""
    hue, saturation, value = scene.body
    body = (hue, saturation, value)
    wing = (hue, saturation, 0.82 * value)
    belly = (hue, 0.5 * saturation, min(1.0, 1.2 * value))
    mark = (hue, saturation, 0.3 * value) if value > 0.58 else (hue, 0.2 * saturation, 0.97)
    tones = {
        Layer.TAIL: (hue, saturation, 0.5 * value),
        Layer.BODY: body,
        Layer.BELLY: belly,
        Layer.BELLY_MARK: mark,
        Layer.WING: wing,
        Layer.WING_MARK: mark,
        Layer.HEAD: body,
        Layer.CAP: body,
        Layer.EYE_RING: body,
    }
    colors = np.zeros((len(Layer), 3), np.uint8)
    for layer, tone in tones.items():
        colors[layer] = _rgb(tone)
    genotype = scene.genotype
    named = {Layer.BEAK: genotype.beak_color, Layer.LEGS: genotype.leg_color, Layer.EYE: "black"}
    named |= {Layer.CAP: genotype.cap, Layer.EYE_RING: genotype.eye_ring}
    for layer, name in named.items():
        if name != "none":
            colors[layer] = PALETTE[name]
    colors[Layer.OCCLUDER] = scene.occluder_color
    return colors


def _rgb(hsv: tuple[float, float, float]) -> Color:
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(*hsv))
    return red, green, blue


_ROUND = _ellipse(0, 0, 1, 1, points=12)
_CLUTTER = np.stack(  # ellipse, triangle, line, each with twelve corners
    [
        _ROUND,
        np.repeat(_ROUND[::4], 4, axis=0),
        np.repeat([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)], 3, axis=0),
    ]
)


def _scenery(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Blurred colours and clutter, RGB, `OVERSAMPLING` times the size."""
    cells = rng.integers(3, 7)
    grid = rng.integers(30, 226, (cells, cells, 3)).astype(np.uint8)
    canvas = Image.fromarray(grid).resize((OVERSAMPLING * width, OVERSAMPLING * height), Image.Resampling.BICUBIC)
    pencil = ImageDraw.Draw(canvas)
    count = int(rng.poisson(14))
    side = min(width, height)
    kind = rng.integers(3, size=count)
    long = side * np.where(kind == 2, rng.uniform(0.06, 0.20, count), rng.uniform(0.025, 0.10, count))
    short = np.where(kind == 2, side * rng.uniform(0.005, 0.012, count), long * rng.uniform(0.4, 1.0, count))
    angle = rng.uniform(0, 2 * np.pi, count)
    center = rng.random((count, 2)) * (width, height)
    corners = _CLUTTER[kind] * np.stack([long, short], axis=1)[:, None]
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1).reshape(count, 2, 2)
    corners = np.einsum("nij,nkj->nki", turn, corners) + center[:, None]
    for polygon, color in zip(corners, _clutter_colors(rng, count)):
        pencil.polygon(_on_canvas(polygon), fill=color)
    return canvas


def _photograph(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Gamma, gain, white balance and noise of a camera, uint8."""
    gamma, gain = rng.uniform(0.8, 1.25), rng.uniform(0.85, 1.15)
    balance = rng.uniform(0.94, 1.06, 3)
    tones = 255 * gain * balance[:, None] * (np.arange(256) / 255) ** gamma
    exposed = picture.point(np.rint(np.clip(tones, 0, 255)).astype(int).ravel().tolist())
    pixels = rng.standard_normal((picture.height, picture.width, 3), np.float32)
    pixels *= np.float32(rng.uniform(2, 7))
    pixels += np.asarray(exposed)
    return np.clip(np.rint(pixels, out=pixels), 0, 255, out=pixels).astype(np.uint8)


def _coverage(hit: np.ndarray) -> np.ndarray:
    """How many of the `OVERSAMPLING`^2 points of each pixel are hit: (2H, 2W) of 0 and 1 -> (H, W) uint8."""
    rows = hit[0::2].astype(np.uint8) + hit[1::2]
    return rows[:, 0::2] + rows[:, 1::2]


@dataclass(frozen=True, eq=False)
class Drawing:
    """One image with everything that is known about it. Arrays are made when they are first read.

    scene: where the bird stands and how it looks.
    without_part: the part that was left out, or none.
    """

    seed: int
    class_id: int
    index: int
    scene: Scene
    without_part: str | None = None

    @property
    def factors(self) -> dict[str, str]:
        """The value of every factor in `FACTORS`."""
        return self.scene.genotype._asdict()

    @cached_property
    def image(self) -> np.ndarray:
        """The picture before JPEG, (H, W, 3) uint8 RGB."""
        scene = self.scene
        canvas = _scenery(scene.width, scene.height, generator(Stream.SCENERY, self.seed, self.class_id, self.index))
        bird = self._layers.copy()
        bird.putpalette(_layer_colors(scene).ravel().tolist())
        canvas.paste(bird.convert("RGB"), mask=self._layers.point([0] + [255] * 255))
        return _photograph(canvas.reduce(OVERSAMPLING), generator(Stream.CAMERA, self.seed, self.class_id, self.index))

    @cached_property
    def mask(self) -> np.ndarray:
        """The silhouette, also where the occluder covers it, (H, W) bool: pixels at least half covered."""
        layers = trace(self.scene, self._left_out, occluded=False) if self.scene.occluder is not None else self._layers
        return _coverage(np.asarray(layers) != Layer.BACKGROUND) >= 2

    @cached_property
    def visible_mask(self) -> np.ndarray:
        """The silhouette minus the occluder, (H, W) bool; this is what the segmentation file holds."""
        return self.region("bird")

    def region(self, part: str) -> np.ndarray:
        """The pixels (H, W) bool of which at least half show this part, a key of `PARTS`.

        The cap and the eye have a region in every bird, whether or not a cap or a ring can be told from the head.
        """
        shown = _layers_of(part)
        return _coverage(np.asarray(self._layers.point([layer in shown for layer in range(256)]))) >= 2

    @cached_property
    def removed(self) -> np.ndarray:
        """The pixels (H, W) bool that differ from the drawing with all parts; outside, both are equal to the bit."""
        colors = _layer_colors(self.scene)
        here, there = np.asarray(self._layers), np.asarray(trace(self.scene))
        differs = (colors[here] != colors[there]).any(axis=2) | ((here == 0) != (there == 0))
        return _coverage(differs) > 0

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Of `visible_mask`: x0, y0, x1, y1 in pixels, ends exclusive; zeros when nothing of the bird is seen."""
        rows, columns = (np.flatnonzero(self.visible_mask.any(axis=axis)) for axis in (1, 0))
        if len(rows) == 0:
            return 0, 0, 0, 0
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @cached_property
    def parts(self) -> np.ndarray:
        """CUB's fifteen parts in the order of their ids, (15, 3) float64: x, y in pixels, visible 1; else zeros.

        A bird shows its right side when it faces right, its left side when it faces left; both legs are seen.
        """
        anchors = _ANCHORS[_MIRRORED] if self.scene.flipped else _ANCHORS
        located = np.zeros((len(anchors), 3))
        layers = np.asarray(self._layers)
        near = np.flatnonzero(~np.isnan(anchors[:, 0]))
        for part, (x, y) in zip(near, (anchors[near] @ self.scene.matrix.T + self.scene.offset).tolist()):
            if layers[int(OVERSAMPLING * y), int(OVERSAMPLING * x)] in BIRD:
                located[part] = x, y, 1
        return located

    @cached_property
    def body_color(self) -> Color:
        """The colour of the body before the camera, RGB."""
        return _rgb(self.scene.body)

    @property
    def _left_out(self) -> tuple[int, ...]:
        return _layers_of(self.without_part) if self.without_part else ()

    @cached_property
    def _layers(self) -> Image.Image:
        return trace(self.scene, self._left_out)


def _layers_of(part: str) -> tuple[int, ...]:
    if part not in PARTS:
        raise FgvczooError(f"part={part!r}; expected one of {', '.join(PARTS)}{did_you_mean(str(part), PARTS)}")
    return PARTS[part]


def draw(
    seed: int, class_id: int, index: int, size: str | Size = "small", *, without_part: str | None = None
) -> Drawing:
    """Image `index` of class `class_id` (a label, from 0), as `make` writes it before JPEG.

    size: the name or the value that the copy was made with; of it only the sides and the number of classes matter.
    without_part: a key of `PARTS` to leave out, "bird" for the scene alone; everything else stays equal to the bit, and
        `Drawing.removed` holds the pixels that changed.

    Raises `FgvczooError` for an unknown size or part and for a class or an index out of range.
    """
    size = as_size(size)
    check_seed(seed)
    if not 0 <= class_id < size.classes:
        raise FgvczooError(f"class_id={class_id}; expected 0 to {size.classes - 1}")
    if index < 0:
        raise FgvczooError(f"index={index}; expected 0 or more")
    if without_part is not None:
        _layers_of(without_part)
    scene = compose(genotypes(size.pairs, seed)[class_id], size, seed, class_id, index)
    return Drawing(seed, class_id, index, scene, without_part)
