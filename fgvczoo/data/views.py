"""Several cuts of each training picture as rows of their own, where a paper trains on such copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fgvczoo.data.base import Reader
from fgvczoo.preprocess import image_size

MARGIN = 0.1  # of a box's width and height


class CornerViews(Reader):
    """ProtoTree's copies of CUB-200-2011 (Nauta et al., CVPR 2021), cut when they are read.

    "train" holds each training picture five times: whole, and cut four times from a corner of the picture to the far
    side of the bird's box and a margin of a tenth of the box. "projection" holds it cut to its box, "train_plain" and
    all other splits once and whole. Rows of the given reader keep their numbers; cuts follow.
    """

    def __init__(self, reader: Reader) -> None:
        reader.require(["bbox"])
        self.reader = reader
        self.name, self.licence_allows_pictures = reader.name, reader.licence_allows_pictures
        self.class_names, self.keys = reader.class_names, reader.keys
        self.all_class_names = reader.all_class_names
        self.subset = reader.subset
        train, count = reader.splits["train"], len(reader)
        # Of each row: the row whose picture it is, and which cut of it. 0: whole, 1 to 4: corners, 5: the box.
        self._row = np.concatenate([np.arange(count), train.repeat(4), train])
        self._cut = np.concatenate(
            [np.zeros(count, np.int64), np.tile(np.arange(1, 5), len(train)), np.full(len(train), 5)]
        )
        self.labels, self.image_ids = reader.labels[self._row], reader.image_ids[self._row]
        rows = np.arange(len(self._row))
        corners, boxes = rows[(self._cut > 0) & (self._cut < 5)], rows[self._cut == 5]
        self.splits = {
            **reader.splits,
            "train": np.concatenate([train, corners]),
            "train_plain": train,
            "projection": boxes,
        }

    def picture(self, index: int) -> Path | bytes:
        return self.reader.picture(self._row[index])

    def require(self, keys: Sequence[str]) -> None:
        self.reader.require(keys)

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        return self.reader.annotations(self._row[index], keys)

    def box(self, index: int) -> np.ndarray | None:
        return self.reader.box(self._row[index])

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        return self.reader.flip_pairs

    def crop(self, index: int) -> tuple[int, int, int, int] | None:
        cut, row = int(self._cut[index]), self._row[index]
        if not cut:
            return self.reader.crop(row)
        box = self.reader.box(row)
        assert box is not None  # it has boxes
        x0, y0, x1, y1 = (int(value) for value in box)
        if cut == 5:
            return x0, y0, x1, y1
        height, width = image_size(self.reader.picture(row))
        margin_x, margin_y = int(MARGIN * (x1 - x0)), int(MARGIN * (y1 - y0))
        left, upper = cut in (1, 2), cut in (1, 3)
        return (
            0 if left else max(x0 - margin_x, 0),
            0 if upper else max(y0 - margin_y, 0),
            min(x1 + margin_x, width) if left else width,
            min(y1 + margin_y, height) if upper else height,
        )
