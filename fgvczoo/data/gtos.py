"""GTOS-mobile (Xue et al. 2018): materials of the ground, trained on pictures of a survey, tested on those of a
phone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.folder import SUFFIXES
from fgvczoo.data.official import Archive, Official, Part, find_folder
from fgvczoo.errors import FgvczooError

_GET = "get gtos-mobile.zip, unpack it, and give the folder that holds train/ and test/ with a folder for each class"
_CLASSES, _COUNTS = 31, {"train": 93_945, "test": 6_066}  # of the real set
_FRAME = re.compile(r"\d+$")  # the last number of a name


class GTOSMobile(Official):
    """The rows of GTOS-mobile: those of training, then those of testing, by class and name.

    root: the folder that holds `train/` and `test/`, or holds it as `gtos-mobile/`.
    val_sequences: share of the sequences of every class that becomes the split "val": frames of one sequence are nearly
        equal, so a share of frames would be known from training. A sequence is the frames whose names differ in their
        last number alone; a class with one sequence gives the last frames of it.

    Classes are in the order of the code points of their names: Painting comes first. Other sizes than the real set's
    are read alike; counts are asserted where it is the real set.
    """

    name = "gtos-mobile"
    archives = (Archive("gtos-mobile.zip"),)

    def __init__(self, root: str | Path | None, *, val_sequences: float = 0.0) -> None:
        if not 0 <= val_sequences < 1:
            raise FgvczooError(f"val_sequences={val_sequences}; expected a number in [0, 1)")
        inner = (".", "gtos-mobile", "GTOS-mobile", "gtos-mobile/gtos-mobile")
        self.folder = self.pictures = find_folder(root, inner, ("train",), archives=self.archives, get=_GET)
        names = sorted(entry.name for entry in (self.folder / "train").iterdir() if entry.is_dir())
        place = {name: label for label, name in enumerate(names)}
        parts = []
        for split in ("train", "test"):
            folder = self.folder / split
            if not folder.is_dir():
                raise FgvczooError(f"{folder}: no such folder; {_GET}")
            if unknown := sorted(
                entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in place
            ):
                raise FgvczooError(f"{folder}: has the class {unknown[0]!r}, which train/ has not")
            found = [
                (f"{split}/{name}/{file.name}", label)
                for name, label in place.items()
                if (folder / name).is_dir()
                for file in sorted((folder / name).iterdir())
                if file.name.lower().endswith(SUFFIXES)
            ]
            paths = [path for path, _ in found]
            parts.append(Part(folder, split, paths, np.array([label for _, label in found], np.int64)))
        self.take(parts, names, real=_COUNTS if len(names) == _CLASSES else None)
        if val_sequences:
            held_out = self._held_out(val_sequences)
            self.splits["val"] = np.flatnonzero(held_out)
            self.splits["train"] = self.splits["train"][~held_out[self.splits["train"]]]

    def _held_out(self, share: float) -> np.ndarray:
        """(N,) bool."""
        held_out = np.zeros(len(self), bool)
        train = self.splits["train"]
        for label in range(len(self.class_names)):
            rows = train[self.labels[train] == label]
            sequences: dict[str, list[int]] = {}
            for row in rows.tolist():
                sequences.setdefault(_FRAME.sub("", Path(str(self._files[row])).stem), []).append(row)
            groups = list(sequences.values()) if len(sequences) > 1 else [[row] for row in rows.tolist()]
            for group in groups[len(groups) - max(round(share * len(groups)), 1) :] if len(groups) > 1 else []:
                held_out[group] = True
        return held_out


class GTOSMobileDataModule(FGVCDataModule):
    """GTOS-mobile. Its pictures are never downloaded here: `root` says where they are.

    root, val_sequences: see `GTOSMobile`. options: see `FGVCDataModule`. No keys.
    """

    reader_class = GTOSMobile

    def __init__(self, root: str | None = None, val_sequences: float = 0.0, **options: Any) -> None:
        super().__init__(GTOSMobile(root, val_sequences=val_sequences), **options)
