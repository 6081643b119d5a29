"""ImageNet-1k (Russakovsky et al. 2015) with the boxes of its localisation task, in the layouts that are about.

The folders are listed once into the cache, see `Official.take_cached`. Boxes are x0, y0, x1, y1: the corners as the
annotations have them, several an image.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule
from fgvczoo.data.mat import read_mat
from fgvczoo.data.official import Archive, Official, find_folder, read_text
from fgvczoo.data.xml import read_objects
from fgvczoo.errors import FgvczooError

_GET = (
    "expected train/WNID/ and val/ (with WNID/ in it; or flat, beside LOC_val_solution.csv or the devkit), in the "
    "folder or in its ILSVRC/Data/CLS-LOC/; image-net.org gives the archives to who registers"
)
_FORMAT = 1  # of the cached file
_CLASSES, _TRAIN, _TEST = 1_000, 1_281_167, 50_000  # of the real set
_ENDINGS = (".jpeg", ".jpg", ".png")
_SOLUTION, _NAMES = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_DEVKIT = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
# Where boxes of validation images lie as XML, one file an image.
_XML = ("ILSVRC/Annotations/CLS-LOC/val", "Annotations/CLS-LOC/val", "bbox_val", "val_annotations")


class ImageNet(Official):
    """The rows of ImageNet-1k: those of training by class and name, then the 50,000 of validation, which are "test"
    here, as papers report them; the organisers' test images have no labels.

    root: the folder that holds `train/` and `val/`, or `ILSVRC/Data/CLS-LOC/` with them. `val/` holds a folder for each
        class; or all files, with `LOC_val_solution.csv` in the root, or the devkit's ground truth and `meta.mat`, which
        maps its numbers. Labels are ranks of the WordNet ids.
    first: only so many classes, the first (Concept-Centric Transformers: 200).

    Boxes of validation images come from `LOC_val_solution.csv`, else from XML files (`Annotations/CLS-LOC/val/`,
    `bbox_val/`). Other sizes than the real set's are read alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        image_ids: (N,) paths such as train/n01440764/n01440764_18.JPEG.
        wordnet_ids: of the labels.
    """

    name = "imagenet"
    archives = (
        Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", True),
        Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", True),
        Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", True),
    )
    keys, optional = ("boxes",), ("boxes",)

    def __init__(self, root: str | Path | None, *, first: int | None = None) -> None:
        inner = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
        self.folder = self.pictures = find_folder(root, inner, ("train",), archives=self.archives, get=_GET)
        assert root is not None  # or it had not been found
        self.root = Path(root)
        every = sorted(entry.name for entry in os.scandir(self.folder / "train") if entry.is_dir())
        if first is not None and not 2 <= first <= len(every):
            raise FgvczooError(f"first={first}; expected 2..{len(every)} classes")
        self.wordnet_ids = every[:first]
        if len(self.wordnet_ids) < 2:
            raise FgvczooError(f"{self.folder / 'train'}: {len(self.wordnet_ids)} class folders; {_GET}")
        self.take_cached(_FORMAT, self._sources(), lambda: self._make(set(every)))
        self.class_names = self._class_names()

    def _sources(self) -> list[Path]:
        """The folders that are listed, and what gives the classes of a flat one."""
        if not (self.folder / "val").is_dir():
            raise FgvczooError(f"{self.folder}: no val/; {_GET}")
        val = {entry.name for entry in os.scandir(self.folder / "val") if not entry.name.lower().endswith(_ENDINGS)}
        places = [self.root / inner for inner in _DEVKIT]
        files = [self.root / _SOLUTION, *(place / name for place in places for name in (_TRUTH, "meta.mat"))]
        return [
            self.folder / "train",
            *(self.folder / "train" / wnid for wnid in self.wordnet_ids),
            self.folder / "val",
            *(self.folder / "val" / wnid for wnid in self.wordnet_ids if wnid in val),
            *(file for file in files if file.is_file()),
        ]

    def _make(self, every: set[str]) -> None:
        labels_of = {wnid: label for label, wnid in enumerate(self.wordnet_ids)}
        train, test = self._of_folders("train"), self._validation(labels_of, every)
        for split, listed in (("train", train), ("val", test)):
            if not listed:
                raise FgvczooError(f"{self.folder / split}: no image; {_GET}")
        found = len(train), len(test)
        if len(self.wordnet_ids) == _CLASSES and found != (_TRAIN, _TEST):
            raise FgvczooError(
                f"{self.folder}: {found[0]:,} images for training and {found[1]:,} for validation; expected {_TRAIN:,} "
                f"and {_TEST:,}; unpack the archives again"
            )
        self._files = np.array([path for path, _ in train + test], TEXT)
        self.labels = np.array([labels_of[wnid] for _, wnid in train + test], np.int64)
        self.class_names = self.wordnet_ids
        rows = np.arange(len(self.labels))
        self.splits = {"train": rows[: len(train)], "test": rows[len(train) :]}

    def _read_boxes(self) -> _Boxes:
        if not self._solution and self._xml is None:
            raise FgvczooError(
                f"{self.root}: no boxes of validation images; put {_SOLUTION} there, or the XML files of "
                f"ILSVRC2012_bbox_val_v3.tgz in {_XML[2]}/"
            )
        return _Boxes(self)

    def row(self, index: int) -> dict[str, Any]:
        """As of any set, with `boxes`, where there are any: training images have none."""
        boxes = self.boxes(index)
        return {**super().row(index), **({"boxes": boxes.tolist()} if len(boxes) else {})}

    def boxes(self, index: int) -> np.ndarray:
        """(n, 4) float64; none of a training image."""
        stem = Path(str(self._files[index])).stem
        if stem in self._solution:
            return np.array(self._solution[stem][1], np.float64).reshape(-1, 4)
        if self._xml is None or not (file := self._xml / f"{stem}.xml").is_file():
            return np.zeros((0, 4))
        return np.array([corners for _, corners in read_objects(file)], np.float64).reshape(-1, 4)

    @cached_property
    def _xml(self) -> Path | None:
        return next((self.root / name for name in _XML if (self.root / name).is_dir()), None)

    def _of_folders(self, split: str) -> list[tuple[str, str]]:
        """(path, WordNet id) of all images in the folders of the classes."""
        listed = []
        for wnid in self.wordnet_ids:
            folder = self.folder / split / wnid
            names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
            listed += [(f"{split}/{wnid}/{name}", wnid) for name in sorted(names) if name.lower().endswith(_ENDINGS)]
        return listed

    def _validation(self, labels_of: dict[str, int], known: set[str]) -> list[tuple[str, str]]:
        flat = sorted(entry.name for entry in os.scandir(self.folder / "val") if entry.name.lower().endswith(_ENDINGS))
        if not flat:
            return self._of_folders("val")
        classes, source = {name: wnid for name, (wnid, _) in self._solution.items()}, self.root / _SOLUTION
        if not classes:
            classes, source = self._of_devkit()
        listed = []
        for name in flat:
            wnid = classes.get(Path(name).stem)
            if wnid is None:
                raise FgvczooError(f"{self.folder / 'val' / name}: its class is not known; {_GET}")
            if wnid not in known:
                raise FgvczooError(f"{source}: {name} has class {wnid}, which train/ does not have")
            if wnid in labels_of:
                listed.append((f"val/{name}", wnid))
        return listed

    def _of_devkit(self) -> tuple[dict[str, str], Path]:
        """Name -> WordNet id by the devkit, whose numbers are another order than that of the ids; and its file."""
        places = [self.root / inner for inner in _DEVKIT if (self.root / inner / _TRUTH).is_file()]
        if not places:
            return {}, self.root
        file, meta = places[0] / _TRUTH, places[0] / "meta.mat"
        table = read_mat(meta, "synsets")
        numbers, wnids = (table.get(key) if isinstance(table, dict) else None for key in ("ILSVRC2012_ID", "WNID"))
        if not numbers or not wnids or not all(isinstance(wnid, str) for wnid in wnids):
            raise FgvczooError(f"{meta}: synsets without ILSVRC2012_ID and WNID; get it again")
        of_number = dict(zip(map(str, numbers), wnids))
        truth = read_text(file).split()
        if unknown := [number for number in truth if number not in of_number]:
            raise FgvczooError(f"{file}: class {unknown[0]!r} is not in {meta.name}")
        return {f"ILSVRC2012_val_{place:08d}": of_number[number] for place, number in enumerate(truth, 1)}, file

    @cached_property
    def _solution(self) -> dict[str, tuple[str, list[float]]]:
        """Name -> WordNet id and corners, of `LOC_val_solution.csv`; empty without it."""
        file = self.root / _SOLUTION
        if not file.is_file():
            return {}
        found = {}
        for line in csv.DictReader(read_text(file).splitlines()):
            words = (line.get("PredictionString") or "").split()
            try:
                corners = [float(number) for place, number in enumerate(words) if place % 5]
                if not words or len(words) % 5:
                    raise ValueError
                found[line["ImageId"]] = (words[0], corners)
            except (KeyError, ValueError):
                raise FgvczooError(
                    f"{file}: {line} is not ImageId, PredictionString with a class and four corners for each box"
                ) from None
        return found

    def _class_names(self) -> list[str]:
        """WordNet id and first name: names alone occur twice."""
        file = self.root / _NAMES
        if not file.is_file():
            return list(self.wordnet_ids)
        names = dict(line.partition(" ")[::2] for line in read_text(file).splitlines())
        return [f"{wnid} {names[wnid].split(',')[0]}" if wnid in names else wnid for wnid in self.wordnet_ids]


@dataclass(frozen=True)
class _Boxes:
    """Boxes of the rows, read when they are asked for: they lie in fifty thousand files."""

    reader: ImageNet

    def __getitem__(self, index: int) -> np.ndarray:
        return self.reader.boxes(index)


class ImageNetDataModule(FGVCDataModule):
    """ImageNet-1k. Its pictures are never downloaded here: `root` says where they are.

    root, first: see `ImageNet`. options: see `FGVCDataModule`. Keys: boxes.
    """

    reader_class = ImageNet

    def __init__(self, root: str | None = None, first: int | None = None, **options: Any) -> None:
        super().__init__(ImageNet(root, first=first), **options)
