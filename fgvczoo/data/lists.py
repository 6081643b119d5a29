r"""The lists of images that papers test on, beside pictures in their official layout.

A list names some of the images that the official files know, or gives them boxes. Its lines are one of

    PATH CLASS                                   SMDL
    PATH CLASS X0 Y0 X1 Y1 ...                   GenPromp, ImageNet
    PATH;CLASS                                   BAS
    PATH WIDTH HEIGHT ; X0 Y0 X1 Y1 ...          BAS, boxes of ImageNet; its paths have "\\" for "/"

CLASS counts from 0. Of PATH the names of the file and of its folder count; the folder is the official one, or the class
as a number, as SMDL renames them. BAS's boxes of CUB are a second file, X0 Y0 X1 Y1 HEIGHT WIDTH for each line of its
list. Boxes are corners in pixels of the original picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fgvczoo.data.official import Ragged, check_path, read_text
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import image_size

Subset = list[str] | str | None  # what an option may be: LIST, or [LIST, BOXES]
_PATH, _CLASS = r"(?P<path>[^\s;]+)", "(?P<label>[0-9]{1,9})"
_DIALECTS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_PATH}\s+(?P<width>[0-9]{{1,9}})\s+(?P<height>[0-9]{{1,9}})\s*;(?P<boxes>[-.0-9\s;]+)",
        rf"{_PATH}\s*;\s*{_CLASS}",
        rf"{_PATH}\s+{_CLASS}(?P<boxes>\s[-.0-9\s]+)?",
    )
)
_EXPECTED = "PATH CLASS, with X0 Y0 X1 Y1 of each box or none; PATH;CLASS; or PATH WIDTH HEIGHT ; X0 Y0 X1 Y1 ..."
_BEYOND = 1  # pixel that a corner may lie outside: some count from 1, and some ends belong to the box


class Line(NamedTuple):
    """What a line says. at: where it stands, in messages. label: the class. size: height, width. boxes: (n, 4)."""

    at: str
    path: str
    label: int | None
    size: tuple[int, int] | None
    boxes: np.ndarray


class Listed:
    """The rows that a list names, and their boxes.

    Each line must name another one of the images, and its class; either all lines have boxes or none has, and these
    must lie in the picture, whose size must be what the line says. Else `FgvczooError` says where it stands, what is
    given and what was expected. No path of a list is opened.

    Args:
        subset: the list; or the list and a file with the box of each of its lines.
        rows, paths, labels: (n,) each, of the images that may be named.
        what: these images, in messages.
        folders: of the labels, where folders of classes may have other names than in `paths`.
        one_box: whether a picture can have one box alone.

    Attributes:
        file: the list. rows: (m,) int64, ascending. boxed: whether it has boxes.
    """

    def __init__(
        self,
        subset: list[str] | str,
        rows: np.ndarray,
        paths: Sequence[str],
        labels: np.ndarray,
        *,
        what: str = "images",
        folders: Sequence[str] = (),
        one_box: bool = False,
    ) -> None:
        files = subset if isinstance(subset, list) else [subset]
        if len(files) not in (1, 2) or not all(isinstance(file, str | Path) for file in files):
            raise FgvczooError(f"subset={subset!r}; expected the file of a list, or [LIST, BOXES]")
        self.file, *boxes_file = map(Path, files)
        lines = _read_list(self.file)
        found = rows[_places(lines, paths, labels, what, folders)]
        if boxes_file:
            lines = _with_boxes(self.file, lines, boxes_file[0])
        self.boxed = len(lines[0].boxes) > 0
        if other := next((line for line in lines if (len(line.boxes) > 0) != self.boxed), None):
            raise FgvczooError(f"{other.at}: {len(other.boxes)} boxes, and {len(lines[0].boxes)} in the first line")
        if one_box and (other := next((line for line in lines if len(line.boxes) > 1), None)):
            raise FgvczooError(f"{other.at}: {len(other.boxes)} boxes; expected one")
        order = np.argsort(found)
        lines = [lines[place] for place in order]
        self.rows = found[order]
        self._at = [line.at for line in lines]
        self._sizes = [line.size for line in lines]
        counts = np.array([len(line.boxes) for line in lines])
        self._boxes = Ragged(np.concatenate([line.boxes for line in lines]), counts)

    def splits(self, official: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Splits of which "test" is what is listed, and the others hold the rest of what they held."""
        rest = {name: rows[~np.isin(rows, self.rows)] for name, rows in official.items()}
        if not len(rest["train"]):
            raise FgvczooError(f"{self.file}: lists all images of training; expected some that are left for it")
        return {name: rows for name, rows in {**rest, "test": self.rows}.items() if len(rows)}

    def boxes(self, row: int, picture: Path | bytes) -> np.ndarray | None:
        """(n, 4) float64 of a row, compared with the size of its picture; None where the list has none."""
        place = int(np.searchsorted(self.rows, row))
        if not self.boxed or place == len(self.rows) or self.rows[place] != row:
            return None
        boxes, size, expected = self._boxes[place], self._sizes[place], image_size(picture)
        if size not in (None, expected):
            raise FgvczooError(f"{self._at[place]}: {_of(size)}; the picture has {_of(expected)}")
        _check_inside(self._at[place], boxes, expected)
        return boxes


def _read_list(file: Path) -> list[Line]:
    lines = []
    for at, text in _texts(file, f"a list with lines of {_EXPECTED}"):
        match = next((match for dialect in _DIALECTS if (match := dialect.fullmatch(text))), None)
        cells = match.groupdict() if match else {}
        boxes = _corners((cells.get("boxes") or "").replace(";", " ").split())
        if not cells or boxes is None:
            raise FgvczooError(f"{at} is {text[:80]!r}; expected {_EXPECTED}")
        path = re.sub(r"\\+", "/", cells["path"])
        check_path(path, at)
        size = (int(cells["height"]), int(cells["width"])) if "width" in cells else None
        _check_inside(at, boxes, size)
        lines.append(Line(at, path, int(cells["label"]) if "label" in cells else None, size, boxes))
    return lines


def _with_boxes(file: Path, lines: list[Line], boxes_file: Path) -> list[Line]:
    """The lines of `file` with boxes and sizes of another one."""
    if any(len(line.boxes) for line in lines):
        raise FgvczooError(f"{file}: has boxes of its own; leave out {boxes_file}")
    texts = list(_texts(boxes_file, f"a box for each line of {file.name}"))
    if len(texts) != len(lines):
        raise FgvczooError(f"{boxes_file}: {len(texts)} lines; expected one for each of the {len(lines)} of {file}")
    joined = []
    for line, (at, text) in zip(lines, texts):
        cells = text.split()
        boxes, sides = _corners(cells[:4]), cells[4:]
        if boxes is None or len(sides) != 2 or not all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
            raise FgvczooError(f"{at} is {text[:80]!r}; expected X0 Y0 X1 Y1 HEIGHT WIDTH")
        size = int(sides[0]), int(sides[1])
        _check_inside(at, boxes, size)
        joined.append(line._replace(at=at, size=size, boxes=boxes))
    return joined


def _texts(file: Path, what: str) -> Iterator[tuple[str, str]]:
    """Where each line stands, in messages, and the line; empty ones are left out."""
    if not file.is_file():
        raise FgvczooError(f"subset: {str(file)!r} is no file; expected {what}")
    texts = [(f"{file}: line {place}", text.strip()) for place, text in enumerate(read_text(file).splitlines(), 1)]
    if not any(text for _, text in texts):
        raise FgvczooError(f"{file}: is empty; expected {what}")
    return (found for found in texts if found[1])


def _corners(cells: Sequence[str]) -> np.ndarray | None:
    """(n, 4) float64; None where these are no boxes."""
    try:
        return np.array([float(cell) for cell in cells], np.float64).reshape(-1, 4)
    except ValueError:
        return None


def _check_inside(at: str, boxes: np.ndarray, size: tuple[int, int] | None) -> None:
    for x0, y0, x1, y1 in boxes:
        box = f"{at}: box {x0:g} {y0:g} {x1:g} {y1:g}"
        if x1 <= x0 or y1 <= y0:
            raise FgvczooError(f"{box} has no area; expected X0 Y0 X1 Y1")
        if size and (min(x0, y0) < -_BEYOND or x1 > size[1] + _BEYOND or y1 > size[0] + _BEYOND):
            raise FgvczooError(f"{box} leaves the picture; expected corners inside of {_of(size)}")


def _of(size: tuple[int, int] | None) -> str:
    return "no size" if size is None else f"height {size[0]} and width {size[1]}"


def _places(
    lines: list[Line], paths: Sequence[str], labels: np.ndarray, what: str, folders: Sequence[str]
) -> np.ndarray:
    """(m,) which of the images each line names."""
    wanted = {line.path.rpartition("/")[2] for line in lines}
    by_name: dict[str, list[int]] = {name: [] for name in wanted}
    for place, path in enumerate(paths):
        if (name := path.rpartition("/")[2]) in wanted:
            by_name[name].append(place)
    named = {name: np.array(places, np.int64) for name, places in by_name.items()}  # equal names may be thousands

    def folder_names(place: int) -> list[str]:
        label = int(labels[place])
        return [*dict.fromkeys([*paths[place].split("/")[-2:-1], *folders[label : label + 1], str(label)])]

    first: dict[int, str] = {}
    for line in lines:
        *_, folder, name = ["", *line.path.split("/")]
        same = named[name]
        of_class = same if line.label is None else same[labels[same] == line.label]
        right = [place for place in of_class.tolist() if not folder or folder in folder_names(place)]
        if len(right) > 1:
            raise FgvczooError(f"{line.at}: {line.path!r} are {len(right)} of the {what}; expected its class, too")
        if not right:
            near = [place for place in same.tolist() if folder in folder_names(place)] or same.tolist()
            if len(near) != 1:
                raise FgvczooError(f"{line.at}: {line.path!r} is none of the {len(paths):,} {what}")
            if line.label not in (None, expected := int(labels[near[0]])):
                raise FgvczooError(f"{line.at}: {line.path!r} has class {line.label}; expected {expected}")
            expected_names = " or ".join(map(repr, folder_names(near[0])))
            raise FgvczooError(f"{line.at}: {line.path!r} lies in {folder!r}; expected {expected_names}")
        if (before := first.setdefault(right[0], line.at)) != line.at:
            raise FgvczooError(f"{line.at}: {line.path!r} is listed twice, before in {before.rpartition(': ')[2]}")
    return np.array(list(first), np.int64)
