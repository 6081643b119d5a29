"""A tiny copy of Stanford Online Products in its official layout and file formats, with the traps of the real one.

The traps: a header line in the lists, class ids that count on from training to testing, classes of 2 to 5 images, file
names that occur in two folders and end in .JPG, a grey picture, pictures of different sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SUPER_CLASSES = ("bicycle", "coffee_maker", "sofa")


def make_sop(root: Path, *, train: int = 5, test: int = 4) -> list[tuple[str, int, int]]:
    """Writes the copy to `root` and returns path, label and super class (from 0) of every row.

    train, test: numbers of classes.
    """
    rng = np.random.default_rng(0)
    base = root / "Stanford_Online_Products"
    lists: dict[str, list[tuple[str, int, int]]] = {"train": [], "test": []}
    for label in range(train + test):
        group = label % len(SUPER_CLASSES)
        for view in range(2 + label % 4):
            # Products are numbered within their folder: names occur in others, too.
            path = f"{SUPER_CLASSES[group]}_final/{111085122871 + label // len(SUPER_CLASSES)}_{view}.JPG"
            lists["train" if label < train else "test"].append((path, label, group))
            height, width = (int(side) for side in rng.integers(40, 60, 2))
            picture = np.full((height, width, 3), (20 * label + 20, 40 * view, 60 * group), np.uint8)
            (base / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[..., 0] if view == label == 1 else picture).save(base / path, "JPEG", quality=95)
    rows = [*lists["train"], *lists["test"]]
    number = {path: place for place, (path, *_) in enumerate(rows, 1)}
    for name, listed in {**lists, "info": rows}.items():
        lines = [f"{number[path]} {label + 1} {group + 1} {path}" for path, label, group in listed]
        (base / f"Ebay_{name}.txt").write_text("\n".join(["image_id class_id super_class_id path", *lines]) + "\n")
    return rows
