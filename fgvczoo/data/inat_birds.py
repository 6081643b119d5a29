"""Cross-View iNAT-2021 birds (Sastry et al. 2024, BirdSAT): bird photographs of iNaturalist 2021, each with the
satellite image of its place."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.data.inaturalist import INaturalist
from fgvczoo.data.official import Pictures, check_listed, read_text
from fgvczoo.errors import FgvczooError

_LISTS = {"train": ("train_birds.csv", "train_overhead"), "test": ("val_birds.csv", "val_overhead")}


class CrossViewBirds(INaturalist):
    """The rows of the pairs: those of training, then those of validation, which are "test" here.

    root: the folder of iNaturalist 2021, with `train_overhead/images_sentinel/` and `val_overhead/images_sentinel/` and
        the lists of pairs in it.
    train_list, test_list: these lists, CSV. The second column of line k, from 0 and without a header, is the place of a
        photograph in the images of `train.json` or `val.json`, and `images_sentinel/k.jpeg` is its satellite image; a
        third column, where there is one, is the cluster of the place, in `row`.
    supercategory: see `INaturalist`.

    `metadata` has place and date: month, hour and day, of which BirdSAT reads month and day.
    """

    name = "cross-view-birds"

    def __init__(
        self,
        root: str | Path | None,
        *,
        train_list: str = _LISTS["train"][0],
        test_list: str = _LISTS["test"][0],
        supercategory: str | None = "Birds",
    ) -> None:
        super().__init__(root, supercategory=supercategory)
        self._arguments = {"train_list": train_list, "test_list": test_list, "supercategory": supercategory}
        official = {split: self._file_rows(rows) for split, rows in self.splits.items()}
        in_json = {"train": (0, self._train), "test": (self._train, len(self._files))}
        rows_of, tiles, clusters = [], [], []
        for (split, (_, folder)), name in zip(_LISTS.items(), (train_list, test_list)):
            file, (start, stop) = self.folder / name, in_json[split]
            places, own = _read(file, stop - start)
            allowed = np.isin(places + start, official[split])
            if not allowed.all():
                place = places[~allowed][0]
                raise FgvczooError(f"{file}: image {place} of {split} is none of {supercategory}")
            if len(np.unique(places)) < len(places):
                raise FgvczooError(f"{file}: an image occurs twice")
            paths = [f"{folder}/images_sentinel/{number}.jpeg" for number in range(len(places))]
            check_listed(self.folder, paths, file)
            rows_of.append(places + start)
            tiles += paths
            clusters += own
        self._rows, self._tiles, self._clusters = np.concatenate(rows_of), tiles, clusters
        self.labels = self._label_of[self._arrays["category"][self._rows]]
        self.image_ids = self._arrays["id"][self._rows]
        rows, first = np.arange(len(self._rows)), len(rows_of[0])
        self.splits = {"train": rows[:first], "test": rows[first:]}
        self.keys = (*self.keys, "satellite")
        self.__dict__.pop("_tables", None)

    def row(self, index: int) -> dict[str, Any]:
        """As of any set, with `satellite`, its path, and `cluster`, where there are such."""
        cluster = self._clusters[index]
        more = {} if cluster is None else {"cluster": cluster}
        return {**super().row(index), "satellite": str((self.folder / self._tiles[index]).absolute()), **more}

    def _file_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows if self._rows is None else self._rows[rows]

    def _read_satellite(self) -> Pictures:
        return Pictures(self.folder, self._tiles)


def _read(file: Path, count: int) -> tuple[np.ndarray, list[int | None]]:
    """Places in the list of images, below `count`, and clusters."""
    places, clusters = [], []
    for number, cells in enumerate(csv.reader(read_text(file).splitlines())):
        whole = [cell.strip() for cell in cells]
        if (
            len(whole) < 2
            or not all(cell.isdecimal() and len(cell) < 10 for cell in whole[1:3])
            or int(whole[1]) >= count
        ):
            expected = f"in the second column a place below {count}, and in the third a number"
            raise FgvczooError(f"{file}: line {number + 1} is {','.join(cells)[:80]!r}; expected {expected}")
        places.append(int(whole[1]))
        clusters.append(int(whole[2]) if len(whole) > 2 else None)
    if not places:
        raise FgvczooError(f"{file}: lists no image")
    return np.array(places, np.int64), clusters


class CrossViewBirdsDataModule(FGVCDataModule):
    """Cross-View iNAT-2021 birds. Its pictures are never downloaded here: `root` says where they are.

    root, train_list, test_list, supercategory: see `CrossViewBirds`. options: see `FGVCDataModule`. Keys: satellite;
    metadata: place and date (month, hour, day), with metadata_valid; label_levels.
    """

    reader_class = CrossViewBirds

    def __init__(
        self,
        root: str | None = None,
        train_list: str = _LISTS["train"][0],
        test_list: str = _LISTS["test"][0],
        supercategory: str | None = "Birds",
        **options: Any,
    ) -> None:
        reader = CrossViewBirds(root, train_list=train_list, test_list=test_list, supercategory=supercategory)
        super().__init__(reader, **options)
