"""VGGFace2 (Cao et al. 2018) in its official layout: faces, an identity each class.

Lists, or folders, are read once into the cache, see `Official.take_cached`.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.official import (
    Archive,
    Official,
    Part,
    check_boxes,
    disjoint_splits,
    find_folder,
    from_size,
    join,
    read_text,
    to_numbers,
)
from fgvczoo.errors import FgvczooError

_GET = "unpack vggface2_train.tar.gz and vggface2_test.tar.gz in one folder, with meta/ and bb_landmark/, and give that"
_FORMAT = 1  # of the cached file
_TRAIN, _TEST = 8_631, 500  # identities of the real set


class VGGFace2(Official):
    """The rows of VGGFace2: those of training, then those of testing, whose identities are others.

    root: the folder that holds `train/` and `test/` with a folder for each identity; `train_list.txt` and
        `test_list.txt` in it or in `meta/` name the images, else the folders do. `meta/identity_meta.csv` has the
        names, `bb_landmark/loose_bb_train.csv` and `loose_bb_test.csv` the boxes.

    Labels count on from training to testing, so those of test images are beyond `class_names`. Other sizes than the
    real set's are read alike; the number of identities is asserted where there are as many as in the real set of
    training.
    """

    name = "vggface2"
    archives = (Archive("vggface2_train.tar.gz"), Archive("vggface2_test.tar.gz"))
    keys, optional = ("bbox",), ("bbox",)

    def __init__(self, root: str | Path | None) -> None:
        self.folder = self.pictures = find_folder(
            root, (".", "VGGFace2", "vggface2"), ("train",), archives=self.archives, get=_GET
        )
        sources = [self.folder / "meta" / "identity_meta.csv"]
        sources = [file for file in sources if file.is_file()]
        for split in ("train", "test"):
            file = self._list_file(split)
            sources += [self.folder / split, *self._people(split)] if file is None else [file]
        self.take_cached(_FORMAT, sources, self._make)
        self.all_class_names = self.class_names
        people = int(self.labels[self.splits["train"]].max()) + 1
        self.class_names = self.all_class_names[:people]
        self.splits = disjoint_splits(self.labels < people)

    def _make(self) -> None:
        lists = {split: self._list(split) for split in ("train", "test")}
        ids: list[list[str]] = [sorted({path.split("/")[0] for path in paths}) for _, paths in lists.values()]
        if both := set(ids[0]) & set(ids[1]):
            raise FgvczooError(f"{self.folder}: identity {min(both)} is in train and in test; expected one of them")
        if len(ids[0]) == _TRAIN and len(ids[1]) != _TEST:
            raise FgvczooError(f"{self.folder}: {len(ids[1])} identities of testing; expected {_TEST}")
        place = {name: label for label, name in enumerate(ids[0] + ids[1])}
        names = self._names()
        parts = [
            Part(
                source,
                split,
                [f"{split}/{path}" for path in paths],
                np.array([place[path.split("/")[0]] for path in paths], np.int64),
            )
            for split, (source, paths) in lists.items()
        ]
        self.take(parts, [f"{name} {names[name]}" if name in names else name for name in place])

    def _list(self, split: str) -> tuple[Path, list[str]]:
        """What lists the images, and their paths."""
        if (file := self._list_file(split)) is not None:
            return file, read_text(file).split()
        people = self._people(split)
        paths = [f"{person.name}/{file.name}" for person in people for file in sorted(person.glob("*.jpg"))]
        return self.folder / split, paths

    def _list_file(self, split: str) -> Path | None:
        files = (self.folder / f"{split}_list.txt", self.folder / "meta" / f"{split}_list.txt")
        return next((file for file in files if file.is_file()), None)

    def _people(self, split: str) -> list[Path]:
        """The folders of the identities."""
        folder = self.folder / split
        if not folder.is_dir():
            raise FgvczooError(f"{folder}: no such folder; {_GET}")
        return sorted(folder / entry.name for entry in os.scandir(folder) if entry.is_dir())

    def _names(self) -> dict[str, str]:
        """Identity -> name; none without the file."""
        file = self.folder / "meta" / "identity_meta.csv"
        if not file.is_file():
            return {}
        # Names have commas, inside of quotes; blanks follow the commas between cells.
        lines = [
            [cell.strip() for cell in line] for line in csv.reader(read_text(file).splitlines(), skipinitialspace=True)
        ]
        if not lines or lines[0][:2] != ["Class_ID", "Name"] or any(len(line) < 2 for line in lines):
            raise FgvczooError(f"{file}: expected lines of Class_ID, Name, Sample_Num, Flag, Gender")
        return {line[0]: line[1] for line in lines[1:]}

    def _read_bbox(self) -> np.ndarray:
        """(N, 4) float64."""
        boxes = []
        for split in ("train", "test"):
            file = self.folder / "bb_landmark" / f"loose_bb_{split}.csv"
            lines = list(csv.reader(read_text(file).splitlines()))
            if not lines or lines[0] != ["NAME_ID", "X", "Y", "W", "H"]:
                raise FgvczooError(f"{file}: expected lines of NAME_ID, X, Y, W, H")
            wanted = [str(path).partition("/")[2].removesuffix(".jpg") for path in self.image_ids[self.splits[split]]]
            boxes.append(check_boxes(file, wanted, from_size(to_numbers(file, join(file, wanted, lines[1:]), 4))))
        return np.concatenate(boxes)


class VGGFace2DataModule(FGVCDataModule):
    """VGGFace2. Its pictures are never downloaded here: `root` says where they are.

    root: see `VGGFace2`. options: see `FGVCDataModule`. Keys: bbox.
    """

    reader_class = VGGFace2

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(VGGFace2(root), **options)
