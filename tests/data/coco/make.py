"""A tiny copy of MS COCO 2014 in its official layout and file format, with the traps of the real one.

The traps: category ids with gaps, out of order; images without an object; small objects on larger ones; a crowd, whose
    shape is runs; an object of two polygons.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.pictures import save_picture

CATEGORIES = {90: "toothbrush", 1: "person", 3: "car"}  # labels 2, 0, 1
SIZE = (40, 50)


def square(x: int, y: int, side: int) -> list[float]:
    """A polygon."""
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def make_coco(root: Path, *, train: int = 10, val: int = 4) -> None:
    """Writes the copy. train, val: images with an object."""
    for split, count in (("train", train), ("val", val)):
        images: list[dict[str, Any]] = []
        notes: list[dict[str, Any]] = []
        for number in range(count + 1):
            image = {"train": 9, "val": 5000}[split] + 11 * number
            name = f"COCO_{split}2014_{image:012d}.jpg"
            save_picture(root / f"{split}2014/{name}", number, size=SIZE, mode="L" if number == 1 else "RGB")
            images.append({"id": image, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            if number == 3:
                continue  # without an object
            category = list(CATEGORIES)[number % 3]

            def add(
                category: int,
                box: list[float],
                shape: Any,
                area: float,
                image: int = image,
                notes: list[dict[str, Any]] = notes,
            ) -> None:
                note = {
                    "id": len(notes),
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": int(isinstance(shape, dict)),
                }
                notes.append(note | {"bbox": box, "segmentation": shape, "area": area})

            if number == 0:  # a car before the larger person
                add(3, [10, 10, 4, 4], [square(10, 10, 4)], 16)
                add(1, [5, 5, 20, 20], [square(5, 5, 20)], 400)
            elif number == 1:
                runs = [SIZE[0] * 2, SIZE[0] * 3, SIZE[0] * (SIZE[1] - 5)]  # the columns 2, 3 and 4
                add(category, [2, 0, 3, 40], {"counts": runs, "size": list(SIZE)}, 120)
            else:
                add(category, [2, 2, 30.5, 12], [square(2, 2, 5), square(20, 2, 12)], 169)
        whole = {"info": {}, "images": images[::-1], "annotations": notes, "licenses": []}
        whole["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        file = root / f"annotations/instances_{split}2014.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(whole))
