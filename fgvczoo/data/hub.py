"""Data sets of the Hub, or any that the library `datasets` reads: downloaded and memory-mapped, or read as a stream.

Nothing of a data set is executed: `datasets` runs no scripts, pictures are decoded here.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from fgvczoo.data.base import FGVCDataModule, Reader, check_class_names, stratified
from fgvczoo.data.columns import ANNOTATIONS, METADATA, Columns, one_line
from fgvczoo.data.folder import plain_name
from fgvczoo.data.loader import Rows
from fgvczoo.errors import FgvczooError, FgvczooWarning, did_you_mean
from fgvczoo.preprocess import image_size, read_mask

# What data sets call their splits, the best name first.
_SPLITS = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_PICTURES = ("image", "mask")
_COLUMNS = (*_PICTURES, "label", "class_name", *ANNOTATIONS)
_NO_PASS = (0, -1, 0)  # epoch and place of a pass over a stream, and the process that it is of


class Hub(Reader):
    """The rows of a data set that `datasets` reads: those of train first, then of val, then of test.

    repo: of the Hub, "owner/name". root: instead, a local folder of such a set: of Parquet, Arrow or WebDataset files,
        or of pictures.
    config, revision: of the repository; without a revision the newest is read, which may change.
    columns: our names -> theirs; by default image and label have these names. Beside `image`, `label` and `mask`
        (pictures of class indices) those of a table, see docs/data/folder.md.
    splits: our names -> theirs. By default train, validation (valid, val) and test where they are there.
    class_names: of the labels, where the set has none, or others.

    Pictures are bytes in the rows, or files that `datasets` found in a folder of pictures; a path that is merely
    written in a row is not opened.

    Attributes beside those of `Reader`:
        theirs: our names of splits -> theirs.
        starts: our names of splits -> their first row.
        lengths: our names of splits -> number of rows, before "test" is cut from train.
    """

    licence_allows_pictures = False
    is_stream = False

    def __init__(
        self,
        repo: str | None,
        root: str | Path | None,
        *,
        config: str | None = None,
        revision: str | None = None,
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if (repo is None) == (root is None):
            raise FgvczooError("give repo, a data set of the Hub as owner/name, or root, a local folder; one of them")
        self.name = f"hub:{repo}" if repo is not None else plain_name(Path(os.path.realpath(str(root))).name)
        sets = self._load(repo, root, config, revision)
        self.theirs = self._choose(list(sets), splits)
        self._columns_of = {"image": "image", "label": "label", **(columns or {})}
        for name in self._columns_of:
            if name not in _COLUMNS and not name.startswith(METADATA):
                raise FgvczooError(
                    f"columns: no {name!r}{did_you_mean(name, _COLUMNS)}; known are {', '.join(_COLUMNS)}"
                )
        if len(set(self._columns_of.values())) < len(self._columns_of):
            raise FgvczooError(f"columns={self._columns_of}: a column is given twice")
        self._sets = {name: self._prepare(sets[theirs], theirs) for name, theirs in self.theirs.items()}
        # Only of a folder of pictures are paths those of the library; elsewhere a stranger wrote them.
        self._opens_paths = sets[self.theirs["train"]].info.builder_name == "imagefolder"
        self._features = self._sets["train"].features
        tables = [name for name in self._columns_of if name not in (*_PICTURES, "label")]
        kinds = Columns(pa.table({name: pa.array([], pa.null()) for name in tables}), self.name, self.name_of)
        self.keys = (*kinds.keys, *(("mask",) if "mask" in self._columns_of else ()))
        self.lengths = self._count()
        self.starts = dict(zip(self.lengths, np.cumsum([0, *self.lengths.values()]).tolist()))
        self.splits = {name: np.arange(start, start + self.lengths[name]) for name, start in self.starts.items()}
        for name, number in self.lengths.items():
            if not number:
                raise FgvczooError(f"{self.name}: the split {self.theirs[name]!r} is empty")
        self.class_names = self._names(class_names)
        check_class_names(self.class_names, self.name)

    def __len__(self) -> int:
        return sum(self.lengths.values())

    @abstractmethod
    def record(self, index: int) -> dict[str, Any]:
        """A row by our names of columns."""

    def picture(self, index: int) -> Path | bytes:
        return self._encoded(index, "image")

    def name_of(self, index: int) -> str:
        name, place = self._place(index)
        return f"{self.name}, row {place} of {self.theirs[name]}"

    def find(self, image_id: str) -> int | None:
        theirs, _, place = image_id.rpartition("/")
        for name in self.theirs:
            if self.theirs[name] == theirs and place.isdecimal() and int(place) < self.lengths[name]:
                return self.starts[name] + int(place)
        return None

    def row(self, index: int) -> dict[str, Any]:
        name, place = self._place(index)
        picture = self.picture(index)
        height, width = image_size(picture, self.name_of(index))
        label = self.label(index)
        return {
            "index": index,
            "image_id": f"{self.theirs[name]}/{place}",
            "path": str(picture) if isinstance(picture, Path) else None,
            "label": label,
            "class_name": self.class_names[label],
            "split": self.split_of(index),
            "height": height,
            "width": width,
            "crop": None,
        }

    def _place(self, index: int) -> tuple[str, int]:
        """Our name of the split that a row was read from, and its number there."""
        name = [name for name, start in self.starts.items() if start <= index][-1]
        return name, index - self.starts[name]

    def _encoded(self, index: int, column: str) -> Path | bytes:
        value = self.record(index)[column] or {"bytes": None, "path": None}
        if value["bytes"]:
            return value["bytes"]
        path = value["path"]
        if not path or not self._opens_paths:
            what = f"only the path {path!r}, which is not opened" if path else "none"
            raise FgvczooError(f"{self.name_of(index)}: expected the bytes of a picture in {column}, found {what}")
        if "://" not in path:
            return Path(path)
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except Exception as error:  # of any file system
            raise FgvczooError(f"{self.name_of(index)}: cannot be read ({one_line(error)})") from None

    # -- opening ----------------------------------------------------------------------------------------------------

    def _load(self, repo: str | None, root: str | Path | None, config: str | None, revision: str | None) -> Any:
        """Their name of a split -> `Dataset` or `IterableDataset`."""
        if repo is not None:
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo):
                raise FgvczooError(f"repo={repo!r}; expected a data set of the Hub as owner/name, or a folder as root")
            if Path(repo).exists():
                raise FgvczooError(f"repo={repo!r} is also a folder here; give it as root, or start elsewhere")
            source = repo
        else:
            if not Path(str(root)).is_dir():
                raise FgvczooError(f"{root}: no such folder; expected one of Parquet, Arrow, tar or picture files")
            if any((Path(str(root)) / name).is_file() for name in ("dataset_dict.json", "state.json")):
                raise FgvczooError(f"{root}: written by save_to_disk; write it with to_parquet for every split instead")
            source = str(Path(str(root)).absolute())
        try:
            with _unlogged():
                return datasets.load_dataset(source, name=config, revision=revision, streaming=self.is_stream)
        except Exception as error:  # of the library, of the client of the Hub, of its transport, of Arrow
            raise FgvczooError(f"{self.name}: {_reason(error, config, revision)}") from None

    def _choose(self, there: list[str], given: Mapping[str, str] | None) -> dict[str, str]:
        """Our names of splits -> theirs."""
        if given is None:
            chosen = {}
            for name, candidates in _SPLITS.items():
                if found := [theirs for theirs in candidates if theirs in there]:
                    chosen[name] = found[0]
        else:
            for name in given:
                if name not in _SPLITS:
                    raise FgvczooError(
                        f"splits: no {name!r}; expected {', '.join(_SPLITS)}{did_you_mean(name, _SPLITS)}"
                    )
            chosen = {name: given[name] for name in _SPLITS if name in given}
            for theirs in chosen.values():
                if theirs not in there:
                    hint = did_you_mean(theirs, there)
                    raise FgvczooError(f"{self.name}: no split {theirs!r}; it has {', '.join(there)}{hint}")
            if len(set(chosen.values())) < len(chosen):
                raise FgvczooError(f"splits={dict(given)}: one split for two of ours")
        if "train" not in chosen:
            raise FgvczooError(f"{self.name}: no split train; it has {', '.join(there)}; name one in splits as train")
        return chosen

    def _prepare(self, dataset: Any, theirs: str) -> Any:
        """The wanted columns by our names, pictures as they are encoded."""
        features = dataset.features
        if features is None:
            raise FgvczooError(f"{self.name}: a stream that does not say what its columns are; leave out streaming")
        for name, column in self._columns_of.items():
            if column not in features:
                alike = [other for other, feature in features.items() if _is_like(feature, name)]
                hint = f"; is it {', '.join(alike)}?" if alike else did_you_mean(column, features) or "."
                listed = ", ".join(list(features)[:20])
                raise FgvczooError(
                    f"{self.name}: no column {column!r} in {theirs}, which has {listed}{hint} Give columns: "
                    f"{{{name}: NAME}}"
                )
            if name in _PICTURES and not _is_like(features[column], name):
                raise FgvczooError(f"{self.name}: the column {column!r} holds {features[column]}; expected pictures")
        if self.is_stream:
            dataset = dataset.decode(False)  # a stream of files decodes in threads of its own, before any other step
        for name in _PICTURES:
            if name in self._columns_of:
                dataset = dataset.cast_column(self._columns_of[name], datasets.Image(decode=False))
        dataset = dataset.select_columns(list(self._columns_of.values()))
        renamed = {column: name for name, column in self._columns_of.items() if column != name}
        if renamed:
            dataset = dataset.rename_columns(renamed)
        return dataset

    @abstractmethod
    def _count(self) -> dict[str, int]:
        """Our names of splits -> number of rows."""

    @abstractmethod
    def _names_in_rows(self) -> list[str]:
        """Class names where the type of the column has none."""

    def _names(self, given: Sequence[str] | None) -> list[str]:
        feature = self._features["label"]
        if not isinstance(feature, datasets.ClassLabel):
            return list(given) if given is not None else self._names_in_rows()
        if given is not None and len(given) != len(feature.names):
            raise FgvczooError(f"class_names: {len(given)} names; {self.name} has {len(feature.names)} classes")
        return list(given if given is not None else feature.names)


class HubTable(Hub):
    """A data set that is downloaded: its rows are memory-mapped, and shared by processes.

    test_fraction: see `Folder`. Others: see `Hub`.
    """

    def __init__(
        self, repo: str | None, root: str | Path | None, *, test_fraction: float = 0.2, **options: Any
    ) -> None:
        super().__init__(repo, root, **options)
        self.labels = self._columns.labels(self.class_names)
        if "test" not in self.splits and test_fraction:
            self.splits["train"], self.splits["test"] = stratified(
                self.splits["train"], self.labels, test_fraction, "test"
            )

    def record(self, index: int) -> dict[str, Any]:
        name, place = self._place(index)
        return self._sets[name][place]

    def require(self, keys: Sequence[str]) -> None:
        self._columns.require(keys)

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        notes = self._columns.annotations(index, keys)
        if "mask" in keys:
            notes["mask"] = read_mask(self._encoded(index, "mask"), self.name_of(index))
        return notes

    def _count(self) -> dict[str, int]:
        return {name: len(dataset) for name, dataset in self._sets.items()}

    @cached_property
    def _columns(self) -> Columns:
        wanted = [name for name in self._columns_of if name not in _PICTURES]
        parts = [dataset.select_columns(wanted).with_format("arrow")[:] for dataset in self._sets.values()]
        return Columns(pa.concat_tables(parts), self.name, self.name_of)

    def _names_in_rows(self) -> list[str]:
        return self._columns.class_names(self.splits["train"])


class HubStream(Hub):
    """A data set that is read from its first row to its last, as often as it takes, and never as a whole.

    A row is its place in the stream; reading rows in ascending order is one pass.

    lengths: our names of splits -> number of rows to read, where the data set does not tell, or fewer. Others: see
    `Hub`.
    """

    is_stream = True

    def __init__(
        self, repo: str | None, root: str | Path | None, *, lengths: Mapping[str, int] | None = None, **options: Any
    ) -> None:
        self._given = dict(lengths or {})
        super().__init__(repo, root, **options)
        self._kept: tuple[int, dict[str, Any]] | None = None
        self._pass: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._at = -1  # the last row of the pass
        self._shapes: dict[str, tuple[int, ...]] = {}

    def record(self, index: int) -> dict[str, Any]:
        if self._kept is None or self._kept[0] != index:
            start = self.starts[self._place(index)[0]]
            rows, at = (self._pass, self._at) if start <= self._at < index else (self.rows(start), start - 1)
            self._at = -1  # until the row is reached: a pass that breaks off is not gone on with
            while at < index:
                at, record = next(rows)
            self._pass, self._at = rows, at
            self.keep(index, record)
        assert self._kept is not None
        return self._kept[1]

    def keep(self, index: int, record: dict[str, Any]) -> None:
        """Makes `record` the row at hand: what is asked of it next needs no reading."""
        self._kept = index, record

    def rows(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of the split that begins at `start`, with their numbers."""
        name, _ = self._place(start)
        stop = start + self.lengths[name]
        index = start  # of the row that comes next
        try:
            for record in islice(self._sets[name], stop - start):
                yield index, record
                index += 1
        except (FgvczooError, GeneratorExit):
            raise
        except Exception as error:  # of the library, of the client of the Hub, of its transport, of Arrow
            raise FgvczooError(f"{self.name_of(index)}: the stream broke off ({one_line(error)})") from None
        if index < stop:
            raise FgvczooError(
                f"{self.name}: {self.theirs[name]} ended after {index - start} rows, {stop - start} were expected; "
                f"give lengths: {{{name}: {index - start}}}"
            )

    def label(self, index: int) -> int:
        return int(self._row_as_columns(index).labels(self.class_names)[0])

    def require(self, keys: Sequence[str]) -> None:
        """Rows are checked as they are read."""

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        notes = self._row_as_columns(index).annotations(0, keys)
        for key in ("parts", "attributes", "label_levels"):
            if key in notes and (shape := notes[key].shape) != self._shapes.setdefault(key, shape):
                raise FgvczooError(f"{self.name_of(index)}: {key} is {shape}, in other rows {self._shapes[key]}")
        if "mask" in keys:
            notes["mask"] = read_mask(self._encoded(index, "mask"), self.name_of(index))
        return notes

    def _row_as_columns(self, index: int) -> Columns:
        record = {name: [value] for name, value in self.record(index).items() if name not in _PICTURES}
        return Columns(pa.table(record), self.name, lambda _: self.name_of(index))

    def _count(self) -> dict[str, int]:
        counts = {}
        for name in self._given:
            if name not in self.theirs:
                raise FgvczooError(f"lengths: no split {name!r}, only {', '.join(self.theirs)}")
        for name, theirs in self.theirs.items():
            stated = self._sets[name].info.splits
            known = stated[theirs].num_examples if stated and theirs in stated else None
            number = self._given.get(name, known)
            if number is None:
                raise FgvczooError(
                    f"{self.name}: does not say how many rows {theirs} has; give lengths: {{{name}: NUMBER}}, or leave "
                    "out streaming"
                )
            if number < 1 or (known and number > known):
                raise FgvczooError(f"lengths: {number} rows of {name}; expected 1..{known or 'the number that it has'}")
            counts[name] = number
        return counts

    def _names_in_rows(self) -> list[str]:
        raise FgvczooError(
            f"{self.name}: the column {self._columns_of['label']!r} of a stream does not name its classes; give "
            "class_names, or leave out streaming"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_pass": iter(()), "_at": -1}  # another process begins its own pass


class StreamRows(Rows):
    """The samples of a split of a stream, asked for in ascending order of their places; others mean a new pass.

    Every process reads the whole stream and decodes its own samples only, so batches do not depend on how many there
    are. Between several workers of one loader `datasets` itself would share out its files: there may be one.

    given: as of `Rows`.
    buffer_size: rows among which the next one is drawn, from (seed, epoch); 0 leaves them in order.
    order_seed: of that order.
    """

    shuffles = True

    def __init__(self, *given: Any, buffer_size: int, order_seed: int) -> None:
        super().__init__(*given)
        self.buffer_size, self.order_seed = buffer_size, order_seed
        self._pass: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._state = _NO_PASS
        self._current: tuple[int, dict[str, Any]] | None = None

    def index(self, epoch: int, place: int) -> int:
        at_epoch, at, process = self._state
        if (epoch, os.getpid()) != (at_epoch, process) or place < at or at < 0:
            self._pass, at = self._order(epoch), -1
        self._state = _NO_PASS  # until the place is reached: a pass that breaks off is not gone on with
        while at < place:
            self._current, at = next(self._pass), at + 1
        self._state = epoch, at, os.getpid()
        assert self._current is not None
        self.reader.keep(*self._current)  # type: ignore[attr-defined]
        return self._current[0]

    def _order(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of an epoch. `datasets` shuffles too, but files and rows together: no row knows its number then."""
        rows = self.reader.rows(int(self.rows[0]))  # type: ignore[attr-defined]
        generator = np.random.default_rng((self.order_seed, epoch, 2))
        buffer: list[tuple[int, dict[str, Any]]] = []
        for row in rows:
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                if len(buffer) == self.buffer_size < len(self):
                    self._warn_if_sorted(buffer)
            elif buffer:
                place = int(generator.integers(len(buffer)))
                yield buffer[place]
                buffer[place] = row
            else:
                yield row
        for place in generator.permutation(len(buffer)):
            yield buffer[place]

    def _warn_if_sorted(self, buffer: Sequence[tuple[int, dict[str, Any]]]) -> None:
        classes = len(self.reader.class_names)
        found = len({record["label"] for _, record in buffer})
        if found < min(classes, len(buffer)) / 2:
            warnings.warn(
                f"{self.reader.name}: the first {len(buffer)} rows hold {found} of {classes} classes: the stream seems "
                "sorted by class; shuffle the data set itself, raise buffer_size, or leave out streaming",
                FgvczooWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pass": iter(()), "_state": _NO_PASS, "_current": None}


class HubDataModule(FGVCDataModule):
    """A data set of the Hub, or a local folder of one, downloaded whole or read as a stream.

    repo, root, config, revision, columns, splits, class_names: see `Hub`. options: see `FGVCDataModule`. Keys: those
    that `columns` names.

    test_fraction: share of the pictures of every class that becomes "test" where the set has none; see `Folder`. Not of
        a stream, which then has no "test".
    streaming: rows are read as they are needed, in at most one loading process, and nothing is kept. An epoch's order
        comes from (seed, epoch) and a buffer of `buffer_size` rows; to begin an epoch in its middle its first rows are
        read again, but not decoded. `lengths` (our names of splits -> numbers) says how many rows a split has where the
        data set does not.
    """

    reader: Hub

    def __init__(
        self,
        repo: str | None = None,
        root: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        splits: dict[str, str] | None = None,
        class_names: list[str] | None = None,
        test_fraction: float = 0.2,
        streaming: bool = False,
        buffer_size: int = 1000,
        lengths: dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise FgvczooError(f"test_fraction={test_fraction}; expected a number in [0, 1)")
        if buffer_size < 1:
            raise FgvczooError(f"buffer_size={buffer_size}; expected at least 1")
        if streaming:
            if options.get("num_workers", 0) > 1:
                workers = options["num_workers"]
                raise FgvczooError(
                    f"num_workers={workers}; a stream has one reader: give 1, or 0 to read in the main process"
                )
            if options.get("class_balanced") or options.get("repeats", 1) > 1:
                raise FgvczooError("class_balanced, repeats: a stream cannot be asked for a row; leave out streaming")
            if options.get("images_per_class"):
                raise FgvczooError(
                    "images_per_class: a stream cannot be asked for images of a class; leave out streaming"
                )
            if options.get("val_fraction"):
                raise FgvczooError("val_fraction: nothing can be cut from a stream; name a split as val in splits")
        elif lengths:
            raise FgvczooError("lengths: of use to a stream only; give streaming, or leave it out")
        place = {
            "config": config, "revision": revision, "columns": columns, "splits": splits, "class_names": class_names,
        }  # fmt: skip
        self.buffer_size = buffer_size
        reader: Hub = (
            HubStream(repo, root, lengths=lengths, **place)
            if streaming
            else HubTable(repo, root, test_fraction=test_fraction, **place)
        )
        super().__init__(reader, **options)

    def _rows(self, rows: np.ndarray, seed: int | None, *, shuffle: bool) -> Rows:
        if not self.reader.is_stream:
            return super()._rows(rows, seed, shuffle=shuffle)
        given = self.reader, rows, self.transform, self.keys, self.on_corrupt, seed
        return StreamRows(*given, buffer_size=self.buffer_size if shuffle else 0, order_seed=self.seed)


def _is_like(feature: Any, name: str) -> bool:
    """Whether a column can be what we call `name`: pictures, or a label with names."""
    if name in _PICTURES:
        return (
            isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and "bytes" in feature)
            or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        )
    return name == "label" and isinstance(feature, datasets.ClassLabel)


@contextmanager
def _unlogged() -> Iterator[None]:
    """What `datasets` logs before it raises would stand above the one line that says it."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception, config: str | None, revision: str | None) -> str:
    """Why a data set cannot be opened, and what to do, on one line."""
    text = one_line(error)
    if match := re.search(r"BuilderConfig .* not found\. Available: (\[.*\])", str(error), re.DOTALL):
        there = ast.literal_eval(match[1])
        return f"no config {config!r}; it has {', '.join(there[:20])}{did_you_mean(str(config), there)}"
    if match := re.search(r"Config name is missing.*?(\[.*?\])", str(error), re.DOTALL):
        return f"config is not given; it has {', '.join(ast.literal_eval(match[1])[:20])}"
    if "is a gated dataset" in text:
        return "gated on the Hub; accept its terms on its page there, and log in with `hf auth login`"
    if text.startswith("Revision"):
        return f"no revision {revision!r}; give a branch, a tag or a commit of it"
    if isinstance(error, (DatasetNotFoundError, RepositoryNotFoundError)):
        return "not on the Hub, or private; check the name, or log in with `hf auth login`"
    if "scripts are no longer supported" in text:
        return "read by a script of its own, which is not run; ask for Parquet, as in revision: refs/convert/parquet"
    if isinstance(error, (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return f"the Hub cannot be reached, and there is no copy in the cache ({text})"
    if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
        return "no data files in it; expected Parquet, Arrow, tar or picture files"
    cause = f": {one_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
    return f"cannot be read ({type(error).__name__}: {text}{cause})"
