"""A tiny copy of CUB-200-2011 in its official layout and file formats, with the traps of the real one.

The traps: image ids neither contiguous nor in the order of the lines, a grey picture, an attribute line with six
fields, parts that are invisible (0.0 0.0 0), boxes with fractions, part names with spaces, attributes.txt beside the
folder, segmentations apart, pictures of different sizes.

Each picture is dark with a bright rectangle, the bird, whose place its box, its segmentation and its parts tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = ("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape")
PARTS += ("right eye", "right leg", "right wing", "tail", "throat")
ATTRIBUTES = ("has_bill_shape::curved_(up_or_down)", "has_bill_shape::dagger", "has_size::small_(5_-_9_in)")
CERTAINTIES = ("not visible", "guessing", "probably", "definitely")


@dataclass(frozen=True)
class Bird:
    """What is written of one image; `box` x, y, width, height and `parts` (15, 3) in pixels of the picture."""

    image_id: int
    label: int
    path: str
    is_train: bool
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    parts: np.ndarray
    attributes: np.ndarray
    certainty: np.ndarray


def make_cub(
    root: Path,
    *,
    classes: int = 3,
    train: int = 4,
    test: int = 3,
    segmentations: str | None = "inside",
    attributes_at: str = "beside",
) -> list[Bird]:
    """Writes the copy to `root` and returns what is in it, in the order of the image ids.

    segmentations: "inside" the folder, "beside" it, or None.
    attributes_at: where attributes.txt lies: "beside" the folder, "inside" it, or in its "attributes" folder.
    """
    rng = np.random.default_rng(0)
    base = root / "CUB_200_2011"
    names = [f"{label + 1:03d}.Tiny_Bird_{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[label]}" for label in range(classes)]
    birds = []
    for number in range(classes * (train + test)):
        label, place = divmod(number, train + test)
        width, height = int(rng.integers(60, 90)), int(rng.integers(50, 80))
        x, y = rng.uniform(5, width / 3), rng.uniform(5, height / 3)
        w, h = rng.uniform(width / 3, width / 2), rng.uniform(height / 3, height / 2)
        parts = np.stack([rng.uniform(x, x + w, 15), rng.uniform(y, y + h, 15), rng.random(15) < 0.8], axis=1).round(1)
        parts *= parts[:, 2:]
        birds.append(
            Bird(
                image_id=3 * number + 2,
                label=label,
                path=f"{names[label]}/Tiny_Bird_{number:04d}.jpg",
                is_train=place >= test,  # as in the real set, the first image is a test image
                size=(height, width),
                box=tuple(round(float(value), 1) for value in (x, y, w, h)),
                parts=parts,
                attributes=rng.integers(0, 2, len(ATTRIBUTES)),
                certainty=rng.integers(1, 5, len(ATTRIBUTES)),
            )
        )
        _draw(birds[-1], base / "images", {"inside": base, "beside": root}.get(segmentations or ""), grey=number == 1)

    lines: dict[Path, list[str]] = {
        base / "images.txt": [f"{bird.image_id} {bird.path}" for bird in birds],
        base / "image_class_labels.txt": [f"{bird.image_id} {bird.label + 1}" for bird in birds],
        base / "train_test_split.txt": [f"{bird.image_id} {bird.is_train:d}" for bird in birds],
        base / "bounding_boxes.txt": [f"{bird.image_id} {' '.join(map(str, bird.box))}" for bird in birds],
        base / "parts/part_locs.txt": [
            f"{bird.image_id} {part} {x} {y} {visible:.0f}"
            for bird in birds
            for part, (x, y, visible) in enumerate(bird.parts, 1)
        ],
        base / "attributes/image_attribute_labels.txt": [
            f"{bird.image_id} {attribute} {present} {certainty} {'0 ' if bird is birds[4] else ''}27.708"
            for bird in birds
            for attribute, (present, certainty) in enumerate(zip(bird.attributes, bird.certainty), 1)
        ],
    }
    for place, content in enumerate(lines.values()):
        np.random.default_rng(place).shuffle(content)
    folder = {"beside": root, "inside": base, "attributes": base / "attributes"}[attributes_at]
    lines |= {
        base / "README": ["a tiny copy"],
        base / "classes.txt": _numbered(names),
        base / "parts/parts.txt": _numbered(PARTS),
        base / "attributes/certainties.txt": _numbered(CERTAINTIES),
        base / "attributes/class_attribute_labels_continuous.txt": [
            " ".join(
                f"{100 * value:.6f}" for value in np.mean([b.attributes for b in birds if b.label == label], axis=0)
            )
            for label in range(classes)
        ],
        folder / "attributes.txt": _numbered(ATTRIBUTES),
    }
    for file, content in lines.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    return birds


def _numbered(names: tuple[str, ...] | list[str]) -> list[str]:
    return [f"{number} {name}" for number, name in enumerate(names, 1)]


def _draw(bird: Bird, images: Path, segmentations: Path | None, *, grey: bool) -> None:
    height, width = bird.size
    x, y, w, h = bird.box
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = (columns > x) & (columns < x + w) & (rows > y) & (rows < y + h)
    picture = np.where(inside, 220, 30).astype(np.uint8)
    if not grey:
        picture = np.stack([picture, picture // 2, 255 - picture], axis=2)
    path = images / bird.path
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=95)
    if segmentations is not None:
        path = (segmentations / "segmentations" / bird.path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(inside, 153, 102).astype(np.uint8)).save(
            path
        )  # votes of annotators: from 128 on, bird
