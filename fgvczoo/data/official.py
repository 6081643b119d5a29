"""What the readers of official layouts share: where a layout lies, lists and tables, the splits of the protocols."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from fgvczoo.data.base import TEXT, Reader, check_class_names
from fgvczoo.data.cached import cached_table
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import read_image, read_mask

Protocol = Literal["standard", "metric-learning"]
_UNPACK = {".tgz": "tar -xzf", ".gz": "tar -xzf", ".tar": "tar -xf", ".zip": "unzip"}


class Archive(NamedTuple):
    """What a set is handed out as. md5: where one is known; `confirmed` where another one is wrong."""

    name: str
    md5: str | None = None
    confirmed: bool = False


@dataclass(frozen=True)
class Part:
    """Images that one file lists.

    source: the file, as messages call it.
    split: its name, or (n,) one of each image; the rows of several parts of one split are joined.
    paths: relative to the folder of the pictures, with "/".
    labels: (n,) int64.
    """

    source: Path
    split: str | np.ndarray
    paths: Sequence[str] | np.ndarray
    labels: np.ndarray


class Official(Reader):
    """A reader of an official layout. Its lists are read when it is made, an annotation when it is first asked for.

    A subclass gives its images to `take`, and has a method `_read_KEY` for each of its `keys`: what that returns has an
    annotation for every row, by its number; a dict stands for several batch keys.

    Attributes beside those of `Reader`:
        image_ids: (N,) the paths of the lists, unless the set has other ids.
        folder: where the layout lies. pictures: the folder that paths are relative to.
        archives: what it is handed out as.
        optional: keys whose files come apart, and may be missing. also: properties that hold more annotations.
    """

    folder: Path
    pictures: Path
    _files: Any
    archives: tuple[Archive, ...] = ()
    optional: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    licence_allows_pictures = False  # photographs of others
    keys: tuple[str, ...] = ()

    def take(
        self,
        parts: Sequence[Part],
        class_names: list[str],
        *,
        protocol: Protocol = "standard",
        real: dict[str, int] | None = None,
    ) -> None:
        """Enters images, classes and splits; `FgvczooError` where lists do not fit themselves, their classes or files.

        real: number of images by split, asserted; None where it is not the real set.
        """
        check_class_names(class_names, str(self.folder))
        for part in parts:
            check_unique(part.paths, part.source)
            check_listed(self.pictures, part.paths, part.source)
            wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(class_names)))
            if len(wrong):
                raise FgvczooError(
                    f"{part.source}: {part.paths[wrong[0]]!r} has class {part.labels[wrong[0]]}, counted from 0; "
                    f"expected 0..{len(class_names) - 1}"
                )
        self._files = np.array([path for part in parts for path in part.paths], TEXT)
        check_unique(self._files, self.folder)
        self.image_ids = self._files
        self.labels = np.concatenate([part.labels for part in parts]).astype(np.int64)
        split_of = np.concatenate([np.broadcast_to(np.array(part.split, TEXT), len(part.paths)) for part in parts])
        splits = {name: np.flatnonzero(split_of == name) for name in dict.fromkeys(split_of.tolist())}
        for name in ("train", *splits):
            if not len(splits.get(name, ())):
                raise FgvczooError(f"{self.folder}: no {name} image")
        check_counts(self.folder, {name: len(rows) for name, rows in splits.items()}, real)
        if protocol == "standard":
            self.class_names, self.splits = class_names, splits
        else:
            is_train = split_of == "train"
            self.class_names, self.splits = by_protocol(protocol, class_names, self.labels, is_train)
            self.all_class_names = class_names

    def take_cached(self, version: int, sources: Sequence[Path], make: Callable[[], None]) -> None:
        """Enters what `make` enters (`_files`, labels, class names, splits, each row in one of them), which is kept in
        the cache and mapped by all processes; `make` runs and checks the files only where one of `sources` has changed.

        sources: the lists. A folder whose content was listed instead counts as changed when a file in it was added,
        removed or renamed, by the time of its last change; it must be named itself, one above or below does not count.
        version: of what `make` gives.
        """

        def table() -> pa.Table:
            make()
            split_of = np.empty(len(self.labels), np.int8)
            for number, rows in enumerate(self.splits.values()):
                split_of[rows] = number
            columns = {"file_name": pa.array(self._files.tolist(), pa.large_string()), "label": self.labels}
            told = {"class_names": json.dumps(self.class_names), "splits": json.dumps(list(self.splits))}
            return pa.table({**columns, "split": split_of}).replace_schema_metadata(told)

        found = cached_table(self.name, version, sources, table)
        told = found.schema.metadata
        self._files = found.column("file_name").chunk(0)
        self.labels, split_of = (found.column(name).chunk(0).to_numpy() for name in ("label", "split"))
        self.class_names = json.loads(told[b"class_names"])
        self.splits = {name: np.flatnonzero(split_of == k) for k, name in enumerate(json.loads(told[b"splits"]))}
        self.__dict__.pop("image_ids", None)

    @cached_property
    def image_ids(self) -> np.ndarray:  # type: ignore[override]
        """(N,) the paths of the lists: of mapped ones only where they are asked for, loading is not."""
        files = self._files
        return files if isinstance(files, np.ndarray) else files.to_numpy(zero_copy_only=False).astype(TEXT)

    def picture(self, index: int) -> Path | bytes:
        return self.pictures / str(self._files[index])

    def require(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key in self.keys:
                self.table(key)

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        notes: dict[str, Any] = {}
        for key in keys:
            if key in self.keys:
                note = self.table(key)[index]
                notes |= note if isinstance(note, dict) else {key: note}
        return notes

    def table(self, key: str) -> Any:
        """The annotations of all rows, read once."""
        tables: dict[str, Any] = self.__dict__.setdefault("_tables", {})
        if key not in tables:
            tables[key] = getattr(self, f"_read_{key}")()
        return tables[key]

    def box(self, index: int) -> np.ndarray | None:
        return self.table("bbox")[index] if "bbox" in self.keys else None


@dataclass(frozen=True)
class Together:
    """A table of several batch keys: key -> table, or dict of tables by name, whose row is a dict again."""

    tables: dict[str, Any]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            key: {name: inner[index] for name, inner in table.items()} if isinstance(table, dict) else table[index]
            for key, table in self.tables.items()
        }


def known(values: dict[str, np.ndarray], needed: dict[str, int] | None = None) -> Together:
    """The table of `metadata` and `metadata_valid`, of name -> (N, k) with NaN where unknown; there it becomes zero.

    needed: of a name, how many columns must be known; the others stay NaN where they alone are not.
    """
    first = needed or {}
    valid = {name: np.isfinite(table[:, : first.get(name)]).all(axis=1) for name, table in values.items()}
    zeroed = {name: np.where(valid[name][:, None], table, 0).astype(np.float32) for name, table in values.items()}
    return Together({"metadata": zeroed, "metadata_valid": valid})


class Ragged:
    """Rows of different lengths in one array: `values` (M, ...), of which row i has `counts[i]`."""

    def __init__(self, values: np.ndarray, counts: np.ndarray) -> None:
        self.values, self.starts = values, np.concatenate([[0], np.cumsum(counts)])

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class Masks:
    """Segmentations as pictures of class indices, read when they are asked for.

    files: of each row, relative to `folder`. at_least: pixels from here on are 1 and the others 0, where the pictures
    are grey votes; None where they are class indices.
    """

    folder: Path
    files: Sequence[str] | np.ndarray
    at_least: int | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        file = self.folder / str(self.files[index])
        if self.at_least is None:
            return read_mask(file)
        return (read_image(file)[..., 0] >= self.at_least).astype(np.uint8)


@dataclass(frozen=True)
class Pictures:
    """Second pictures of the rows, read when they are asked for. files: of each row, relative to `folder`."""

    folder: Path
    files: Sequence[str]

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.folder / self.files[index])


def find_folder(
    root: str | Path | None,
    inner: Sequence[str],
    markers: Sequence[str],
    *,
    archives: Iterable[Archive] = (),
    get: str,
) -> Path:
    """The first of the folders `root`/`inner` that holds one of `markers`; `FgvczooError` where there is none.

    archives: where one lies there instead, the message says that it is not unpacked. get: how to come by the set.
    """
    if root is None:
        raise FgvczooError(f"root is not given; {get}")
    root = Path(root)
    if root.is_file():
        raise FgvczooError(f"{root}: a file; unpack it if it is an archive, and give a folder; {get}")
    if not root.is_dir():
        raise FgvczooError(f"{root}: no such folder; {get}")
    folders = [root / name for name in inner]
    for folder in folders:
        if any((folder / marker).exists() for marker in markers):
            return folder
    for name, *_ in archives:
        for folder in (root, *folders):
            if (folder / name).is_file() and (command := _UNPACK.get(Path(name).suffix)):
                raise FgvczooError(f"{folder / name} is not unpacked; run: {command} {name} in {folder}")
    raise FgvczooError(f"{root}: no {' and no '.join(markers)} in it; {get}")


def by_protocol(
    protocol: Protocol, all_class_names: list[str], labels: np.ndarray, is_train: np.ndarray
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes that are trained on, and the splits.

    "standard": the official split, "train" and "test".
    "metric-learning": all images of the first half of the classes are "train", all of the others "test", "query" and
        "gallery", whatever the official split says. The others keep their labels, which are those of no trained class.

    all_class_names: of all labels. labels, is_train: (N,) of the images.
    """
    check_choice("protocol", protocol, get_args(Protocol))
    rows = np.arange(len(labels))
    if protocol == "standard":
        return all_class_names, {"train": rows[is_train], "test": rows[~is_train]}
    half = len(all_class_names) // 2
    return all_class_names[:half], disjoint_splits(labels < half)


def disjoint_splits(is_train: np.ndarray) -> dict[str, np.ndarray]:
    """Splits of retrieval, where no class of "train" is in the others: every test image is a query to all the rest."""
    train, test = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    return {"train": train, "test": test, "query": test, "gallery": test}


def check_choice(option: str, given: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of an option's."""
    if given not in choices:
        raise FgvczooError(f"{option}={given!r}; expected {' or '.join(map(repr, choices))}")


def check_counts(folder: Path, found: dict[str, int], real: dict[str, int] | None) -> None:
    """Refuses other numbers of images than the real set has. real: None where it is not the real set."""
    if real is not None and found != real:
        have, want = (", ".join(f"{n:,} {name}" for name, n in counts.items()) for counts in (found, real))
        raise FgvczooError(f"{folder}: {have} images; expected {want}; unpack the archives again")


def check_unique(ids: Sequence[str] | np.ndarray, source: Path) -> None:
    """Refuses an empty list, and one that names something twice."""
    if not len(ids):
        raise FgvczooError(f"{source}: lists no image")
    seen: set[str] = set()
    for item in ids:
        if item in seen:
            raise FgvczooError(f"{source}: {str(item)!r} occurs twice")
        seen.add(item)


def check_path(path: str, source: Path) -> None:
    """Refuses a path that could lead out of the folder that it is relative to."""
    if path and path[0] != "/" and ".." not in path and "\\" not in path and "\0" not in path:
        return  # nearly all: a million paths take a while
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise FgvczooError(f"{source}: lists {path!r}, outside the images folder")


def check_listed(folder: Path, paths: Sequence[str] | np.ndarray, source: Path) -> None:
    """Refuses paths, relative to `folder` with "/", that lead out of it, and files that are not there.

    source: the list, as messages call it.
    """
    # One listing for each folder: thousands of single questions take long on network disks.
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        check_path(path, source)
        parent, _, name = path.rpartition("/")
        if parent not in present:
            inner = folder / parent
            present[parent] = {entry.name for entry in inner.iterdir()} if inner.is_dir() else set()
        if name not in present[parent]:
            missing.append(path)
    if missing:
        raise FgvczooError(
            f"{folder}: {len(missing)} of {len(paths)} listed images are missing, such as "
            f"{', '.join(map(repr, missing[:5]))}; unpack the archive again"
        )


def read_text(file: Path) -> str:
    """The text of a file of UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FgvczooError(f"{file} is missing; unpack the archive again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FgvczooError(f"{file}: cannot be read ({error})") from None


def read_lines(file: Path, cells: int, what: str, *, separator: str | None = None, header: int = 0) -> list[list[str]]:
    """The lines of a list, each cut into so many cells, the last of which may hold the separator; empty ones left out.

    what: the cells, in messages. separator: blanks, by default. header: lines at the start that are not read.
    """
    found = []
    for place, line in enumerate(read_text(file).splitlines()[header:], 1 + header):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.strip().split(separator, cells - 1)]
        if len(parts) != cells or not all(parts):
            raise FgvczooError(f"{file}: line {place} is {line[:80]!r}; expected {what}")
        found.append(parts)
    return found


def to_numbers(file: Path, rows: Sequence[Sequence[str]], width: int) -> np.ndarray:
    """(n, width) float64 of cells; `FgvczooError` naming the first row that holds something else."""
    try:
        return np.array(rows, TEXT).astype(np.float64).reshape(len(rows), width)
    except ValueError:
        for row in rows:
            try:
                [float(cell) for cell in row]
            except ValueError:
                raise FgvczooError(f"{file}: {' '.join(row)[:80]!r} is not {width} numbers") from None
        raise FgvczooError(f"{file}: rows of different lengths; expected {width} numbers each") from None


def to_labels(file: Path, cells: Sequence[str], first: int, count: int) -> np.ndarray:
    """(n,) int64 from 0 of class numbers `first`..`first + count - 1`; `FgvczooError` naming the first other one."""
    labels = np.empty(len(cells), np.int64)
    for place, cell in enumerate(cells):
        if not cell.isdecimal() or len(cell) > 9 or not first <= int(cell) < first + count:
            raise FgvczooError(f"{file}: class {cell[:20]!r}; expected {first}..{first + count - 1}")
        labels[place] = int(cell) - first
    return labels


def join(file: Path, ids: Sequence[str], lines: Iterable[Sequence[str]]) -> list[list[str]]:
    """Lines that begin with an id -> the rest of the line of each of `ids`, which must be there once; others are left
    out, since one file may serve several splits."""
    wanted = {name: place for place, name in enumerate(ids)}
    if len(wanted) < len(ids):
        twice = next(name for place, name in enumerate(ids) if wanted[name] != place)
        raise FgvczooError(f"{file}: wanted for {twice!r}, which occurs twice")
    found: list[list[str] | None] = [None] * len(ids)
    for name, *rest in lines:
        if (place := wanted.get(name)) is not None:
            if found[place] is not None:
                raise FgvczooError(f"{file}: two lines for {name!r}; expected one")
            found[place] = list(rest)
    missing = [name for name, line in zip(ids, found) if line is None]
    if missing:
        raise FgvczooError(f"{file}: no line for {len(missing)} images, such as {', '.join(map(repr, missing[:5]))}")
    return [line for line in found if line is not None]


def check_boxes(file: Path, ids: Sequence[str] | np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The same boxes, (n, 4) x0, y0, x1, y1; `FgvczooError` naming the first without area."""
    x0, y0, x1, y1 = boxes.T
    wrong = np.flatnonzero(~((x1 > x0) & (y1 > y0) & np.isfinite(boxes).all(axis=1)))
    if len(wrong):
        raise FgvczooError(f"{file}: the box of {str(ids[wrong[0]])!r} has no area")
    return boxes


def from_size(boxes: np.ndarray) -> np.ndarray:
    """x, y, width, height -> x0, y0, x1, y1."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def mirrored(names: list[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of places whose names differ by left and right: parts that a mirrored picture exchanges."""
    others = [name.replace("left", "right") for name in names]
    return tuple(
        (place, names.index(other))
        for place, (name, other) in enumerate(zip(names, others))
        if other != name and other in names
    )


def tree_levels(paths: Sequence[Sequence[Any]]) -> list[tuple[list[Any], np.ndarray]]:
    """Of classes below others, given as paths from the top down to each: for each level its nodes, sorted, and (C,)
    the place of each class's among them. A class that lies higher stands for itself on the levels below it."""
    levels = []
    for level in range(max(map(len, paths))):
        nodes = [path[min(level, len(path) - 1)] for path in paths]
        known = sorted(set(nodes))
        place = {node: number for number, node in enumerate(known)}
        levels.append((known, np.array([place[node] for node in nodes], np.int64)))
    return levels
