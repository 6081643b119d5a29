"""A tiny copy of NABirds in its official layout and file formats, with the traps of the real one.

The traps: image ids are texts, with dashes that the names of files have not; class ids have gaps and sort otherwise as
texts; classes.txt holds the whole tree, with equal names; names with blanks and parentheses; lists in different orders;
boxes of x, y, width, height; invisible parts; a grey picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.data.pictures import save_picture, write_lines

# Node -> name and the node above it. With images: 9, 10 (ranks 0 and 1, though "10" < "9" as text), 817, 100.
NODES = {
    0: ("Birds", None),
    1: ("Ducks, Geese, and Swans", 0),
    2: ("Hawks", 0),
    5: ("Mallard", 1),
    9: ("Red-tailed Hawk (Adult)", 2),
    10: ("Mallard (Female/Eclipse male)", 5),
    100: ("Red-tailed Hawk (Juvenile)", 2),
    817: ("Mallard (Breeding male)", 5),
}
CLASSES = (9, 10, 100, 817)
PARTS = (
    *("bill", "crown", "nape", "left eye", "right eye", "belly", "breast", "back", "tail", "left wing", "right wing"),
)


@dataclass(frozen=True)
class Bird:
    """What is written of one image; `box` x, y, width, height; `parts` (11, 3)."""

    image_id: str
    node: int
    is_train: bool
    box: tuple[int, int, int, int]
    parts: np.ndarray
    photographer: str


def make_nabirds(root: Path, *, train: int = 3, test: int = 2) -> list[Bird]:
    """Writes the copy and returns what is in it, in the order of images.txt. train, test: images of a class."""
    rng = np.random.default_rng(0)
    base = root / "nabirds"
    birds, paths = [], []
    for number in range(len(CLASSES) * (train + test)):
        node = CLASSES[number % len(CLASSES)]
        text = rng.bytes(16).hex()
        dashed = "-".join([text[:8], text[8:12], text[12:16], text[16:20], text[20:]])
        paths.append(f"{node:04d}/{text}.jpg")
        height, width = save_picture(base / "images" / paths[-1], number, mode="L" if number == 1 else "RGB")
        x, y = (int(value) for value in rng.integers(1, 10, 2))
        parts = np.stack([rng.integers(0, width, 11), rng.integers(0, height, 11), rng.random(11) < 0.7], axis=1)
        box = x, y, width // 2, height // 2
        is_train = number // len(CLASSES) >= test
        birds.append(Bird(dashed, node, is_train, box, parts * parts[:, 2:], f"Ann B. Lee{number}"))
    ids = [bird.image_id for bird in birds]
    write_lines(base / "images.txt", [f"{name} {path}" for name, path in zip(ids, paths)])
    # Lists are joined by id: these are in another order.
    mixed = [birds[place] for place in rng.permutation(len(birds))]
    write_lines(base / "image_class_labels.txt", [f"{bird.image_id} {bird.node}" for bird in mixed])
    write_lines(base / "train_test_split.txt", [f"{bird.image_id} {int(bird.is_train)}" for bird in mixed])
    write_lines(base / "bounding_boxes.txt", [f"{b.image_id} {' '.join(map(str, b.box))}" for b in mixed])
    write_lines(base / "photographers.txt", [f"{bird.image_id} {bird.photographer}" for bird in mixed])
    write_lines(base / "sizes.txt", [f"{bird.image_id} 1 1" for bird in mixed])
    write_lines(base / "classes.txt", [f"{node} {name}" for node, (name, _) in NODES.items()])
    write_lines(base / "hierarchy.txt", [f"{node} {above}" for node, (_, above) in NODES.items() if above is not None])
    write_lines(base / "parts/parts.txt", [f"{place} {name}" for place, name in enumerate(PARTS, 1)])
    write_lines(
        base / "parts/part_locs.txt",
        [f"{b.image_id} {n} {x} {y} {seen}" for b in mixed for n, (x, y, seen) in enumerate(b.parts, 1)],
    )
    return birds
