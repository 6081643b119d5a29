"""Labels and annotations in the columns of an Arrow table: a user's own table of pictures, or a data set of the Hub.

A list is a list column, or JSON text where a format has no lists (CSV). An empty cell is a missing value. Boxes are
x0, y0, x1, y1 with exclusive ends, in pixels of the original picture as `read_image` gives it.
"""

from __future__ import annotations

import csv
import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from pyarrow import parquet

from fgvczoo.data.base import TEXT, check_class_names
from fgvczoo.errors import FgvczooError, did_you_mean

_CORNERS = ("bbox_x0", "bbox_y0", "bbox_x1", "bbox_y1")
METADATA = "metadata."  # what its columns begin with
# Columns that hold annotations; beside them those that begin with `metadata.`.
ANNOTATIONS = (
    *("bbox", *_CORNERS, "boxes", "parts", "attributes", "attribute_certainty", "label_levels"),
    *("latitude", "longitude", "date", "hour"),
)
_COLUMNS = frozenset({"path", "file_name", "label", "class_name", "split", "mask", *ANNOTATIONS})
_WHOLE_NUMBER = r"^-?(0|[1-9]\d*)$"
# Paths that do not lie below the root, or are not written with "/" and in one line.
_OUTSIDE = r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|\\|[[:cntrl:]\x{80}-\x{9f}\x{2028}\x{2029}]"
_UNTIDY = r"(^|/)\./|//"
_DATE = r"^\d{4}-(?P<month>0[1-9]|1[0-2])(?:-(?P<day>0[1-9]|[12]\d|3[01])(?:[T ].*)?)?$"
_TOGETHER = {  # columns that are of use only with others
    **dict.fromkeys(_CORNERS, _CORNERS),
    "latitude": ("longitude",),
    "longitude": ("latitude",),
    "hour": ("date",),
    "attribute_certainty": ("attributes",),
}


class Columns:
    """Labels and annotations of the rows of a table, read when they are first asked for and checked as a whole.

    table: its columns named `label`, `class_name` and as in `ANNOTATIONS`; others are left alone.
    source: what messages call the table.
    name_of: what messages call a row.

    Attributes:
        unread: names of columns that were left out of the table.
    """

    def __init__(self, table: pa.Table, source: str, name_of: Callable[[int], str]) -> None:
        self.table, self.source, self.name_of = table, source, name_of
        self.unread: list[str] = []
        self._read: dict[str, Any] = {}
        names = set(table.column_names)
        for name, others in _TOGETHER.items():
            if name in names and (missing := [other for other in others if other not in names]):
                hint = did_you_mean(missing[0], names - set(ANNOTATIONS))
                raise FgvczooError(f"{source}: a column {name} without {', '.join(missing)}{hint}")
        one_box = [name for name in ("bbox", "bbox_x0", "boxes") if name in names]
        if len(one_box) > 1:
            raise FgvczooError(
                f"{source}: columns {' and '.join(one_box)}; expected one of bbox, the four of bbox_x0, and boxes"
            )
        for name, column in (("place", "latitude"), ("date", "date")):
            if METADATA + name in names and column in names:
                raise FgvczooError(f"{source}: columns {METADATA}{name} and {column} for the same; leave one out")

    @property
    def keys(self) -> tuple[str, ...]:
        """Batch keys that the columns can give."""
        names = self.table.column_names
        keys = {
            "bbox": "bbox" in names or "bbox_x0" in names,
            **{key: key in names for key in ("boxes", "parts", "attributes", "label_levels")},
            "metadata": "latitude" in names or "date" in names or any(name.startswith(METADATA) for name in names),
        }
        return tuple(key for key, there in keys.items() if there)

    def require(self, keys: Sequence[str]) -> None:
        """Reads the columns of those of the keys that it has; `FgvczooError` naming the row where one is wrong."""
        readers = {
            "bbox": self._bbox,
            "boxes": self._boxes,
            "parts": self._parts,
            "attributes": self._attributes,
            "label_levels": self._label_levels,
            "metadata": self._metadata,
        }
        for key in keys:
            if key in self.keys and key not in self._read:
                self._read[key] = readers[key]()

    def has(self, name: str) -> bool:
        """Whether there is a column of that name."""
        return name in self.table.column_names

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        """Those of the keys that it has, of one row; see `Reader.annotations`."""
        self.require(keys)
        notes: dict[str, Any] = {}
        for key in keys:
            if key not in self.keys:
                continue
            values = self._read[key]
            if key == "boxes":
                corners, starts = values
                notes[key] = corners[starts[index] : starts[index + 1]]
            elif key == "attributes":
                notes |= {name: table[index] for name, table in values.items()}
            elif key == "metadata":
                notes[key] = {name: table[index] for name, table in values[0].items()}
                notes["metadata_valid"] = {name: table[index] for name, table in values[1].items()}
            else:
                notes[key] = values[index].astype(np.float64) if key == "parts" else values[index]
        return notes

    @property
    def bbox(self) -> np.ndarray | None:
        """(N, 4) float64, once `bbox` was required."""
        return self._read.get("bbox")

    # -- pictures and splits ---------------------------------------------------------------------------------------

    def paths(self, name: str, *, once: bool = False) -> np.ndarray:
        """A column of relative paths, tidied; `FgvczooError` naming the row where one is empty, leads upwards or, with
        `once`, stands in two rows."""
        column = self._text(name)
        wrong = pc.match_substring_regex(column, _OUTSIDE)
        self._refuse(wrong, f"{name} does not lie below the root; expected a relative path with / and without ..")
        if pc.any(pc.match_substring_regex(column, _UNTIDY)).as_py():
            column = pa.chunked_array([[posixpath.normpath(path) for path in column.to_pylist()]], column.type)
        if once and len(column.unique()) < len(column):
            first: dict[str, int] = {}
            for row, path in enumerate(column.to_pylist()):
                if first.setdefault(path, row) != row:
                    raise FgvczooError(f"{self.name_of(row)}: {name} {path!r} is also in {self.name_of(first[path])}")
        return column.to_numpy().astype(TEXT)

    def splits(self, known: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The rows of each split by the column `split`; without it all are "train". known: name in the table, in any
        case -> name of ours."""
        rows = np.arange(len(self.table))
        if not self.has("split"):
            return {"train": rows} if len(rows) else {}
        column = self._text("split")
        names = column.unique().to_pylist()
        for name in names:
            if name.casefold() not in known:
                hint = did_you_mean(name.casefold(), known)
                self._refuse(pc.equal(column, name), f"split {name!r}; expected train, val or test{hint}")
        number = pc.index_in(column, value_set=pa.array(names, column.type)).to_numpy()
        ours = np.array([known[name.casefold()] for name in names])[number]
        return {name: rows[ours == name] for name in dict.fromkeys(known.values()) if (ours == name).any()}

    # -- labels -----------------------------------------------------------------------------------------------------

    def class_names(self, rows: np.ndarray) -> list[str]:
        """The classes of some rows: names in the order of their code points; of numbers 0..C-1 what the column
        `class_name` says, or the numbers."""
        label = self._labels().take(pa.array(rows))
        if is_text(label.type):
            names = sorted(label.unique().to_pylist())
            check_class_names(names, self.source)
            return names
        numbers = label.to_numpy()
        found = np.unique(numbers)
        if len(absent := np.flatnonzero(found != np.arange(len(found)))):
            numbers_found = f"labels {found[0]}..{found[-1]} of train, but none is {absent[0]}"
            raise FgvczooError(f"{self.source}: {numbers_found}; expected 0, 1, 2 and so on, each there")
        if not self.has("class_name"):
            return [str(number) for number in found]
        pairs = pa.table({"label": label, "name": self._text("class_name").take(pa.array(rows))})
        named = pairs.group_by(["label", "name"]).aggregate([]).sort_by("label").to_pydict()
        for column, other in (("label", "name"), ("name", "label")):
            seen: dict[Any, Any] = {}
            for value, paired in zip(named[column], named[other]):
                if seen.setdefault(value, paired) != paired:
                    raise FgvczooError(
                        f"{self.source}: {column} {value!r} goes with {seen[value]!r} and with {paired!r}; "
                        "expected one class_name for each label"
                    )
        check_class_names(named["name"], self.source)
        return named["name"]

    def labels(self, names: Sequence[str]) -> np.ndarray:
        """(N,) int64, places in `names`; `FgvczooError` naming the first row whose label is none of them."""
        label = self._labels()
        if is_text(label.type):
            found = pc.fill_null(pc.index_in(label, value_set=pa.array(names, label.type)), -1).to_numpy()
            if len(wrong := np.flatnonzero(found < 0)):
                given = label[int(wrong[0])].as_py()
                near = did_you_mean(given, names)
                raise FgvczooError(f"{self.name_of(wrong[0])}: label {given!r} is none of the classes of train{near}")
            return found.astype(np.int64)
        numbers = label.to_numpy()
        if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= len(names)))):
            given = numbers[wrong[0]]
            hint = "; -1 marks rows without a label" if given == -1 else ""
            raise FgvczooError(f"{self.name_of(wrong[0])}: label {given}; expected 0..{len(names) - 1}{hint}")
        return numbers

    def number_labels(self) -> None:
        """Takes labels for numbers where all of them are written as whole numbers."""
        label = self.table["label"]
        if not pc.any(pc.invert(pc.match_substring_regex(label, _WHOLE_NUMBER))).as_py():
            numbers = self._cast(label, pa.int64(), "label", "a name or a whole number")
            self.table = self.table.set_column(self.table.column_names.index("label"), "label", numbers)

    def _labels(self) -> pa.ChunkedArray:
        """The column `label` as text or int64, none of it empty."""
        return self._text("label") if is_text(_plain(self.table["label"]).type) else self._whole("label")

    def _whole(self, name: str) -> pa.ChunkedArray:
        """A column of whole numbers as int64, none of it empty."""
        column = _plain(self.table[name])
        self._refuse(pc.is_null(column, nan_is_null=True), f"{name} is empty; expected a name or a whole number")
        return self._cast(column, pa.int64(), name, "a name or a whole number")

    def _text(self, name: str) -> pa.ChunkedArray:
        """A column of text, none of it empty."""
        column = self._cast(_plain(self.table[name]), pa.large_string(), name, "text")
        empty = pc.is_in(pc.fill_null(column, ""), value_set=pa.array(["", "nan", "NaN"], column.type))
        self._refuse(empty, f"{name} is empty; expected a name")
        return column

    # -- annotations ------------------------------------------------------------------------------------------------

    def _bbox(self) -> np.ndarray:
        """(N, 4) float64."""
        if "bbox" in self.table.column_names:
            values, counts = self._lists("bbox", 1)
            self._refuse(counts != 4, "bbox does not hold four numbers; expected x0, y0, x1, y1")
            corners = values.reshape(-1, 4)
        else:
            corners = np.stack([self._numbers(name) for name in _CORNERS], axis=1)
        self._refuse(~_has_area(corners), "bbox has no area; expected x0, y0, x1, y1 with x0 < x1, y0 < y1")
        return corners

    def _boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """All boxes (M, 4) float64, and where those of each row begin, (N + 1,)."""
        corners, counts = self._lists("boxes", 2, width=4)
        rows = np.repeat(np.arange(len(counts)), counts)
        wrong = np.zeros(len(counts), bool)
        wrong[rows[~_has_area(corners)]] = True
        self._refuse(wrong, "boxes has one without area; expected lists x0, y0, x1, y1 with x0 < x1, y0 < y1")
        return corners, np.concatenate([[0], np.cumsum(counts)])

    def _parts(self) -> np.ndarray:
        """(N, K, 3) float32; rows without parts, and points that are not finite, are invisible."""
        points, counts = self._lists("parts", 2, width=3)
        number = int(counts.max(initial=0))
        self._refuse((counts != 0) & (counts != number), f"parts does not hold {number} points as another row does")
        parts = np.zeros((len(counts), number, 3), np.float32)
        parts[counts > 0] = points.reshape(np.count_nonzero(counts), number, 3)
        return np.where((np.isfinite(parts).all(axis=2) & (parts[..., 2] > 0))[..., None], parts, 0)

    def _attributes(self) -> dict[str, np.ndarray]:
        """(N, A): attributes float32, attribute_certainty uint8 where there is such a column."""
        attributes = self._matrix("attributes")
        self._refuse(~np.isfinite(attributes).all(axis=1), "attributes holds what is no number")
        tables = {"attributes": attributes.astype(np.float32)}
        if "attribute_certainty" in self.table.column_names:
            certainty = self._matrix("attribute_certainty")
            self._refuse(~_whole(certainty, 255).all(axis=1), "attribute_certainty holds others than 0..255")
            if certainty.shape != attributes.shape:
                raise FgvczooError(
                    f"{self.source}: {attributes.shape[1]} attributes and {certainty.shape[1]} attribute_certainty"
                )
            tables["attribute_certainty"] = certainty.astype(np.uint8)
        return tables

    def _label_levels(self) -> np.ndarray:
        """(N, L) int64."""
        levels = self._matrix("label_levels")
        self._refuse(~_whole(levels, 2**53).all(axis=1), "label_levels holds others than whole numbers from 0")
        return levels.astype(np.int64)

    def _metadata(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """name -> (N, k) float32, zero where unknown, and name -> (N,) bool, whether it is known.

        Place: latitude, longitude in degrees. Date: month 1..12; hour 0..23, which must be known where there is a
        column; day 1..31. Hour and day are NaN where they alone are not known.
        """
        names = self.table.column_names
        tables: dict[str, np.ndarray] = {}
        if "latitude" in names:
            place = np.stack([self._numbers(name) for name in ("latitude", "longitude")], axis=1)
            self._refuse((np.abs(place) > (90, 180)).any(axis=1), "latitude, longitude outside -90..90, -180..180")
            tables["place"] = place
        if "date" in names:
            month, day = self._days()
            hour = np.full_like(month, np.nan)
            if "hour" in names:
                hour = np.floor(self._numbers("hour"))
                self._refuse((hour < 0) | (hour >= 24), "hour outside 0..23")
            tables["date"] = np.stack([month, hour, day], axis=1)
        for name in names:
            if name.startswith(METADATA):
                tables[name.removeprefix(METADATA)] = self._vectors(name)
        needed = {"date": 1 + ("hour" in names)}
        valid = {name: np.isfinite(table[:, : needed.get(name)]).all(axis=1) for name, table in tables.items()}
        values = {name: np.where(valid[name][:, None], table, 0).astype(np.float32) for name, table in tables.items()}
        return values, valid

    def _days(self) -> tuple[np.ndarray, np.ndarray]:
        """Of dates, or of text as 2021-05, 2021-05-03 or 2021-05-03T14:30: (N,) months 1..12 and (N,) days 1..31, NaN
        where unknown."""
        column = _plain(self.table["date"])
        if pa.types.is_temporal(column.type):
            month, day = (part(column).cast(pa.float64()).to_numpy() for part in (pc.month, pc.day))
            return month, day
        text = self._cast(column, pa.large_string(), "date", "a date as 2021-05-03")
        text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
        found = pc.extract_regex(text, pattern=_DATE)
        month, day = (pc.struct_field(found, name) for name in ("month", "day"))
        self._refuse(pc.and_(pc.is_valid(text), pc.is_null(month)), "date is not written as 2021-05-03")
        day = pc.if_else(pc.equal(day, ""), pa.scalar(None, day.type), day)
        return month.cast(pa.float64()).to_numpy(), day.cast(pa.float64()).to_numpy()

    def _vectors(self, name: str) -> np.ndarray:
        """A column of numbers, or of lists of equal length: (N, k) float64, NaN where a cell is empty."""
        column = _plain(self.table[name])
        if not _is_list(column.type) and not (is_text(column.type) and _has_brackets(column)):
            return self._numbers(name)[:, None]
        values, counts = self._lists(name, 1)
        width = int(counts.max(initial=0))
        self._refuse((counts != 0) & (counts != width), f"{name} does not hold {width} numbers as another row does")
        vectors = np.full((len(counts), width), np.nan)
        vectors[counts > 0] = values.reshape(np.count_nonzero(counts), width)
        return vectors

    def _matrix(self, name: str) -> np.ndarray:
        """A column of lists of equal length, none of it empty: (N, width) float64."""
        values, counts = self._lists(name, 1)
        width = int(counts.max(initial=0))
        self._refuse((counts != width) | (counts == 0), f"{name} does not hold {width} numbers as another row does")
        return values.reshape(len(counts), width)

    # -- cells ------------------------------------------------------------------------------------------------------

    def _numbers(self, name: str) -> np.ndarray:
        """(N,) float64, NaN where a cell is empty."""
        return self._cast(_plain(self.table[name]), pa.float64(), name, "a number").to_numpy()

    def _lists(self, name: str, depth: int, width: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The entries of all rows, numbers (M,) or lists (M, width), as float64, and how many each row has, (N,)."""
        kind = pa.float64()
        for _ in range(depth):
            kind = pa.large_list(kind)
        what = "a list of numbers" if depth == 1 else f"a list of lists of {width} numbers"
        column = _plain(self.table[name])
        if is_text(column.type):
            column = self._parse(column, kind, name, what)
        lists = self._cast(column, kind, name, what).combine_chunks()
        counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        entries = lists.flatten()
        if depth == 2:
            uneven = pc.fill_null(pc.list_value_length(entries), 0).to_numpy() != width
            wrong = np.zeros(len(counts), bool)
            wrong[np.repeat(np.arange(len(counts)), counts)[uneven]] = True
            self._refuse(wrong, f"{name} is not {what}")
            entries = entries.flatten()
        values = entries.to_numpy(zero_copy_only=False)
        return (values.reshape(-1, width) if depth == 2 else values), counts

    def _parse(self, column: pa.ChunkedArray, kind: pa.DataType, name: str, what: str) -> pa.ChunkedArray:
        """JSON text -> lists."""

        def wrong(row: int, cell: str) -> FgvczooError:
            return FgvczooError(f"{self.name_of(row)}: {name} is {short(cell)}; expected {what} as JSON")

        chunks, start = [], 0
        for chunk in column.chunks:
            cells, values = chunk.to_pylist(), []
            for row, cell in enumerate(cells, start):
                try:
                    values.append(json.loads(cell) if cell else None)
                except (ValueError, RecursionError):
                    raise wrong(row, cell) from None
            try:
                chunks.append(pa.array(values, kind))
            except (pa.ArrowException, OverflowError):
                for row, (cell, value) in enumerate(zip(cells, values), start):
                    try:
                        pa.array([value], kind)
                    except (pa.ArrowException, OverflowError):
                        raise wrong(row, cell) from None
                raise
            start += len(cells)
        return pa.chunked_array(chunks, kind)

    def _cast(self, column: pa.ChunkedArray, kind: pa.DataType, name: str, what: str) -> pa.ChunkedArray:
        """Another type; `FgvczooError` naming the first row that cannot have it. Empty text is a missing value."""
        if is_text(column.type) and not is_text(kind):
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        try:
            return column.cast(kind)
        except pa.ArrowException:
            for row in range(len(column)):
                cell = column.slice(row, 1)
                try:
                    cell.cast(kind)
                except pa.ArrowException:
                    given = short(cell[0].as_py())
                    raise FgvczooError(f"{self.name_of(row)}: {name} is {given}; expected {what}") from None
            raise

    def _refuse(self, wrong: Any, message: str) -> None:
        """`FgvczooError` naming the first row that is wrong: (N,) bool, of numpy or Arrow."""
        rows = np.flatnonzero(np.asarray(wrong))
        if len(rows):
            raise FgvczooError(f"{self.name_of(int(rows[0]))}: {message}")


def read_table(file: Path) -> Columns:
    """A .csv (with commas, in UTF-8) or .parquet file with a row for each picture.

    Its columns: `path` or `file_name`, `label`, and as it pleases `class_name`, `split`, `mask`, those of `ANNOTATIONS`
    and `metadata.NAME`; `Columns.unread` names the others. In a CSV file labels that all are whole numbers are numbers.
    """
    names = _header(file)
    if doubled := [name for place, name in enumerate(names) if name in names[:place]]:
        raise FgvczooError(f"{file}: the column {doubled[0]!r} is there twice")
    if "path" in names and "file_name" in names:
        raise FgvczooError(f"{file}: columns path and file_name; expected one of them")
    known = [name for name in names if name in _COLUMNS or name.startswith(METADATA)]
    for needed, present in (("path", {"path", "file_name"}), ("label", {"label"})):
        if present.isdisjoint(names):
            others = [name for name in names if name not in known]
            near = did_you_mean(needed, others, most=1).replace("did you mean", "is it")
            if len(names) == 1 and (separator := re.search("[;\t|]", names[0])):
                near = f"; columns are separated by {separator[0]!r}, expected commas"
            listed = f"; it has {', '.join(map(short, names[:10]))}"
            raise FgvczooError(f"{file}: no column {needed!r}{near or listed}")
    try:
        table = _read_csv(file, known) if file.suffix == ".csv" else _read_parquet(file, known)
    except (pa.ArrowException, OSError) as error:
        raise FgvczooError(f"{file}: cannot be read ({one_line(error)})") from None
    table = table.rename_columns(["path" if name == "file_name" else name for name in table.column_names])
    columns = Columns(table, str(file), partial(_name_of_row, file))
    if file.suffix == ".csv":
        columns.number_labels()
    columns.unread = [name for name in names if name not in known]
    return columns


def _header(file: Path) -> list[str]:
    try:
        if file.suffix == ".parquet":
            return parquet.read_schema(file).names
        with file.open(encoding="utf-8-sig", newline="") as handle:
            return next(filter(None, csv.reader(handle)), [])
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise FgvczooError(f"{file}: cannot be read ({one_line(error)})") from None


def _read_csv(file: Path, names: Sequence[str]) -> pa.Table:
    """Columns of a CSV file as text; its errors name a row."""
    return pyarrow.csv.read_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names, pa.large_string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )


def _read_parquet(file: Path, names: Sequence[str]) -> pa.Table:
    with parquet.ParquetFile(file) as opened:  # `read_table` would add columns that it finds in the names of folders
        return opened.read(columns=names)


def _name_of_row(file: Path, row: int) -> str:
    """The file and the line where a row begins; in a Parquet file the row's number, from 1."""
    if file.suffix == ".csv":
        with (
            file.open(encoding="utf-8-sig", newline="") as handle,
            suppress(csv.Error),
        ):  # a cell of over 131,072 letters
            lines, begin, found = csv.reader(handle), 1, -1  # the header is no row
            for cells in lines:
                if cells and found == row:
                    return f"{file}, line {begin}"
                found += bool(cells)
                begin = lines.line_num + 1
    return f"{file}, row {row + 1}"


def one_line(error: Exception) -> str:
    """What another library says, on one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without dictionary or extension type."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _has_brackets(column: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.starts_with(column, "[")).as_py())


def _has_area(corners: np.ndarray) -> np.ndarray:
    """(N, 4) -> (N,) bool; not finite is none."""
    x0, y0, x1, y1 = corners.T
    return np.isfinite(corners).all(axis=1) & (x1 > x0) & (y1 > y0)


def _whole(values: np.ndarray, most: int) -> np.ndarray:
    """Which are whole numbers of 0..most."""
    return (values >= 0) & (values <= most) & (values == np.floor(values))
