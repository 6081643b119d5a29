"""The lists of the benchmark of weakly supervised localisation (Choe et al. 2020): CUB with CUBV2, ImageNet with
ImageNetV2, and OpenImages30k, each with a small validation set whose boxes or masks are known.

Boxes are x0, y0, x1, y1: the corners as the lists have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.official import (
    Official,
    Part,
    Ragged,
    check_boxes,
    check_choice,
    check_path,
    find_folder,
    join,
    read_lines,
    read_text,
    to_labels,
    to_numbers,
)
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import image_size, read_image

Name = Literal["CUB", "ILSVRC", "OpenImages"]
_GET = "expected metadata/NAME/{train,val,test}/ of the benchmark, and the pictures in dataset/NAME/"
_REAL = {  # classes, and images by split
    "CUB": (200, {"train": 5_994, "val": 1_000, "test": 5_794}),
    "ILSVRC": (1_000, {"train": 1_281_167, "val": 10_000, "test": 50_000}),
    "OpenImages": (100, {"train": 29_819, "val": 2_500, "test": 5_000}),
}
_OBJECT = 128  # a mask is grey: from here on a pixel is of it
_IGNORE = 255


class WSOL(Official):
    """The rows of one data set of the benchmark: those of training, of validation, of testing, as its lists have them.

    root: the folder that holds `metadata/NAME/{train,val,test}/` with `image_ids.txt`, `class_labels.txt` and
        `localization.txt`, and the pictures in `dataset/NAME/`.
    dataset: NAME: "CUB" (validation: CUBV2), "ILSVRC" (ImageNetV2), "OpenImages" (OpenImages30k).

    Boxes (CUB, ILSVRC) are several a picture, of which any counts; training images have none. Masks (OpenImages) are
    the union of those of all objects, 1; what the list says to ignore, and no object covers, is 255; a training image,
    of which nothing is known, is 255 all over. Other sizes than the real set's are read alike; counts are asserted
    where it is the real set.
    """

    name = "wsol"

    def __init__(self, root: str | Path | None, *, dataset: Name = "OpenImages") -> None:
        check_choice("dataset", dataset, get_args(Name))
        self.folder = find_folder(root, (".", "wsolevaluation"), (f"metadata/{dataset}",), get=_GET)
        self.pictures = self.folder / "dataset" / dataset
        self._lists = self.folder / "metadata" / dataset
        read = {split: self._list(split) for split in ("train", "val", "test")}
        numbers = [number for _, lines in read.values() for _, number in lines]
        count = 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 5), default=0)
        parts = []
        for split, (paths, lines) in read.items():
            file = self._lists / split / "class_labels.txt"
            labels = to_labels(file, [number for (number,) in join(file, paths, lines)], 0, count)
            parts.append(Part(self._lists / split / "image_ids.txt", split, paths, labels))
        self.keys = ("mask",) if dataset == "OpenImages" else ("boxes",)
        classes, real = _REAL[dataset]
        self.take(parts, self._class_names(parts[0], count), real=real if count == classes else None)

    def _list(self, split: str) -> tuple[list[str], list[list[str]]]:
        """Paths, and lines of path and class."""
        folder = self._lists / split
        if not folder.is_dir():
            raise FgvczooError(f"{folder}: no such folder; {_GET}")
        lines = read_lines(folder / "class_labels.txt", 2, "an image and its class", separator=",")
        paths = [line.strip() for line in read_text(folder / "image_ids.txt").splitlines() if line.strip()]
        return paths, lines

    def _class_names(self, train: Part, count: int) -> list[str]:
        """Folders of the classes in the list of training: the lists have no names."""
        folders: dict[int, str] = {}
        for path, label in zip(train.paths, train.labels.tolist()):
            folders.setdefault(label, str(path).split("/")[-2] if "/" in path else str(label))
        return [folders.get(label, str(label)) for label in range(count)]

    def _localization(self, cells: int, what: str) -> dict[str, list[list[str]]]:
        """Path -> the rest of its lines, of validation and testing."""
        found: dict[str, list[list[str]]] = {}
        for split in ("val", "test"):
            file = self._lists / split / "localization.txt"
            for line in read_text(file).splitlines():
                path, *rest = (cell.strip() for cell in line.split(","))
                if path and len(rest) != cells:
                    raise FgvczooError(f"{file}: {line[:80]!r}; expected {what}")
                if path:
                    found.setdefault(path, []).append(rest)
        return found

    def _read_boxes(self) -> Ragged:
        listed = self._localization(4, "an image and four corners")
        own = [listed.get(str(path), []) for path in self._files]
        lines = [line for lines in own for line in lines]
        counts = np.array([len(lines) for lines in own])
        if len(missing := np.flatnonzero((counts == 0) & (np.arange(len(own)) >= len(self.splits["train"])))):
            raise FgvczooError(f"{self._lists}: no box of {str(self._files[missing[0]])!r} in localization.txt")
        boxes = to_numbers(self._lists, lines, 4)
        return Ragged(check_boxes(self._lists, self._files[np.repeat(np.arange(len(own)), counts)], boxes), counts)

    def _read_mask(self) -> _Masks:
        listed = self._localization(2, "an image, a mask and one of what is ignored")
        for lines in listed.values():
            for cell in (cell for line in lines for cell in line if cell):
                check_path(cell, self._lists)
        return _Masks(self, listed)


class _Masks:
    def __init__(self, reader: WSOL, listed: dict[str, list[list[str]]]) -> None:
        self.reader, self.listed = reader, listed

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W) uint8."""
        folder, picture = self.reader.pictures, self.reader.picture(index)
        lines = self.listed.get(str(self.reader._files[index]))
        if not lines:
            return np.full(image_size(picture), _IGNORE, np.uint8)
        found: np.ndarray | None = None
        ignored: np.ndarray | None = None
        for mask, ignore in lines:
            own = read_image(folder / mask)[..., 0] >= _OBJECT
            found = own if found is None else _joined(found, own, folder / mask)
            if ignore:
                ignored = read_image(folder / ignore)[..., 0] >= _OBJECT
        assert found is not None  # there is a line
        whole = found.astype(np.uint8)
        if ignored is not None:
            whole[_joined(found, ignored, picture) & ~found] = _IGNORE
        return whole


def _joined(one: np.ndarray, other: np.ndarray, file: object) -> np.ndarray:
    if one.shape != other.shape:
        raise FgvczooError(f"{file}: a mask of {other.shape}, another of {one.shape}")
    return one | other


class WSOLDataModule(FGVCDataModule):
    """A data set of the benchmark of weakly supervised localisation. Nothing is downloaded here: `root` says where it
    is.

    root, dataset: see `WSOL`. options: see `FGVCDataModule`. Keys: boxes, or of OpenImages mask (1 object, 255
        ignored).
    """

    reader_class = WSOL

    def __init__(self, root: str | None = None, dataset: Name = "OpenImages", **options: Any) -> None:
        super().__init__(WSOL(root, dataset=dataset), **options)
