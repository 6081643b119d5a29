"""From a decoded picture and its annotations to what a network reads, with augmentation protocols by name.

albumentations stays behind this file and `warps.py`. It is imported when a protocol is first used.

All coordinates are continuous: pixel i covers [i, i + 1), boxes end exclusively.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from fgvczoo.data.warps import (
    IGNORE,
    draw_perspective,
    draw_rotation,
    draw_shear,
    draw_skew,
    draw_turn,
    elastic,
    import_albumentations,
    warp,
)
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.preprocess import Preprocess

_MEAN_COLOUR = (124, 116, 104)  # ImageNet's

AUGMENTATIONS: dict[str, Callable[[], list[Any]]] = {}
"""Protocol name -> a function that builds its albumentations transforms. They run at the original size."""
Window = Callable[[random.Random, int, int], tuple[int, int, int, int]]
# Protocol -> what draws the part of a picture that is seen: (random numbers, height, width) -> x, y, width, height.
_WINDOWS: dict[str, Window] = {}
_PICTURES_ONLY: set[str] = set()  # protocols that move what is seen without saying where to
_ERASING: dict[str, float] = {}  # protocols that then erase a rectangle of the normalised picture, and how often


def augmentation(
    name: str, *, window: Window | None = None, picture_only: bool = False, erasing: float = 0.0
) -> Callable[[Callable[[], list[Any]]], Callable[[], list[Any]]]:
    """Decorator that enters a protocol in `AUGMENTATIONS`.

    window: draws the part of the picture that is seen. It is resized to the size of the preprocessing, without the cut
        that un-augmented pictures may get there, and the transforms run at that size, as torchvision's do.
    picture_only: it cannot move annotations along.
    erasing: how often a rectangle of the normalised picture is then replaced by noise (timm's `RandomErasing`, mode
        "pixel").
    """

    def enter(build: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        AUGMENTATIONS[name] = build
        if window is not None:
            _WINDOWS[name] = window
        if picture_only:
            _PICTURES_ONLY.add(name)
        if erasing:
            _ERASING[name] = erasing
        return build

    return enter


class Transform:
    """Augments (where a seed is given), resizes and normalises one picture, and moves its annotations along.

    preprocess: size and normalisation.
    augmentation: a name in `AUGMENTATIONS`.
    flip_pairs: pairs of part numbers, from 0, that a mirrored picture exchanges (left and right eye, ...).
    """

    def __init__(
        self, preprocess: Preprocess, augmentation: str = "none", flip_pairs: Sequence[tuple[int, int]] = ()
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise FgvczooError(
                f"augmentation={augmentation!r}; expected one of {', '.join(AUGMENTATIONS)}"
                + did_you_mean(augmentation, AUGMENTATIONS)
            )
        self.preprocess, self._squash = preprocess, replace(preprocess, crop="squash")
        self.augmentation = augmentation
        self.flip_pairs = tuple(flip_pairs)
        self._compose: Any = None

    def __call__(
        self,
        image: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        parts: np.ndarray | None = None,
        seed: Sequence[int] | None = None,
        normalize: bool = True,
    ) -> dict[str, Tensor]:
        """Returns `image` and those of `mask`, `boxes`, `parts` that were given.

        image: RGB uint8 (H, W, 3) -> float32 (3, h, w).
        mask: uint8 (H, W) of class indices -> int64 (h, w); pixels that the picture does not have become 255.
        boxes: (n, 4) x0, y0, x1, y1 -> float32 (n, 4), the smallest box around the moved corners, cut at the border: a
            box that has left the picture has no area.
        parts: (K, 3) x, y, visible -> float32 (K, 3); a part that left the picture is 0, 0, 0 like any invisible one.
        seed: whole numbers, all that the augmentation depends on; None leaves the picture as it is.
        normalize: False leaves `image` as pixels, uint8 (h, w, 3), unless noise has been put into the normalised one.
        """
        preprocess = self.preprocess
        augmented = seed is not None and self.augmentation != "none"
        if augmented:
            assert seed is not None
            if self.augmentation in _PICTURES_ONLY and any(note is not None for note in (mask, boxes, parts)):
                raise FgvczooError(
                    f"augmentation={self.augmentation!r} does not move masks, boxes and parts along; leave them out of"
                    " keys, or choose another"
                )
            # One stream for the whole chain, and one for the window. albumentations' `set_random_seed` would give every
            # step its own copy of the same stream, and a flip would go with, say, every brightening.
            streams = np.random.SeedSequence(tuple(seed)).spawn(3 if self.augmentation in _WINDOWS else 2)
            if (window := _WINDOWS.get(self.augmentation)) is not None:
                preprocess = self._squash
                x, y, w, h = window(_random(streams[2]), *image.shape[:2])
                image, mask, boxes, parts = crop_sample((x, y, x + w, y + h), image, mask, boxes, parts)
                image, mask, boxes, parts = _resize_sample(preprocess, image, mask, boxes, parts)
            image, mask, boxes, parts = self._augment(image, mask, boxes, parts, streams)
        height, width = image.shape[:2]
        pixels = preprocess.resize(image, fast=augmented)
        if seed is not None and self.augmentation in _ERASING:
            sample = {"image": _erase(preprocess.normalize(pixels), _ERASING[self.augmentation], seed)}
        else:
            sample = {"image": preprocess.normalize(pixels) if normalize else torch.from_numpy(pixels)}
        if mask is not None:
            sample["mask"] = torch.from_numpy(preprocess.resize_mask(mask).astype(np.int64))
        full_h, full_w = preprocess.size
        if boxes is not None:
            moved = preprocess.boxes_forward(boxes, height, width)
            sample["boxes"] = torch.from_numpy(np.clip(moved, 0, (full_w, full_h, full_w, full_h)).astype(np.float32))
        if parts is not None:
            x, y = preprocess.boxes_forward(parts[:, [0, 1, 0, 1]], height, width)[:, :2].T.astype(np.float32)
            inside = (parts[:, 2] > 0) & (x >= 0) & (x < full_w) & (y >= 0) & (y < full_h)
            sample["parts"] = torch.from_numpy(np.stack([x, y, np.ones_like(x)], axis=1) * inside[:, None])
        return sample

    def build(self) -> None:
        """Builds the augmentation now: before workers are forked, so that they share the import."""
        if self._compose is None and self.augmentation != "none":
            albumentations = import_albumentations()
            with warnings.catch_warnings():
                # An argument that albumentations does not know is an error, not a warning it goes on after.
                warnings.filterwarnings("error", message=r".*Argument\(s\)")
                warnings.filterwarnings(
                    "ignore", message="Got processor for keypoints"
                )  # of a protocol of colours only
                self._compose = albumentations.Compose(
                    AUGMENTATIONS[self.augmentation](),
                    keypoint_params=albumentations.KeypointParams(format="xy", remove_invisible=False),
                    save_applied_params=True,
                )

    def _augment(
        self,
        image: np.ndarray,
        mask: np.ndarray | None,
        boxes: np.ndarray | None,
        parts: np.ndarray | None,
        streams: Sequence[np.random.SeedSequence],
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        self.build()
        self._compose.set_random_state(np.random.default_rng(streams[0]), _random(streams[1]))
        # Boxes travel as points on their outline: albumentations would drop those that leave the picture.
        points = np.concatenate(
            [
                np.empty((0, 2)) if boxes is None else _outline(boxes),
                np.empty((0, 2)) if parts is None else parts[:, :2],
            ]
        )
        data: dict[str, Any] = {"image": image, "keypoints": points - 0.5}  # albumentations counts pixel centres
        if mask is not None:
            data["mask"] = mask
        data = self._compose(**data)
        points = np.asarray(data["keypoints"], np.float64).reshape(-1, 2) + 0.5
        flipped = sum(name == "HorizontalFlip" for name, _ in data["applied_transforms"]) % 2 == 1
        if boxes is not None:
            outlines, points = np.split(points, [8 * len(boxes)])
            outlines = outlines.reshape(-1, 8, 2)
            boxes = np.concatenate([outlines.min(axis=1), outlines.max(axis=1)], axis=1)
            height, width = data["image"].shape[:2]
            boxes = np.clip(boxes, 0, (width, height, width, height))
        if parts is not None:
            inside = _inside(points, data["image"].shape)
            parts = np.concatenate([points, (parts[:, 2:] > 0) & inside[:, None]], axis=1)
            if flipped:
                order = np.arange(len(parts))
                for left, right in self.flip_pairs:
                    order[[left, right]] = right, left
                parts = parts[order]
        return data["image"], data.get("mask"), boxes, parts

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compose": None}  # a spawned worker builds its own


def _random(stream: np.random.SeedSequence) -> random.Random:
    return random.Random(int(stream.generate_state(1, np.uint64)[0]))


def _resize_sample(
    preprocess: Preprocess,
    image: np.ndarray,
    mask: np.ndarray | None,
    boxes: np.ndarray | None,
    parts: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """A picture and what goes with it, resized."""
    height, width = image.shape[:2]
    if mask is not None:
        mask = preprocess.resize_mask(mask)
    if boxes is not None:
        boxes = preprocess.boxes_forward(boxes, height, width)
    if parts is not None:
        points = preprocess.boxes_forward(parts[:, [0, 1, 0, 1]], height, width)[:, :2]
        parts = np.concatenate([points, parts[:, 2:]], axis=1)
    return preprocess.resize(image, fast=True), mask, boxes, parts


def crop_sample(
    box: tuple[int, int, int, int],
    image: np.ndarray,
    mask: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
    parts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Cuts `box` (x0, y0, x1, y1, whole pixels) out of a picture; boxes are cut, parts outside become invisible."""
    height, width = image.shape[:2]
    x0, y0 = max(box[0], 0), max(box[1], 0)
    x1, y1 = max(min(box[2], width), x0), max(min(box[3], height), y0)
    image = image[y0:y1, x0:x1]
    if mask is not None:
        mask = mask[y0:y1, x0:x1]
    if boxes is not None:
        boxes = np.clip(boxes - np.array([x0, y0, x0, y0]), 0, (x1 - x0, y1 - y0, x1 - x0, y1 - y0))
    if parts is not None:
        points = parts[:, :2] - np.array([x0, y0])
        parts = np.concatenate([points, (parts[:, 2:] > 0) & _inside(points, image.shape)[:, None]], axis=1)
    return image, mask, boxes, parts


def _inside(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x, y = points.T
    return (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])


def _outline(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) boxes -> (8 n, 2): corners and middles of the sides."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).reshape(-1, 4).T
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    outline = [(x0, y0), (x, y0), (x1, y0), (x1, y), (x1, y1), (x, y1), (x0, y1), (x0, y)]
    return np.array(outline).transpose(2, 0, 1).reshape(-1, 2)


@augmentation("none")
def none() -> list[Any]:
    """The picture as it is."""
    return []


@augmentation("flip")
def flip() -> list[Any]:
    """Mirrored with probability 1/2."""
    return [import_albumentations().HorizontalFlip(p=0.5)]


@augmentation("protopnet")
def protopnet() -> list[Any]:
    """ProtoPNet's offline augmentation, drawn anew for every sample: one of three families, then a flip.

    Rotation up to 15 degrees, skew 0.2, shear up to 10 degrees, all zoomed so that no pixel is empty; bicubic. The
    published set holds 30 drawn pictures for each original, and not the original: one of its epochs is 30 of these.
    """
    albumentations = import_albumentations()
    families = [warp(draw) for draw in (draw_rotation, draw_skew, draw_shear)]
    return [albumentations.OneOf(families, p=1), albumentations.HorizontalFlip(p=0.5)]


@augmentation("st-protopnet-cropped")
def st_protopnet_cropped() -> list[Any]:
    """As "protopnet" with a fourth family: an elastic 10 x 10 grid whose inner nodes move by up to 5 pixels."""
    albumentations = import_albumentations()
    families = [*(warp(draw) for draw in (draw_rotation, draw_skew, draw_shear)), elastic(grid=10, magnitude=5)]
    return [albumentations.OneOf(families, p=1), albumentations.HorizontalFlip(p=0.5)]


@augmentation("st-protopnet-full")
def st_protopnet_full() -> list[Any]:
    """Rotation up to 25 and horizontal shear up to 15 degrees, nearest neighbour on black, then a flip."""
    albumentations = import_albumentations()
    affine = albumentations.Affine(
        rotate=(-25, 25),
        shear={"x": (-15, 15), "y": (0, 0)},
        interpolation=cv2.INTER_NEAREST,
        fill=0,
        fill_mask=IGNORE,
        p=1,
    )
    return [affine, albumentations.HorizontalFlip(p=0.5)]


@augmentation("prototree")
def prototree() -> list[Any]:
    """ProtoTree's for CUB-200-2011: at 224 x 224, in an order drawn each time, perspective, colours, a flip, and
    rotation up to 10 degrees with a shift of 5 %; what lies outside is black."""
    albumentations = import_albumentations()
    steps = _tilted_and_coloured(distortion=0.2, hue=0.02, degrees=10, shift=0.05)
    resize = albumentations.Resize(224, 224, area_for_downscale="image")
    return [resize, albumentations.RandomOrder(steps, n=len(steps), p=1)]


@augmentation("prototree-cars")
def prototree_cars() -> list[Any]:
    """ProtoTree's for Stanford Cars: as "prototree", stronger, without the shift, at 256 x 256; then a cut of 224."""
    albumentations = import_albumentations()
    steps = _tilted_and_coloured(distortion=0.5, hue=0.4, degrees=15, shift=0)
    return [
        albumentations.Resize(256, 256, area_for_downscale="image"),
        albumentations.RandomOrder(steps, n=len(steps), p=1),
        albumentations.RandomCrop(224, 224),
    ]


def _tilted_and_coloured(distortion: float, hue: float, degrees: float, shift: float) -> list[Any]:
    """Perspective with probability 1/2, colours by up to 40 % and a turn of the hue, a flip, an affine map."""
    albumentations = import_albumentations()
    factors = (0.6, 1.4)
    return [
        warp(partial(draw_perspective, distortion), border=cv2.BORDER_CONSTANT, p=0.5),
        albumentations.ColorJitter(brightness=factors, contrast=factors, saturation=factors, hue=(-hue, hue), p=1),
        albumentations.HorizontalFlip(p=0.5),
        albumentations.Affine(
            rotate=(-degrees, degrees),
            shear={"x": (-2, 2), "y": (0, 0)},
            translate_percent={"x": (-shift, shift), "y": (-shift, shift)},
            fill=0,
            fill_mask=IGNORE,
            p=1,
        ),
    ]


@augmentation("small-birds")
def small_birds() -> list[Any]:
    """For small drawn pictures: flip, shift up to 8 %, mild brightness and contrast, one erased rectangle."""
    albumentations = import_albumentations()
    return [
        albumentations.HorizontalFlip(p=0.5),
        albumentations.Affine(
            translate_percent={"x": (-0.08, 0.08), "y": (-0.08, 0.08)},
            border_mode=cv2.BORDER_CONSTANT,
            fill=_MEAN_COLOUR,
            fill_mask=IGNORE,
            p=1,
        ),
        albumentations.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.15, p=0.8),
        albumentations.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=(0.1, 0.25),
            hole_width_range=(0.1, 0.25),
            fill=_MEAN_COLOUR,
            p=0.5,
        ),
    ]


def _part(least: float) -> Window:
    """A window of at least this share of the area. Ten draws of area and shape, as torchvision has it; if none fits,
    the largest window in the middle whose shape is allowed."""

    def draw(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * rng.uniform(least, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (width - w) // 2, (height - h) // 2, w, h

    return draw


def _seven_eighths(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """A window of 7/8 of width and height."""
    w, h = max(1, round(width * 7 / 8)), max(1, round(height * 7 / 8))
    return rng.randint(0, width - w), rng.randint(0, height - h), w, h


@augmentation("resized-crop", window=_part(0.08))
def resized_crop() -> list[Any]:
    """A window of 8 to 100 % of the area, 3/4 to 4/3 as wide as high, as torchvision has it, then a flip."""
    return flip()


@augmentation("timm-imagenet", window=_part(0.08), picture_only=True, erasing=0.25)
def timm_imagenet() -> list[Any]:
    """timm's for ImageNet, as Swin Transformer and MetaFormer use it: "resized-crop", RandAugment
    (rand-m9-mstd0.5-inc1), and a rectangle of noise in every fourth picture."""
    return [*flip(), _rand_augment("rand-m9-mstd0.5-inc1")]


@augmentation("resized-crop-16", window=_part(0.16))
def resized_crop_16() -> list[Any]:
    """As "resized-crop", of at least 16 % of the area."""
    return flip()


@augmentation("random-crop", window=_seven_eighths)
def random_crop() -> list[Any]:
    """A window of 7/8 of width and height (224 of 256 pixels), then a flip."""
    return flip()


@augmentation("random-crop-colour", window=_seven_eighths)
def random_crop_colour() -> list[Any]:
    """As "random-crop", with brightness, contrast, saturation and hue moved by up to 0.2."""
    jitter = import_albumentations().ColorJitter(
        brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.2, 0.2), p=1
    )
    return [*flip(), jitter]


@augmentation("gabor", window=_seven_eighths)
def gabor() -> list[Any]:
    """Of the Gabor texture branch: as "random-crop" (448 of 512 pixels), with brightness, contrast and saturation moved
    by up to 0.2; nothing is erased, which would change the statistics of textures."""
    jitter = import_albumentations().ColorJitter(
        brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(0, 0), p=1
    )
    return [*flip(), jitter]


@augmentation("cct-cifar", window=_part(0.05))
def cct_cifar() -> list[Any]:
    """Concept-Centric Transformers' for CIFAR-100: a window of 5 to 100 % of the area, no flip."""
    return []


@augmentation("cct-cub")
def cct_cub() -> list[Any]:
    """Concept-Centric Transformers' for CUB-200-2011: a flip, and rotation by up to 30 degrees, reflected there."""
    # Not BORDER_REFLECT_101, which never ends where a picture has one pixel in a row.
    return [*flip(), warp(draw_turn, border=cv2.BORDER_REFLECT)]


@augmentation("padded-crop")
def padded_crop() -> list[Any]:
    """For pictures of 32 pixels: padded by 4 black pixels, a cut of the old size, a flip."""
    move = import_albumentations().Affine(
        translate_px={"x": (-4, 4), "y": (-4, 4)}, interpolation=cv2.INTER_NEAREST, fill=0, fill_mask=IGNORE, p=1
    )
    return [move, *flip()]


@augmentation("random-crop-zoom", window=_part(0.5))
def random_crop_zoom() -> list[Any]:
    """As "resized-crop", of at least half of the area."""
    return flip()


@augmentation("random-crop-grey", window=_seven_eighths)
def random_crop_grey() -> list[Any]:
    """As "random-crop", without colours with probability 0.2."""
    return [*flip(), import_albumentations().ToGray(p=0.2)]


@contextmanager
def _global_streams(seed: int) -> Iterator[None]:
    """Inside, the random numbers of Python, numpy and torch, which timm draws from, come from this seed (32 bits)."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _erase(image: Tensor, probability: float, seed: Sequence[int]) -> Tensor:
    """A normalised picture (3, h, w) with a rectangle of normal noise, perhaps."""
    from timm.data.random_erasing import RandomErasing

    # The last number keeps these draws apart from those of the same seed that moved the picture.
    with _global_streams(int(np.random.SeedSequence((*seed, 7)).generate_state(1)[0])):
        return RandomErasing(probability, mode="pixel", device="cpu")(image)


def _rand_augment(description: str) -> Any:
    """An albumentations transform that runs timm's RandAugment."""
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    operations = rand_augment_transform(
        description, {"img_mean": _MEAN_COLOUR, "interpolation": Image.Resampling.BICUBIC}
    )
    image_only: Any = import_albumentations().ImageOnlyTransform

    class RandAugment(image_only):
        def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
            with _global_streams(self.py_random.getrandbits(32)):
                return np.array(operations(Image.fromarray(img)))

    return RandAugment(p=1)
