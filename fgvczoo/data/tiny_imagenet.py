"""Tiny-ImageNet in its official layout: 200 classes of ImageNet at 64 x 64 pixels.

Boxes are x0, y0, x1, y1: the corners as the annotations have them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.official import Archive, Official, Part, find_folder, join, read_lines, read_text, to_numbers
from fgvczoo.errors import FgvczooError

FOLDER = "tiny-imagenet-200"
_GET = f"get {FOLDER}.zip, unpack it, and give the folder that holds {FOLDER}/"
_CLASSES, _COUNTS = 200, {"train": 100_000, "test": 10_000}  # of the real set


class TinyImageNet(Official):
    """The rows of Tiny-ImageNet: those of training by class and name, then those of validation, which are "test" here,
    as papers report them; the organisers' test images have no labels.

    root: the folder that holds `tiny-imagenet-200/`, or that folder itself.

    Labels are ranks of the WordNet ids, whatever the order of wnids.txt. Other sizes than the real set's are read
    alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        wordnet_ids: of the labels.
    """

    name = "tiny-imagenet"
    archives = (Archive(f"{FOLDER}.zip", "90528d7ca1a48142e341f4ef8d21d0de"),)
    keys = ("bbox",)

    def __init__(self, root: str | Path | None) -> None:
        self.folder = self.pictures = find_folder(root, (FOLDER, "."), ("wnids.txt",), archives=self.archives, get=_GET)
        self.wordnet_ids = sorted(read_text(self.folder / "wnids.txt").split())
        place = {wnid: label for label, wnid in enumerate(self.wordnet_ids)}
        if len(place) < len(self.wordnet_ids):
            raise FgvczooError(f"{self.folder / 'wnids.txt'}: a WordNet id occurs twice")
        train, labels = [], []
        for wnid, label in place.items():
            folder = self.folder / "train" / wnid / "images"
            if not folder.is_dir():
                raise FgvczooError(f"{folder}: no such folder; unpack the archive again")
            names = sorted(entry.name for entry in os.scandir(folder) if entry.name.upper().endswith(".JPEG"))
            train += [f"train/{wnid}/images/{name}" for name in names]
            labels += [label] * len(names)
        file = self._annotations = self.folder / "val" / "val_annotations.txt"
        self._val = read_lines(file, 6, "a file, a WordNet id and four corners", separator="\t")
        for name, wnid, *_ in self._val:
            if wnid not in place:
                raise FgvczooError(f"{file}: {name} has class {wnid}, which wnids.txt has not")
        parts = [
            Part(self.folder / "train", "train", train, np.array(labels, np.int64)),
            Part(
                file,
                "test",
                [f"val/images/{name}" for name, *_ in self._val],
                np.array([place[wnid] for _, wnid, *_ in self._val], np.int64),
            ),
        ]
        real = _COUNTS if len(place) == _CLASSES else None
        self.take(parts, self._class_names(), real=real)

    def _class_names(self) -> list[str]:
        """WordNet id and first name: names alone occur twice."""
        file = self.folder / "words.txt"
        if not file.is_file():
            return list(self.wordnet_ids)
        names = dict(line.partition("\t")[::2] for line in read_text(file).splitlines())
        return [f"{wnid} {names[wnid].split(',')[0].strip()}" if wnid in names else wnid for wnid in self.wordnet_ids]

    def _read_bbox(self) -> np.ndarray:
        """(N, 4) float64."""
        boxes = []
        train = [str(path) for path in self._files[self.splits["train"]]]
        for wnid in self.wordnet_ids:
            file = self.folder / "train" / wnid / f"{wnid}_boxes.txt"
            names = [path.rpartition("/")[2] for path in train if path.startswith(f"train/{wnid}/")]
            boxes.append(to_numbers(file, join(file, names, read_lines(file, 5, "a file and four corners")), 4))
        return np.concatenate([*boxes, to_numbers(self._annotations, [line[2:] for line in self._val], 4)])


class TinyImageNetDataModule(FGVCDataModule):
    """Tiny-ImageNet. Its pictures are never downloaded here: `root` says where they are.

    root: see `TinyImageNet`. options: see `FGVCDataModule`. Keys: bbox.
    """

    reader_class = TinyImageNet

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(TinyImageNet(root), **options)
