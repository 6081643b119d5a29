"""FGVC-Aircraft (Maji et al. 2013) in its official layout: variants of aircraft, families and manufacturers.

Boxes are x0, y0, x1, y1 in pixels from 0, ends exclusive; the annotations count from 1 and inclusively.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fgvczoo.data.base import TEXT, FGVCDataModule
from fgvczoo.data.official import (
    Archive,
    Official,
    Part,
    check_boxes,
    check_choice,
    find_folder,
    join,
    read_lines,
    read_text,
    to_numbers,
)
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import image_size

Level = Literal["variant", "family", "manufacturer"]
_NAMES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
_GET = (
    "get fgvc-aircraft-2013b.tar.gz from the VGG's page of FGVC-Aircraft, unpack it, and give the folder that holds it"
)
_VARIANTS, _PART = 100, {"train": 3_334, "val": 3_333, "test": 3_333}  # of the real set
BANNER = 20  # rows of pixels at the bottom, with the name of the photographer


class Aircraft(Official):
    """The rows of FGVC-Aircraft: those of training, of validation, of testing, each in the order of its list.

    root: the folder that holds `fgvc-aircraft-2013b/`, or that folder itself.
    level: what the classes are, "variant", "family" or "manufacturer"; in the order of their file.
    train: "trainval", the usual protocol, trains on both parts; "train" leaves the other one as the split "val".
    banner: keep the rows with the name of the photographer at the bottom of each picture.

    Other sizes than the real set's are read alike; counts are asserted where it is the real set.

    Attributes beside those of `Reader`:
        level_names: level -> names, of the columns of the batch key `label_levels` (B, 3).
    """

    name = "aircraft"
    archives = (Archive("fgvc-aircraft-2013b.tar.gz", "d4acdd33327262359767eeaa97a4f732"),)
    keys = ("bbox", "label_levels")

    def __init__(
        self,
        root: str | Path | None,
        *,
        level: Level = "variant",
        train: Literal["trainval", "train"] = "trainval",
        banner: bool = False,
    ) -> None:
        check_choice("level", level, get_args(Level))
        check_choice("train", train, ("trainval", "train"))
        inner = ("fgvc-aircraft-2013b/data", "data", ".")
        self.folder = find_folder(root, inner, ("images_variant_train.txt",), archives=self.archives, get=_GET)
        self.pictures = self.folder / "images"
        self.banner = banner
        self.level_names = {name: read_text(self.folder / file).splitlines() for name, file in _NAMES.items()}
        self._levels: list[np.ndarray] = []  # (n, 3) of each part
        parts = []
        for split in ("train", "val", "test"):
            listed = {name: self._list(name, split) for name in _NAMES}
            ids = list(listed["variant"])
            for name, classes in listed.items():
                if classes.keys() != listed["variant"].keys():
                    raise FgvczooError(f"{self._file(name, split)}: not the images of {self._file('variant', split)}")
            self._levels.append(np.array([[listed[name][image] for name in _NAMES] for image in ids], np.int64))
            labels = self._levels[-1][:, list(_NAMES).index(level)]
            shown = "train" if split == "val" and train == "trainval" else split
            parts.append(Part(self._file(level, split), shown, [f"{image}.jpg" for image in ids], labels))
        real = dict(_PART) if len(self.level_names["variant"]) == _VARIANTS else None
        if real and train == "trainval":
            real = {"train": real["train"] + real["val"], "test": real["test"]}
        self.take(parts, self.level_names[level], real=real)
        self.image_ids = np.array([Path(str(path)).stem for path in self._files], TEXT)

    def crop(self, index: int) -> tuple[int, int, int, int] | None:
        """The picture without its banner."""
        if self.banner:
            return None
        height, width = image_size(self.picture(index), self.name_of(index))
        return 0, 0, width, max(height - BANNER, 1)

    def _file(self, level: str, split: str) -> Path:
        return self.folder / f"images_{level}_{split}.txt"

    def _list(self, level: str, split: str) -> dict[str, int]:
        """Image id -> class."""
        file, names = self._file(level, split), self.level_names[level]
        place = {name: number for number, name in enumerate(names)}
        found: dict[str, int] = {}
        for image, name in read_lines(file, 2, "an image id and a class", separator=" "):
            if name not in place:
                raise FgvczooError(f"{file}: {image} has {name!r}, which {_NAMES[level]} has not")
            if image in found:
                raise FgvczooError(f"{file}: {image!r} occurs twice")
            found[image] = place[name]
        return found

    def _read_bbox(self) -> np.ndarray:
        """(N, 4) float64."""
        file = self.folder / "images_box.txt"
        lines = read_lines(file, 5, "an image id and xmin, ymin, xmax, ymax")
        corners = to_numbers(file, join(file, self.image_ids.tolist(), lines), 4)
        return check_boxes(file, self.image_ids, corners - (1, 1, 0, 0))

    def _read_label_levels(self) -> np.ndarray:
        return np.concatenate(self._levels)


class AircraftDataModule(FGVCDataModule):
    """FGVC-Aircraft. Its pictures are never downloaded here: `root` says where they are.

    root, level, train, banner: see `Aircraft`. options: see `FGVCDataModule`. Keys: bbox; label_levels: variant,
        family, manufacturer.
    """

    reader_class = Aircraft

    def __init__(
        self,
        root: str | None = None,
        level: Level = "variant",
        train: Literal["trainval", "train"] = "trainval",
        banner: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(Aircraft(root, level=level, train=train, banner=banner), **options)
