"""Stanford Online Products (Oh Song et al. 2016) in its official layout: products of a shop, a class each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule
from fgvczoo.data.official import (
    Archive,
    Official,
    check_listed,
    check_unique,
    disjoint_splits,
    find_folder,
    read_text,
)
from fgvczoo.errors import FgvczooError

FOLDER = "Stanford_Online_Products"
_GET = f"get {FOLDER}.zip, unpack it, and give the folder that holds {FOLDER}/"
_HEADER = ["image_id", "class_id", "super_class_id", "path"]
# Of the real set: classes and images of training, then of testing.
_CLASSES, _IMAGES = (11_318, 11_316), (59_551, 60_502)


class SOP(Official):
    """The rows of Stanford Online Products, those of Ebay_train.txt first, then those of Ebay_test.txt.

    root: the folder that holds `Stanford_Online_Products/`, or that folder itself.

    Its official split is one of classes: those of "train" are not those of "test", "query" and "gallery". Labels count
    on from one to the other, so those of test images are beyond `class_names`. Other sizes than the real set's are read
    alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        image_ids: (N,) paths, such as bicycle_final/111085122871_0.JPG.
        super_class_names: of the numbers in the batch key `label_levels` (B, 1).
    """

    name = "sop"
    archives = (Archive("Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e"),)
    keys = ("label_levels",)

    def __init__(self, root: str | Path | None) -> None:
        self.folder = find_folder(root, (FOLDER, "."), ("Ebay_train.txt",), archives=self.archives, get=_GET)
        lists = [_read(self.folder / f"Ebay_{split}.txt") for split in ("train", "test")]
        paths = [path for listed, _ in lists for path in listed]
        self.image_ids = np.array(paths, TEXT)
        numbers = np.concatenate([numbers for _, numbers in lists])
        self.labels, self._super = numbers.T - 1
        first, second = (np.unique(numbers[:, 0]) for _, numbers in lists)
        for split, found, start in (("train", first, 1), ("test", second, len(first) + 1)):
            if not np.array_equal(found, np.arange(start, start + len(found))):
                raise FgvczooError(
                    f"{self.folder / f'Ebay_{split}.txt'}: its classes are not {start}..{start + len(found) - 1}, each "
                    f"with an image; expected those of training first, then those of testing; {_GET}"
                )
        images = tuple(len(listed) for listed, _ in lists)
        if (len(first), len(second)) == _CLASSES and images != _IMAGES:
            raise FgvczooError(
                f"{self.folder}: {images[0]:,} images for training and {images[1]:,} for testing; expected "
                f"{_IMAGES[0]:,} and {_IMAGES[1]:,}; unpack the archive again"
            )
        self._read_super_classes(paths)
        self.all_class_names = [
            f"{self.super_class_names[number]}_{label + 1:05d}" for label, number in enumerate(self._super_of_class)
        ]
        self.class_names = self.all_class_names[: len(first)]
        self.splits = disjoint_splits(np.arange(len(paths)) < images[0])
        source = self.folder / "Ebay_train.txt and Ebay_test.txt"
        check_unique(paths, source)
        check_listed(self.folder, paths, source)

    def picture(self, index: int) -> Path:
        return self.folder / str(self.image_ids[index])

    def _read_label_levels(self) -> np.ndarray:
        return self._super[:, None]

    def _read_super_classes(self, paths: list[str]) -> None:
        """Their names, which are those of the folders, and the one of each class."""
        numbers, firsts = np.unique(self._super, return_index=True)
        if numbers.tolist() != list(range(len(numbers))):
            raise FgvczooError(f"{self.folder}: super_class_id is not 1..{len(numbers)}, each with an image")
        self.super_class_names = [paths[row].partition("/")[0].removesuffix("_final") for row in firsts]
        _, firsts = np.unique(self.labels, return_index=True)
        self._super_of_class = self._super[firsts]
        wrong = np.flatnonzero(self._super != self._super_of_class[self.labels])
        if len(wrong):
            raise FgvczooError(f"{self.folder}: class {self.labels[wrong[0]] + 1} is in two super classes")


class SOPDataModule(FGVCDataModule):
    """Stanford Online Products. Its pictures are never downloaded here: `root` says where they are.

    root: see `SOP`. options: see `FGVCDataModule`. Keys: label_levels (B, 1), the super class.
    """

    reader_class = SOP

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(SOP(root), **options)


def _read(file: Path) -> tuple[list[str], np.ndarray]:
    """The paths of a list, and (n, 2) int64: class and super class, from 1."""
    lines = read_text(file).splitlines()
    if not lines or lines[0].split() != _HEADER:
        raise FgvczooError(f"{file}: line 1 is {''.join(lines[:1])[:80]!r}; expected {' '.join(_HEADER)}")
    paths, numbers = [], []
    for place, line in enumerate(lines[1:], 2):
        cells = line.split(maxsplit=3)
        if len(cells) != 4 or not all(cell.isdecimal() and len(cell) < 10 for cell in cells[:3]):
            raise FgvczooError(f"{file}: line {place} is {line[:80]!r}; expected three numbers and a path")
        paths.append(cells[3])
        numbers.append((int(cells[1]), int(cells[2])))
    if not paths:
        raise FgvczooError(f"{file}: lists no image")
    return paths, np.array(numbers, np.int64)
