"""Annotations in the XML of PASCAL VOC: one file a picture, with its objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fgvczoo.data.official import read_text
from fgvczoo.errors import FgvczooError


def read_objects(file: Path) -> list[tuple[str, list[float]]]:
    """Name and corners (xmin, ymin, xmax, ymax) of every object, as they are written."""
    try:
        found = []
        for item in ElementTree.fromstring(read_text(file)).iter("object"):
            corners = [float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            found.append((item.findtext("name", ""), corners))
        return found
    except (ElementTree.ParseError, ValueError) as error:
        raise FgvczooError(f"{file}: {error}; expected objects with xmin, ymin, xmax, ymax in a bndbox") from None


@dataclass(frozen=True)
class Objects:
    """(n, 4) boxes of the rows, read when they are asked for, since each lies in a file of its own.

    files: of the rows; one that is not there stands for no box.
    """

    files: Sequence[Path]

    def __getitem__(self, index: int) -> np.ndarray:
        file = self.files[index]
        boxes = [box for _, box in read_objects(file)] if file.is_file() else []
        return np.array(boxes, np.float64).reshape(-1, 4)
