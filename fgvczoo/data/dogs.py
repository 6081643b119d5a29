"""Stanford Dogs (Khosla et al. 2011) in its official layout. Boxes are x0, y0, x1, y1, several a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.mat import read_mat
from fgvczoo.data.official import Archive, Official, Part, find_folder
from fgvczoo.data.xml import Objects
from fgvczoo.errors import FgvczooError

_GET = "get images.tar, annotation.tar and lists.tar from the page of Stanford Dogs, and unpack them in one folder"
_CLASSES, _COUNTS = 120, {"train": 12_000, "test": 8_580}  # of the real set


class Dogs(Official):
    """The rows of Stanford Dogs: those of train_list.mat, then those of test_list.mat.

    root: the folder that holds `Images/`, `train_list.mat` and `test_list.mat`; and `Annotation/` for boxes.

    All of its pictures are ImageNet's, of training: a network trained on ImageNet has seen those of testing. Other
    sizes than the real set's are read alike; counts are asserted where it is the real set.
    """

    name = "dogs"
    archives = (Archive("images.tar"), Archive("annotation.tar"), Archive("lists.tar"))
    keys = ("boxes",)
    optional = ("boxes",)

    def __init__(self, root: str | Path | None) -> None:
        inner = (".", "stanford_dogs", "StanfordDogs")
        self.folder = find_folder(root, inner, ("train_list.mat", "Images"), archives=self.archives, get=_GET)
        self.pictures = self.folder / "Images"
        lists = {split: self._list(split) for split in ("train", "test")}
        folders = sorted({path.partition("/")[0] for paths, _ in lists.values() for path in paths})
        place = {folder: label for label, folder in enumerate(folders)}
        parts = []
        for split, (paths, numbers) in lists.items():
            file = self._file(split)
            labels = np.array([place[path.partition("/")[0]] for path in paths], np.int64)
            if len(wrong := np.flatnonzero(labels != numbers - 1)):
                path, number = paths[wrong[0]], numbers[wrong[0]]
                raise FgvczooError(f"{file}: {path!r} has label {number:g}; expected {labels[wrong[0]] + 1}")
            parts.append(Part(file, split, paths, labels))
        names = [folder.partition("-")[2] or folder for folder in folders]
        self.take(parts, names, real=_COUNTS if len(names) == _CLASSES else None)

    def _file(self, split: str) -> Path:
        return self.folder / f"{split}_list.mat"

    def _list(self, split: str) -> tuple[list[str], np.ndarray]:
        """Paths, and labels from 1."""
        file = self._file(split)
        paths, labels = read_mat(file, "file_list"), np.atleast_1d(read_mat(file, "labels")).reshape(-1)
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise FgvczooError(f"{file}: file_list is no list of texts; get it again")
        if labels.dtype.kind not in "iuf" or len(labels) != len(paths):
            raise FgvczooError(f"{file}: {len(labels)} labels of {len(paths)} files; get it again")
        return paths, labels.astype(np.float64)

    def _read_boxes(self) -> Objects:
        folder = self.folder / "Annotation"
        if not folder.is_dir():
            raise FgvczooError(f"{folder}: no such folder; unpack annotation.tar")
        return Objects([folder / Path(str(path)).with_suffix("") for path in self._files])


class DogsDataModule(FGVCDataModule):
    """Stanford Dogs. Its pictures are never downloaded here: `root` says where they are.

    root: see `Dogs`. options: see `FGVCDataModule`. Keys: boxes.
    """

    reader_class = Dogs

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(Dogs(root), **options)
