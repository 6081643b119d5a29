"""A tiny copy of Stanford Cars in each of its layouts and file formats, with the traps of the real one.

The traps: the same file names for training and testing, annotations in another order than the files, classes from 1 in
another order than the alphabet's, a class name with a slash, numbers in the smallest integers that hold them (a
difference of two may overflow), test labels in a file of their own, a grey picture, pictures of different sizes.

Each picture is dark with a bright rectangle, the car, whose place its box tells.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

CLASSES = (
    "Dodge Tiny Wagon 2000", "Audi TTS Coupe 2012", "Audi TT RS Coupe 2012", "Ram C/V Cargo Van Minivan 2012",
)  # fmt: skip
LAYOUTS = ("two-folders", "one-folder", "class-folders")
CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


@dataclass(frozen=True)
class Car:
    """What is written of one image; `box` x0, y0, x1, y1."""

    image_id: str
    label: int
    is_train: bool
    size: tuple[int, int]
    box: tuple[int, int, int, int]


def make_cars(
    root: Path,
    layout: str = "two-folders",
    *,
    train: int = 4,
    test: int = 3,
    labels_at: str | None = "beside",
    nested: bool = False,
    compressed: bool = False,
) -> list[Car]:
    """Writes the copy to `root` and returns what is in it, in the order of the annotations.

    train, test: images of a class.
    labels_at: where the labels of test images lie in "two-folders": "beside" devkit/, "inside" it, or None.
    nested: every folder once more inside itself, and devkit/ in car_devkit/.
    """
    rng = np.random.default_rng(0)
    kinds = [(label, is_train) for label in range(len(CLASSES)) for is_train in (True,) * train + (False,) * test]
    order = rng.permutation(len(kinds))
    if layout != "one-folder":
        order = sorted(order, key=lambda place: not kinds[place][1])  # training first
    numbers = {True: iter(rng.permutation(len(kinds))), False: iter(rng.permutation(len(kinds)))}
    cars, files = [], {}
    for place in order:
        label, is_train = kinds[place]
        number = int(next(numbers[is_train or layout == "one-folder"])) + 1
        split = "train" if is_train else "test"
        top, inner = {
            "two-folders": (f"cars_{split}", f"{number:05d}.jpg"),
            "one-folder": ("car_ims", f"{number:06d}.jpg"),
            "class-folders": ("car_data", f"{split}/{CLASSES[label].replace('/', '-')}/{number:05d}.jpg"),
        }[layout]
        width, height = int(rng.integers(60, 90)), int(rng.integers(50, 80))
        x0, y0 = int(rng.integers(5, width // 3)), int(rng.integers(5, height // 3))
        box = x0, y0, x0 + int(rng.integers(width // 3, width // 2)), y0 + int(rng.integers(height // 3, height // 2))
        cars.append(Car(f"{top}/{inner}", label, is_train, (height, width), box))
        files[cars[-1].image_id] = root / top / (top if nested else "") / inner
        _draw(cars[-1], files[cars[-1].image_id], grey=len(cars) == 2)

    def save(path: Path, **variables) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(path, variables, do_compression=compressed)

    parts = {"train": [car for car in cars if car.is_train], "test": [car for car in cars if not car.is_train]}
    names = np.array(CLASSES, object)
    if layout == "two-folders":
        devkit = root / ("car_devkit/devkit" if nested else "devkit")
        save(devkit / "cars_meta.mat", class_names=names)
        for split, part in parts.items():
            table = [
                {**_corners(car), "class": np.uint8(car.label + 1), "fname": Path(car.image_id).name} for car in part
            ]
            if split == "test":
                if labels_at is not None:
                    folder = root if labels_at == "beside" else devkit
                    save(folder / "cars_test_annos_withlabels.mat", annotations=_structures(table))
                table = [{key: value for key, value in row.items() if key != "class"} for row in table]
            save(devkit / f"cars_{split}_annos.mat", annotations=_structures(table))
    elif layout == "one-folder":
        table = [
            {
                "relative_im_path": car.image_id, **_corners(car), "class": np.uint8(car.label + 1),
                "test": np.uint8(not car.is_train),
            }
            for car in cars
        ]  # fmt: skip
        save(root / "cars_annos.mat", annotations=_structures(table), class_names=names)
    else:
        (root / "names.csv").write_text("".join(f"{name}\n" for name in CLASSES))
        for split, part in parts.items():
            with (root / f"anno_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([Path(car.image_id).name, *car.box, car.label + 1] for car in part)
    return cars


def _corners(car: Car) -> dict[str, np.generic]:
    return {name: np.uint8(value) for name, value in zip(CORNERS, car.box)}


def _structures(rows: list[dict]) -> np.ndarray:
    """An array of structures, 1 x n as MATLAB has them."""
    table = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for place, row in enumerate(rows):
        table[0, place] = tuple(row.values())
    return table


def _draw(car: Car, path: Path, *, grey: bool) -> None:
    height, width = car.size
    x0, y0, x1, y1 = car.box
    picture = np.full((height, width), 30, np.uint8)
    picture[y0:y1, x0:x1] = 220
    if not grey:
        picture = np.stack([picture, picture // 2, 255 - picture], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=95)
