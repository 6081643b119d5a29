"""Tiny folders of pictures, as a user has them: a folder for each class, or a table with all that tables can hold.

Every picture is noise of its own; one with a box is dark outside of it, so that what was cut out can be seen.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

BIRDS = ("b owl", "étourneau", "-dash", "it's")


def picture(file: Path, seed: int, size: tuple[int, int] = (24, 20), box: Sequence[int] | None = None) -> Path:
    """Writes a picture of `size` width, height; bright inside of `box` and dark outside."""
    pixels = np.random.default_rng(seed).integers(100, 256, (size[1], size[0], 3), dtype=np.uint8)
    if box is not None:
        dark = np.ones(pixels.shape[:2], bool)
        dark[box[1] : box[3], box[0] : box[2]] = False
        pixels[dark] = seed % 30
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def make_folders(root: Path, counts: Mapping[str, int]) -> None:
    """Writes so many pictures into each folder of `root`."""
    for number, (folder, count) in enumerate(counts.items()):
        for place in range(count):
            picture(root / folder / f"{place:03d}.png", 1000 * number + place)


def make_table(root: Path, count: int = 12) -> list[dict[str, Any]]:
    """Writes pictures and masks to `root` and returns the rows of a table with every column but one kind of box.

    Every fourth row lacks what may be missing; every third is of the split test.
    """
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        width, height = int(rng.integers(20, 40)), int(rng.integers(20, 40))
        box = [3, 4, int(rng.integers(12, width)), int(rng.integers(12, height))]
        label, whole = number % len(BIRDS), number % 4 != 3
        path = f"pictures/{BIRDS[label]}/{number}.png"
        picture(root / path, number, (width, height), box)
        mask = np.full((height, width), 255, np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = label
        mask[0] = 7
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        rows.append(
            {
                "path": path,
                "label": BIRDS[label],
                "split": "test" if number % 3 == 2 else "train",
                "mask": f"masks/{number}.png",
                **{f"bbox_{name}": float(value) for name, value in zip(("x0", "y0", "x1", "y1"), box)},
                "parts": [[5.5, 6.0, 1.0], [0.0, 0.0, 0.0]] if whole else None,
                "attributes": [0.0, float(number), 0.5],
                "attribute_certainty": [1, 2, number],
                "label_levels": [label, label // 2],
                "latitude": -12.5 if whole else None,
                "longitude": float(number),
                "date": "2021-05-03" if number % 2 else "2020-12-24T10:11:12",
                "hour": float(number) if whole else None,
                "metadata.habitat": [1.0, number / 4] if whole else None,
                "metadata.altitude": float(number),
                "photographer": 'a "quoted" name,\nof two lines',
            }
        )
    return rows


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows as .csv (lists as JSON) or .parquet (lists as lists)."""
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), file)
        return file
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()})
    return file
