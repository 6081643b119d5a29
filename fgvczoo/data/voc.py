"""PASCAL VOC 2012 (Everingham et al.) for segmentation: the classes of a picture, its boxes and its mask.

Boxes are x0, y0, x1, y1 in pixels from 0, ends exclusive; the annotations count from 1 and inclusively.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule
from fgvczoo.data.official import Archive, Masks, Official, Ragged, check_choice, check_listed, find_folder, read_text
from fgvczoo.data.xml import read_objects
from fgvczoo.errors import FgvczooError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
FOLDER = "VOCdevkit/VOC2012"
_GET = f"get VOCtrainval_11-May-2012.tar, unpack it, and give the folder that holds {FOLDER}/"
_AUGMENTED = ("train_aug.txt", "trainaug.txt")
_TRAIN, _TEST, _TRAIN_AUG = 1_464, 1_449, 10_582  # of the real set


class VOC(Official):
    """The rows of the segmentation lists: those of training, then those of validation.

    root: the folder that holds `VOCdevkit/VOC2012/`, or that folder itself.
    augmented: train on the 10,582 images for which Hariharan et al. have masks, too: needs `SegmentationClassAug/` and
        its list, `train_aug.txt` or `trainaug.txt`, in `ImageSets/Segmentation/`.
    test: which official images "test" are: "val", as segmentation is reported; "train", on which seeds are judged,
        whose classes are known and whose masks did not train.

    A picture has several classes, which are the batch's `labels`; `label` is the first of them. Raises `FgvczooError`
    for what is missing, and for another `test`.
    """

    name = "voc"
    archives = (Archive("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd", True),)
    keys = ("labels", "boxes", "mask")

    def __init__(self, root: str | Path | None, *, augmented: bool = False, test: str = "val") -> None:
        check_choice("test", test, ("val", "train"))
        self.folder = find_folder(root, (FOLDER, "VOC2012", "."), ("JPEGImages",), archives=self.archives, get=_GET)
        official, validation = self._list("train.txt"), self._list("val.txt")
        lists = [name for name in _AUGMENTED if self._set(name).is_file()] or [_AUGMENTED[0]]
        train = self._list(lists[0]) if augmented else official
        if len(official) == _TRAIN and len(validation) == _TEST and augmented and len(train) != _TRAIN_AUG:
            raise FgvczooError(f"{self.folder}: {len(train):,} augmented training images; expected {_TRAIN_AUG:,}")
        ids = list(dict.fromkeys([*train, *official, *validation]))
        self.class_names = list(CLASSES)
        self._masks = self.folder / ("SegmentationClassAug" if augmented else "SegmentationClass")
        check_listed(self.folder / "JPEGImages", [f"{name}.jpg" for name in ids], self._set("train.txt"))
        self.image_ids = np.array(ids, TEXT)
        place = {name: row for row, name in enumerate(ids)}
        self.splits = {
            split: np.array(sorted(place[name] for name in listed), np.int64)
            for split, listed in (("train", train), ("test", validation if test == "val" else official))
        }
        self.multi = np.zeros((len(ids), len(CLASSES)), np.uint8)  # (N, 20), which classes are there
        for row, name in enumerate(ids):
            self.multi[row, [label for label, _ in self._objects(name)]] = 1
        if not self.multi.any(axis=1).all():
            name = ids[int(np.flatnonzero(~self.multi.any(axis=1))[0])]
            raise FgvczooError(f"{self._xml(name)}: no object of the {len(CLASSES)} classes")
        self.labels = self.multi.argmax(axis=1).astype(np.int64)

    def picture(self, index: int) -> Path:
        return self.folder / "JPEGImages" / f"{self.image_ids[index]}.jpg"

    def _read_labels(self) -> np.ndarray:
        return self.multi

    def _read_boxes(self) -> Ragged:
        found = [[box for _, box in self._objects(str(name))] for name in self.image_ids]
        boxes = np.array([box for own in found for box in own], np.float64).reshape(-1, 4)
        return Ragged(boxes, np.array([len(own) for own in found]))

    def _read_mask(self) -> Masks:
        if not self._masks.is_dir():
            raise FgvczooError(f"{self._masks}: no such folder; {_GET}")
        # The augmented folder may hold what the archive does not, and the other way round.
        there = {entry.name for entry in self._masks.iterdir()}
        names = [f"{name}.png" for name in self.image_ids]
        return Masks(
            self.folder, [f"{self._masks.name if name in there else 'SegmentationClass'}/{name}" for name in names]
        )

    def row(self, index: int) -> dict[str, Any]:
        """As of any set, with `boxes` and `class_numbers`, all classes of the picture."""
        objects = self._objects(str(self.image_ids[index]))
        classes = np.flatnonzero(self.multi[index]).tolist()
        return {**super().row(index), "boxes": [box for _, box in objects], "class_numbers": classes}

    def _list(self, name: str) -> list[str]:
        """Ids of a list, whose lines are ids or paths of picture and mask."""
        file = self._set(name)
        if not file.is_file():
            raise FgvczooError(f"{file} is missing; {_GET}" + (", with the augmented list" if "aug" in name else ""))
        return [PurePosixPath(line.split()[0]).stem for line in read_text(file).splitlines() if line.strip()]

    def _set(self, name: str) -> Path:
        return self.folder / "ImageSets" / "Segmentation" / name

    def _xml(self, name: str) -> Path:
        return self.folder / "Annotations" / f"{name}.xml"

    def _objects(self, name: str) -> list[tuple[int, list[float]]]:
        return _objects(self._xml(name))


@cache
def _objects(file: Path) -> list[tuple[int, list[float]]]:
    """Class and box of every object of an annotation."""
    found = read_objects(file)
    for name, _ in found:
        if name not in CLASSES:
            raise FgvczooError(f"{file}: object {name!r}; expected one of the {len(CLASSES)} classes")
    return [(CLASSES.index(name), [x0 - 1, y0 - 1, x1, y1]) for name, (x0, y0, x1, y1) in found]


class VOCDataModule(FGVCDataModule):
    """PASCAL VOC 2012. Its pictures are never downloaded here: `root` says where they are.

    root, augmented, test: see `VOC`. options: see `FGVCDataModule`. Keys: labels (C = 20), boxes, mask (0 background,
    classes from 1, 255 ignored).
    """

    reader_class = VOC

    def __init__(self, root: str | None = None, augmented: bool = False, test: str = "val", **options: Any) -> None:
        super().__init__(VOC(root, augmented=augmented, test=test), **options)
