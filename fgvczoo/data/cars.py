"""Stanford Cars (Krause et al. 2013), which metric learning calls CARS196, in the layouts that are about.

Boxes are x0, y0, x1, y1: the corners as the annotations have them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule, check_class_names
from fgvczoo.data.mat import read_mat
from fgvczoo.data.official import (
    Archive,
    Official,
    Protocol,
    by_protocol,
    check_boxes,
    check_listed,
    check_unique,
    find_folder,
    read_text,
)
from fgvczoo.errors import FgvczooError

FOLDER = "stanford_cars"
_LABELS = "cars_test_annos_withlabels.mat"
_GET = (
    f"expected cars_train/, cars_test/, devkit/ and {_LABELS}; or car_ims/ and cars_annos.mat; or car_data/, "
    "names.csv, anno_train.csv and anno_test.csv; the authors' site is gone, docs/data/cars.md says more"
)
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
_CLASSES, _FIRST_CLASS = 196, "AM General Hummer SUV 2000"
_TRAIN, _TEST = 8_144, 8_041  # of the real set


class Cars(Official):
    """The rows of Stanford Cars in the order of its annotations; where these are two lists, those of training first.

    root: the folder that holds one of these layouts, or holds it as `stanford_cars/`:
        `cars_train/`, `cars_test/`, `devkit/`, and `cars_test_annos_withlabels.mat` beside `devkit/` or in it;
        `car_ims/` and `cars_annos.mat`;
        `car_data/{train,test}/CLASS/`, `names.csv`, `anno_train.csv` and `anno_test.csv`.
    cropped: use the box of each car as the picture.
    protocol: "standard", the official split, or "metric-learning", the halves of the classes; see `by_protocol`.

    Labels are those of the annotations, whatever the order of folders. Other sizes than the real set's are read alike;
    counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        image_ids: (N,) paths as the layout has them, such as cars_train/00001.jpg: names of files occur twice.
        folder: where the layout lies.
    """

    name = "cars"
    archives = (
        Archive("cars_train.tgz", "065e5b463ae28d29e77c1b4b166cfe61"),
        Archive("cars_test.tgz", "4ce7ebf6a94d07f1952d94dd34c4d501"),
        Archive("car_devkit.tgz", "c3b158d763b6e2245038c8ad08e45376"),
        Archive("cars_test_annos_withlabels.mat", "b0a2b23655a3edd16d84508592a98d10"),
        Archive("car_ims.tgz"),
    )
    keys = ("bbox",)

    def __init__(self, root: str | Path | None, *, cropped: bool = False, protocol: Protocol = "standard") -> None:
        self.folder, annotations, read = _find(root)
        self.cropped = cropped
        lists, self.all_class_names = read(self.folder, annotations)
        for part in lists:
            part.check(self.folder, len(self.all_class_names))
        self.image_ids = np.array([image_id for part in lists for image_id in part.image_ids], TEXT)
        self._files = [file for part in lists for file in part.files]
        self.labels = np.concatenate([part.numbers for part in lists]).astype(np.int64) - 1
        self._boxes = np.concatenate([part.boxes for part in lists])  # (N, 4) float64
        is_train = np.concatenate([part.is_train for part in lists])
        found = int(is_train.sum()), int((~is_train).sum())
        is_real = len(self.all_class_names) == _CLASSES and self.all_class_names[0] == _FIRST_CLASS
        if is_real and found != (_TRAIN, _TEST):
            raise FgvczooError(
                f"{self.folder}: {found[0]:,} images for training and {found[1]:,} for testing; expected "
                f"{_TRAIN:,} and {_TEST:,}; get its files again"
            )
        self.class_names, self.splits = by_protocol(protocol, self.all_class_names, self.labels, is_train)
        if not len(self.splits["train"]):
            raise FgvczooError(f"{annotations}: no training image")

    def picture(self, index: int) -> Path:
        return self.folder / self._files[index]

    def _read_bbox(self) -> np.ndarray:
        return self._boxes


class CarsDataModule(FGVCDataModule):
    """Stanford Cars. Its pictures are never downloaded here: `root` says where they are.

    root, cropped, protocol: see `Cars`. options: see `FGVCDataModule`. Keys: bbox.
    """

    reader_class = Cars

    def __init__(
        self, root: str | None = None, cropped: bool = False, protocol: Protocol = "standard", **options: Any
    ) -> None:
        super().__init__(Cars(root, cropped=cropped, protocol=protocol), **options)


@dataclass
class _List:
    """Images that one file lists."""

    source: Path
    image_ids: list[str]
    files: list[str]  # relative to the folder of the layout
    numbers: np.ndarray  # (n,) classes, from 1
    boxes: np.ndarray  # (n, 4)
    is_train: np.ndarray  # (n,) bool

    def check(self, folder: Path, classes: int) -> None:
        """`FgvczooError` where the list does not fit itself, its classes or its files."""
        check_unique(self.image_ids, self.source)
        wrong = np.flatnonzero(~((self.numbers >= 1) & (self.numbers <= classes) & (self.numbers % 1 == 0)))
        if len(wrong):
            image_id, number = self.image_ids[wrong[0]], self.numbers[wrong[0]]
            raise FgvczooError(f"{self.source}: {image_id!r} has class {number:g}; expected 1..{classes}")
        check_boxes(self.source, self.image_ids, self.boxes)
        check_listed(folder, self.files, self.source)


def _find(root: str | Path | None) -> tuple[Path, Path, Callable[[Path, Path], tuple[list[_List], list[str]]]]:
    """The folder of the layout, its annotations, and what reads them."""
    layouts = (
        ("devkit/cars_train_annos.mat", _two_folders),
        ("car_devkit/devkit/cars_train_annos.mat", _two_folders),
        ("cars_annos.mat", _one_folder),
        ("anno_train.csv", _class_folders),
    )
    folder = find_folder(root, (".", FOLDER), [file for file, _ in layouts], archives=Cars.archives, get=_GET)
    return next((folder, folder / file, read) for file, read in layouts if (folder / file).is_file())


def _two_folders(folder: Path, train: Path) -> tuple[list[_List], list[str]]:
    devkit = train.parent
    places = [place / _LABELS for place in (folder, devkit.parent, devkit)]
    test = next((file for file in places if file.is_file()), None)
    if test is None:
        raise FgvczooError(
            f"{folder / _LABELS} is missing, and the test images of devkit/ have no labels; put it there or in devkit/"
        )
    lists = []
    for file, top in ((train, "cars_train"), (test, "cars_test")):
        table = _annotations(file)
        names = _texts(file, table, "fname")
        files = [f"{_unpacked(folder, top)}/{name}" for name in names]
        is_train = np.full(len(names), file is train)
        numbers, boxes = _numbers(file, table, "class"), _boxes(file, table)
        lists.append(_List(file, [f"{top}/{name}" for name in names], files, numbers, boxes, is_train))
    return lists, _class_names(devkit / "cars_meta.mat")


def _one_folder(folder: Path, file: Path) -> tuple[list[_List], list[str]]:
    table = _annotations(file)
    paths = _texts(file, table, "relative_im_path")
    numbers, boxes, is_test = _numbers(file, table, "class"), _boxes(file, table), _numbers(file, table, "test")
    wrong = np.flatnonzero((is_test != 0) & (is_test != 1))
    if len(wrong):
        raise FgvczooError(f"{file}: test is {is_test[wrong[0]]:g} for {paths[wrong[0]]!r}; expected 0 or 1")
    meta = next((path for path in (folder / "devkit/cars_meta.mat", folder / "cars_meta.mat") if path.is_file()), file)
    files = [f"{_unpacked(folder, 'car_ims')}/{path.removeprefix('car_ims/')}" for path in paths]
    return [_List(file, paths, files, numbers, boxes, is_test == 0)], _class_names(meta)


def _class_folders(folder: Path, train: Path) -> tuple[list[_List], list[str]]:
    names_file = folder / "names.csv"
    class_names = [",".join(line) for line in csv.reader(read_text(names_file).splitlines())]
    check_class_names(class_names, str(names_file))
    lists = []
    for file, split in ((train, "train"), (folder / "anno_test.csv", "test")):
        lines = list(csv.reader(read_text(file).splitlines()))
        try:
            table = np.array([[float(value) for value in line[1:]] for line in lines]).reshape(-1, 5)
        except ValueError:
            raise FgvczooError(f"{file}: expected lines of file,x1,y1,x2,y2,class") from None
        numbers, paths = table[:, 4], []
        for line, number in zip(lines, numbers):
            inside = number % 1 == 0 and 1 <= number <= len(class_names)
            # A class that is none is refused with the rest of the list.
            class_name = class_names[int(number) - 1].replace("/", "-") if inside else ""
            paths.append(f"{split}/{class_name}/{line[0]}")
        top = _unpacked(folder, "car_data")
        files = [f"{top}/{path}" for path in paths]
        is_train = np.full(len(paths), split == "train")
        lists.append(_List(file, [f"car_data/{path}" for path in paths], files, numbers, table[:, :4], is_train))
    return lists, class_names


def _unpacked(folder: Path, name: str) -> str:
    """A folder as it unpacks, or, as in copies that are about, once more inside itself."""
    return f"{name}/{name}" if (folder / name / name).is_dir() else name


def _annotations(file: Path) -> dict[str, list[Any]]:
    """Field -> values of all annotations."""
    table = read_mat(file, "annotations")
    if not isinstance(table, dict):
        raise FgvczooError(f"{file}: annotations are no list of structures; get it again")
    return table


def _column(file: Path, table: dict[str, list[Any]], field: str) -> list[Any]:
    if field not in table:
        raise FgvczooError(f"{file}: annotations without {field}, only {', '.join(map(repr, table))}; get it again")
    return table[field]


def _texts(file: Path, table: dict[str, list[Any]], field: str) -> list[str]:
    values = _column(file, table, field)
    if not all(isinstance(value, str) for value in values):
        raise FgvczooError(f"{file}: {field} is not one text in every annotation; get it again")
    return values


def _numbers(file: Path, table: dict[str, list[Any]], field: str) -> np.ndarray:
    """(n,) float64: the integers of a file are as small as can be, and their differences may not fit."""
    values = _column(file, table, field)
    if not all(isinstance(value, (int, float)) for value in values):
        raise FgvczooError(f"{file}: {field} is not one number in every annotation; get it again")
    return np.array(values, np.float64)


def _boxes(file: Path, table: dict[str, list[Any]]) -> np.ndarray:
    return np.stack([_numbers(file, table, corner) for corner in _CORNERS], axis=1)


def _class_names(file: Path) -> list[str]:
    names = read_mat(file, "class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FgvczooError(f"{file}: class_names are no list of texts; get it again")
    check_class_names(names, str(file))
    return names
