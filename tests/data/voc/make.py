"""A tiny copy of VOC 2012 in its official layout, with the traps of the real one.

The traps: masks are palette pictures with 255 for what is ignored, several objects of one class, coordinates that count
from 1 and may have fractions, an augmented list whose lines are paths of picture and mask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Id -> objects: class name, corners as the annotation has them.
OBJECTS = {
    "2007_000032": [("aeroplane", (1, 1, 20, 20)), ("person", (5.0, 6.0, 9.5, 12.0))],
    "2007_000039": [("tvmonitor", (10, 10, 30, 25))],
    "2007_000033": [("dog", (3, 4, 11, 17)), ("dog", (20, 4, 31, 17))],
    "2008_000008": [("horse", (2, 2, 25, 25))],
}
LISTS = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
AUGMENTED = ["2007_000032", "2007_000039", "2008_000008"]


def make_voc(root: Path, *, train: int = 0, test: int = 0) -> Path:
    """Writes the copy and returns the folder that is VOC2012/. train, test: how many more images."""
    more = {
        f"2009_{number:06d}": [(("aeroplane", "tvmonitor", "dog")[number % 3], (2, 2, 20, 20))]
        for number in range(train + test)
    }
    objects_of, ids = OBJECTS | more, list(more)
    lists = {"train": LISTS["train"] + ids[:train], "val": LISTS["val"] + ids[train:]}
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    for place, (name, objects) in enumerate(objects_of.items()):
        Image.fromarray(np.full((30 + place, 40, 3), 12 * place, np.uint8)).save(base / f"JPEGImages/{name}.jpg")
        text = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            "</bndbox></object>"
            for kind, (x0, y0, x1, y1) in objects
        )
        (base / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
        mask = np.zeros((30 + place, 40), np.uint8)
        mask[5:15, 5:15], mask[0] = place + 1, 255
        picture = Image.fromarray(mask, "P")
        picture.putpalette([value % 256 for value in range(768)])
        folder = "SegmentationClass" if name in lists["train"] + lists["val"] else "SegmentationClassAug"
        picture.save(base / folder / f"{name}.png")
    for name, listed in lists.items():
        (base / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(listed) + "\n")
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in AUGMENTED]
    (base / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(lines) + "\n")
    return base
