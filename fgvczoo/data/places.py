"""Places365-Standard (Zhou et al. 2018) in its official layout: scenes.

The lists are read once into the cache, see `Official.take_cached`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.official import Archive, Official, Part, check_choice, find_folder, read_lines, to_labels
from fgvczoo.errors import FgvczooError

_GET = (
    "get filelist_places365-standard.tar and the archives of pictures (256 x 256, or large), unpack them in one "
    "folder, and give that"
)
_FORMAT = 1  # of the cached file
_CLASSES, _COUNTS = 365, {"train": 1_803_460, "test": 36_500}  # of the real set
_FOLDERS = {
    "small": (("data_256_standard", "data_256"), "val_256"),
    "large": (("data_large_standard", "data_large"), "val_large"),
}


class Places365(Official):
    """The rows of Places365-Standard: those of training, then those of validation, which are "test" here, as papers
    report them; the organisers' test images have no labels.

    root: the folder that holds `categories_places365.txt`, `places365_train_standard.txt`, `places365_val.txt` (or
        their folder `filelist_places365-standard/`), and `data_256_standard/` (or `data_256/`) and `val_256/`.
    size: "small", or "large": `data_large_standard/` (`data_large/`) and `val_large/`.

    Class names have a folder of their letter, and some have two levels: /b/basketball_court/indoor. Other sizes than
    the real set's are read alike; counts are asserted where it is the real set.
    """

    name = "places365"
    archives = (
        Archive("filelist_places365-standard.tar", "35a0585fee1fa656440f3ab298f8479c", True),
        Archive("train_256_places365standard.tar", "53ca1c756c3d1e7809517cc47c5561c5", True),
        Archive("val_256.tar", "e27b17d8d44f4af9a78502beb927f808", True),
        Archive("train_large_places365standard.tar", "67e186b496a84c929568076ed01a8aa1", True),
        Archive("val_large.tar", "9b71c4993ad89d2d8bcbdc4aef38042f", True),
    )

    def __init__(self, root: str | Path | None, *, size: Literal["small", "large"] = "small") -> None:
        check_choice("size", size, tuple(_FOLDERS))
        names = ("categories_places365.txt",)
        inner = (".", "filelist_places365-standard")
        self.folder = find_folder(root, inner, names, archives=self.archives, get=_GET)
        assert root is not None  # or it had not been found
        self.pictures = Path(root)
        trains, val = _FOLDERS[size]
        train = next((name for name in trains if (self.pictures / name).is_dir()), trains[0])
        for folder in (train, val):
            if not (self.pictures / folder).is_dir():
                raise FgvczooError(f"{self.pictures / folder}: no such folder; {_GET}")
        lists = [self.folder / name for name in (*names, "places365_train_standard.txt", "places365_val.txt")]
        # The folders stand for the size that is asked for, and for copies that share their lists.
        sources = [*lists, self.pictures / train, self.pictures / val]
        self.take_cached(_FORMAT, sources, lambda: self._make(lists, train, val))

    def _make(self, lists: list[Path], train: str, val: str) -> None:
        file, train_list, val_list = lists
        listed = read_lines(file, 2, "a class and its number")
        numbers = to_labels(file, [number for _, number in listed], 0, len(listed))
        if len(set(numbers.tolist())) < len(listed):
            raise FgvczooError(f"{file}: a number occurs twice")
        classes = [listed[row][0] for row in np.argsort(numbers)]
        parts = []
        for split, file, folder in (("train", train_list, train), ("test", val_list, val)):
            lines = read_lines(file, 2, "a path and a class")
            labels = to_labels(file, [number for _, number in lines], 0, len(classes))
            parts.append(Part(file, split, [f"{folder}/{path.removeprefix('/')}" for path, _ in lines], labels))
        self.take(parts, classes, real=_COUNTS if len(classes) == _CLASSES else None)


class Places365DataModule(FGVCDataModule):
    """Places365-Standard. Its pictures are never downloaded here: `root` says where they are.

    root, size: see `Places365`. options: see `FGVCDataModule`. No keys.
    """

    reader_class = Places365

    def __init__(self, root: str | None = None, size: Literal["small", "large"] = "small", **options: Any) -> None:
        super().__init__(Places365(root, size=size), **options)
