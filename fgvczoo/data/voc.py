"""PASCAL VOC 2012 (Everingham et al.) for segmentation: the classes of a picture, its boxes and its mask.

Boxes are x0, y0, x1, y1 in pixels from 0, ends exclusive; the annotations count from 1 and inclusively.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule, Reader
from fgvczoo.data.official import check_listed, read_text
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import read_mask

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
FOLDER = "VOCdevkit/VOC2012"
_GET = f"get VOCtrainval_11-May-2012.tar, unpack it, and give the folder that holds {FOLDER}/"
_AUGMENTED = ("train_aug.txt", "trainaug.txt")
_TRAIN, _TEST, _TRAIN_AUG = 1_464, 1_449, 10_582  # of the real set


class VOC(Reader):
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
    licence_allows_pictures = False  # photographs from Flickr
    keys = ("labels", "boxes", "mask")

    def __init__(self, root: str | Path | None, *, augmented: bool = False, test: str = "val") -> None:
        if test not in ("val", "train"):
            raise FgvczooError(f"test={test!r}; expected 'val' or 'train'")
        self.folder = _find(root)
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

    def require(self, keys: Sequence[str]) -> None:
        if "mask" in keys and not self._masks.is_dir():
            raise FgvczooError(f"{self._masks}: no such folder; {_GET}")

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        notes: dict[str, Any] = {}
        name = str(self.image_ids[index])
        if "labels" in keys:
            notes["labels"] = self.multi[index]
        if "boxes" in keys:
            notes["boxes"] = np.array([box for _, box in self._objects(name)], np.float64).reshape(-1, 4)
        if "mask" in keys:
            file = self._masks / f"{name}.png"
            if not file.is_file():  # the augmented folder may hold what the archive does not, and the other way round
                file = self.folder / "SegmentationClass" / f"{name}.png"
            notes["mask"] = read_mask(file)
        return notes

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
    try:
        found = []
        for item in ElementTree.fromstring(read_text(file)).iter("object"):
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
            found.append((CLASSES.index(item.findtext("name", "")), [x0 - 1, y0 - 1, x1, y1]))
        return found
    except (ElementTree.ParseError, ValueError) as error:
        raise FgvczooError(f"{file}: {error}; expected objects of the {len(CLASSES)} classes with a bndbox") from None


class VOCDataModule(FGVCDataModule):
    """PASCAL VOC 2012. Its pictures are never downloaded here: `root` says where they are.

    root, augmented, test: see `VOC`. options: see `FGVCDataModule`. Keys: labels (C = 20), boxes, mask (0 background,
    classes from 1, 255 ignored).
    """

    def __init__(self, root: str | None = None, augmented: bool = False, test: str = "val", **options: Any) -> None:
        super().__init__(VOC(root, augmented=augmented, test=test), **options)


def _find(root: str | Path | None) -> Path:
    if root is None:
        raise FgvczooError(f"root is not given; {_GET}")
    root = Path(root)
    for folder in (root / FOLDER, root / "VOC2012", root):
        if (folder / "JPEGImages").is_dir():
            return folder
    if not root.is_dir():
        raise FgvczooError(f"{root}: no such folder; {_GET}")
    raise FgvczooError(f"{root}: no JPEGImages/ in it or in {FOLDER}/; {_GET}")
