"""ForgetMe (arXiv 2504.12574): pictures, the same without an object, and masks of it.

The authors' files are not out: this is a folder of pairs, in the names of folders that their code has, too.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule, stratified
from fgvczoo.data.folder import SUFFIXES
from fgvczoo.data.official import Masks, Official, Part, Pictures, check_listed, check_path, find_folder, read_text
from fgvczoo.errors import FgvczooError

_GET = "expected SUBSET/original/, SUBSET/edited/ and SUBSET/mask/ with files of the same stems, and perhaps pairs.csv"
_FOLDERS = {"original": ("original", "orig"), "edited": ("edited", "bg", "background"), "mask": ("mask",)}
_COLUMNS = ["id", "original", "edited", "mask", "target_class"]
_OBJECT = 128  # a mask is grey: from here on a pixel is of the removed object


class ForgetMe(Official):
    """The rows of the pairs, by subset and stem, or in the order of `pairs.csv`.

    root: the folder that holds `SUBSET/original/`, `SUBSET/edited/` and `SUBSET/mask/` (or `orig/`, `bg/` and
        `background/`) for each subset, with files of the same stems; or such files and `pairs.csv`, with the columns
        id, original, edited, mask (paths from the root) and target_class.
    subset: only this one.
    test_fraction: share of the pairs of every class that becomes "test"; the choice is fixed.

    Classes are target classes, or without `pairs.csv` the subsets.
    """

    name = "forgetme"
    keys = ("edited", "mask")

    def __init__(self, root: str | Path | None, *, subset: str | None = None, test_fraction: float = 0.2) -> None:
        if not 0 < test_fraction < 1:
            raise FgvczooError(f"test_fraction={test_fraction}; expected a number in (0, 1)")
        markers = ("pairs.csv", *(f"{own}/{name}" for own in _subsets(root) for name in _FOLDERS["original"]))
        self.folder = self.pictures = find_folder(root, (".",), markers, get=_GET)
        file = self.folder / "pairs.csv"
        rows = self._table(file) if file.is_file() else self._of_folders()
        if subset is not None:
            known = sorted({row[1].split("/")[0] for row in rows})
            if subset not in known:
                raise FgvczooError(f"subset={subset!r}; {self.folder} has {', '.join(known)}")
            rows = [row for row in rows if row[1].startswith(f"{subset}/")]
        source = file if file.is_file() else self.folder
        names = sorted({row[4] for row in rows})
        labels = np.array([names.index(row[4]) for row in rows], np.int64)
        self.take([Part(source, "train", [row[1] for row in rows], labels)], names)
        self._edited, self._masks = [row[2] for row in rows], [row[3] for row in rows]
        for paths in (self._edited, self._masks):
            check_listed(self.folder, paths, source)
        train = self.splits["train"]
        self.splits["train"], self.splits["test"] = stratified(train, self.labels, test_fraction, "test")

    def _table(self, file: Path) -> list[list[str]]:
        lines = [[cell.strip() for cell in line] for line in csv.reader(read_text(file).splitlines()) if line]
        if not lines or lines[0] != _COLUMNS or any(len(line) != 5 or not all(line) for line in lines):
            raise FgvczooError(f"{file}: expected lines of {', '.join(_COLUMNS)}")
        for line in lines[1:]:
            for path in line[1:4]:
                check_path(path, file)
        return lines[1:]

    def _of_folders(self) -> list[list[str]]:
        rows = []
        for subset in _subsets(self.folder):
            found = {}
            for kind, names in _FOLDERS.items():
                folder = next((f for f in (self.folder / subset / name for name in names) if f.is_dir()), None)
                if folder is None:
                    raise FgvczooError(f"{self.folder / subset}: no {' or '.join(names)} in it; {_GET}")
                files = [file for file in sorted(folder.iterdir()) if file.name.lower().endswith(SUFFIXES)]
                found[kind] = {file.stem: file.relative_to(self.folder).as_posix() for file in files}
            for kind, own in found.items():
                if alone := own.keys() ^ found["original"].keys():
                    raise FgvczooError(
                        f"{self.folder / subset}: {len(alone)} stems are not in both original and {kind}, such as "
                        f"{', '.join(sorted(alone)[:5])}"
                    )
            rows += [[stem, *(own[stem] for own in found.values()), subset] for stem in found["original"]]
        return rows

    def _read_edited(self) -> Pictures:
        return Pictures(self.folder, self._edited)

    def _read_mask(self) -> Masks:
        return Masks(self.folder, self._masks, at_least=_OBJECT)


def _subsets(root: str | Path | None) -> list[str]:
    """Folders that hold originals."""
    if root is None or not Path(root).is_dir():
        return []
    folders = sorted(entry for entry in Path(root).iterdir() if entry.is_dir())
    return [folder.name for folder in folders if any((folder / name).is_dir() for name in _FOLDERS["original"])]


class ForgetMeDataModule(FGVCDataModule):
    """ForgetMe, or any folder of such pairs. Nothing is downloaded here: `root` says where it is.

    root, subset, test_fraction: see `ForgetMe`. options: see `FGVCDataModule`. Keys: edited, which is augmented as its
    original; mask (1 = the removed object).
    """

    reader_class = ForgetMe

    def __init__(
        self, root: str | None = None, subset: str | None = None, test_fraction: float = 0.2, **options: Any
    ) -> None:
        super().__init__(ForgetMe(root, subset=subset, test_fraction=test_fraction), **options)
