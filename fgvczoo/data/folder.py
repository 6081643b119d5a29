"""A user's own pictures: a folder for each class, or a table of pictures with a column for each annotation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fgvczoo.data.base import TEXT, UNPRINTABLE, FGVCDataModule, Reader, check_class_names, stratified
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.preprocess import read_mask

if TYPE_CHECKING:
    from fgvczoo.data.columns import Columns

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
TABLES = ("metadata.csv", "metadata.parquet")
# What folders and the column `split` may call the splits, in the order that rows of folders have.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EXPECTED = "expected a folder for each class, or train/ and perhaps val/, test/ that hold them, or a metadata.csv"


class Folder(Reader):
    """The pictures of a folder, in one of two layouts. Opens no picture when made.

    Folders: `ROOT/CLASS/...`, or `ROOT/train/CLASS/...` with `val` (`valid`, `validation`) and `test` beside it. All
    that is below a class folder and ends as a picture (`SUFFIXES`) belongs to it; hidden files and folders do not.
    Classes are in the order of the code points of their names, rows in the order of split, class and path.

    Table: `ROOT/metadata.csv` or `ROOT/metadata.parquet` with the columns `path` (or `file_name`), `label` and those
    that docs/data/folder.md lists. Rows are in the order of the table; pictures that it does not list are left out.

    No picture outside of `root` is read: neither by a path nor by a link.

    table: another file, absolute or relative to `root`; .csv or .parquet.
    crop_to_bbox: use the box of each picture as the picture, rounded to whole pixels as Pillow's `crop`.
    test_fraction: share of the pictures of every class that becomes "test" where none is given; the choice is fixed. 0:
        there is no "test". A class with one picture keeps it in "train".
    name: of the data set; by default that of the folder.
    licence_allows_pictures: explanations that show its pictures may be passed on.

    Attributes beside those of `Reader`:
        image_ids: (N,) paths relative to `root`, with "/".
        table: the table that was read, or None.
        unread: its columns that mean nothing here.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        table: str | Path | None = None,
        crop_to_bbox: bool = False,
        test_fraction: float = 0.2,
        name: str | None = None,
        licence_allows_pictures: bool = False,
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise FgvczooError(f"test_fraction={test_fraction}; expected a number in [0, 1)")
        if root is None:
            raise FgvczooError(f"root is not given; {_EXPECTED}")
        self.root = Path(root)
        if self.root.is_file():
            raise FgvczooError(f"{root}: a file; unpack it if it is an archive; {_EXPECTED}")
        if not self.root.is_dir():
            raise FgvczooError(f"{root}: no such folder; {_EXPECTED}")
        self._real = os.path.realpath(root)
        self.name = plain_name(Path(self._real).name) if name is None else name
        if self.name != plain_name(self.name):
            raise FgvczooError(f"name={name!r}; expected letters, digits, and any of _ - .")
        self.licence_allows_pictures = licence_allows_pictures
        self.cropped = crop_to_bbox
        self.table = self._find_table(table)
        self.unread: list[str] = []
        self._columns: Columns | None = None
        self._mask_paths: np.ndarray | None = None
        if self.table is None:
            self._read_folders()
        else:
            self._read_table(self.table)
        if "test" not in self.splits and test_fraction:
            self.splits["train"], self.splits["test"] = stratified(
                self.splits["train"], self.labels, test_fraction, "test"
            )
        if crop_to_bbox:
            if "bbox" not in self.keys:
                raise FgvczooError(f"crop_to_bbox: {self.table or self.root} has no column bbox, nor bbox_x0 and so on")
            self.require(["bbox"])

    def picture(self, index: int) -> Path:
        return self.root / str(self.image_ids[index])

    def require(self, keys: Sequence[str]) -> None:
        if self._columns is not None:
            self._columns.require(keys)
            if "mask" in keys and self._mask_paths is None:
                self._mask_paths = self._present(self._columns.paths("mask"))

    def annotations(self, index: int, keys: Sequence[str]) -> dict[str, Any]:
        if self._columns is None:
            return {}
        notes = self._columns.annotations(index, keys)
        if "mask" in keys:
            self.require(["mask"])
            assert self._mask_paths is not None
            notes["mask"] = read_mask(self.root / str(self._mask_paths[index]))
        return notes

    def box(self, index: int) -> np.ndarray | None:
        return self._columns.bbox[index] if self._columns is not None and self._columns.bbox is not None else None

    def others(self) -> list[str]:
        """Files below the root that are not read, hidden ones aside, sorted."""
        read = {*self.image_ids.tolist(), *(self._mask_paths.tolist() if self._mask_paths is not None else ())}
        files = (path for path in self.root.rglob("*") if path.is_file() and path != self.table)
        names = (path.relative_to(self.root) for path in files)
        return sorted(
            name.as_posix()
            for name in names
            if name.as_posix() not in read and not any(part.startswith(".") for part in name.parts)
        )

    # -- folders ----------------------------------------------------------------------------------------------------

    def _read_folders(self) -> None:
        self.keys = ()
        top = self._subfolders("")
        folders = {name: SPLITS[name.casefold()] for name in top if name.casefold() in SPLITS}
        if "train" not in folders.values():
            if top and len(folders) == len(top):
                raise FgvczooError(f"{self.root}: {', '.join(top)} without train; {_EXPECTED}")
            folders = {"": "train"}
        elif others := [name for name in top if name not in folders]:
            raise FgvczooError(
                f"{self.root}: holds train and also {_some(others)}; move classes into train/, or rename train if it "
                "is a class"
            )
        if len(set(folders.values())) < len(folders):
            raise FgvczooError(f"{self.root}: {', '.join(sorted(folders))} are two names of one split; leave one")
        # split -> class -> pictures
        tree = {
            split: {name: self._pictures(_join(folder, name)) for name in self._subfolders(folder)}
            for folder, split in sorted(folders.items(), key=lambda item: list(SPLITS).index(item[1]))
        }
        empty = [
            _join(folder, name)
            for folder, split in folders.items()
            for name, pictures in tree[split].items()
            if not pictures
        ]
        if empty:
            raise FgvczooError(
                f"{self.root}: {len(empty)} class folders without a picture ({', '.join(SUFFIXES)}): {_some(empty)}"
            )
        self.class_names = sorted(tree["train"])
        if not self.class_names:
            where = self.root / next(folder for folder, split in folders.items() if split == "train")
            loose = sum(entry.name.lower().endswith(SUFFIXES) for entry in where.iterdir())
            lie = f"{loose} pictures lie in no class folder" if loose else "no class folder"
            raise FgvczooError(f"{where}: {lie}; {_EXPECTED}")
        check_class_names(sorted({name for classes in tree.values() for name in classes}), str(self.root))
        number = {name: label for label, name in enumerate(self.class_names)}
        ids: list[str] = []
        labels: list[int] = []
        self.splits = {}
        for split, classes in tree.items():
            start = len(ids)
            for name in sorted(classes):
                if name not in number:
                    hint = did_you_mean(name, self.class_names)
                    raise FgvczooError(f"{self.root}: {split} has the class {name!r}, which train has not{hint}")
                ids += classes[name]
                labels += [number[name]] * len(classes[name])
            self.splits[split] = np.arange(start, len(ids))
        self.image_ids, self.labels = np.array(ids, TEXT), np.array(labels, np.int64)

    def _subfolders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        folders = [entry for entry in self._entries(folder) if entry.is_dir()]
        for entry in folders:
            self._check_link(entry)
        return sorted(entry.name for entry in folders)

    def _pictures(self, folder: str) -> list[str]:
        """The pictures below a folder, as paths from the root, sorted."""
        found: list[str] = []
        open_folders = [folder]
        while open_folders:
            here = open_folders.pop()
            for entry in self._entries(here):
                if entry.is_dir():
                    self._check_link(entry)
                    open_folders.append(_join(here, entry.name))
                elif entry.name.lower().endswith(SUFFIXES):
                    self._check_link(entry)
                    if entry.is_file():
                        found.append(_join(here, entry.name))
        return sorted(found)

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """What lies in a folder and is not hidden."""
        for entry in self._scan(folder):
            if entry.name.startswith("."):
                continue
            if UNPRINTABLE.search(entry.name):
                raise FgvczooError(f"{self.root / folder}: the name {entry.name!a} cannot be printed; rename it")
            yield entry

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                return list(entries)
        except OSError as error:
            raise FgvczooError(f"{self.root / folder}: cannot be read ({error.strerror or error})") from None

    def _check_link(self, entry: os.DirEntry[str]) -> None:
        """Refuses a link that leads to anything but a file below the root."""
        if not entry.is_symlink():
            return
        if entry.is_dir():
            raise FgvczooError(f"{entry.path}: a link to a folder is not followed; move or copy the folder here")
        if not entry.is_file():
            raise FgvczooError(f"{entry.path}: a link that leads nowhere; remove it")
        if not self._is_inside(entry.path):
            raise FgvczooError(f"{entry.path}: a link that leads out of {self.root}; copy the file here")

    def _is_inside(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._real)

    # -- table ------------------------------------------------------------------------------------------------------

    def _find_table(self, given: str | Path | None) -> Path | None:
        if given is not None:
            file = self.root / given  # an absolute one stays as it is
            if file.suffix not in (".csv", ".parquet"):
                raise FgvczooError(f"table={given}: expected a name ending in .csv or .parquet")
            if not file.is_file():
                raise FgvczooError(f"{file}: no such file; give table as a path, absolute or from {self.root}")
            return file
        found = [self.root / name for name in TABLES if (self.root / name).is_file()]
        if len(found) > 1:
            raise FgvczooError(f"{self.root}: holds {' and '.join(TABLES)}; say which with table")
        return found[0] if found else None

    def _read_table(self, file: Path) -> None:
        from fgvczoo.data.columns import read_table

        columns = self._columns = read_table(file)
        self.unread = columns.unread
        self.image_ids = self._present(columns.paths("path", once=True))
        self.splits = columns.splits(SPLITS)
        if "train" not in self.splits:
            raise FgvczooError(f"{file}: no row of train; expected pictures to learn from")
        self.class_names = columns.class_names(self.splits["train"])
        self.labels = columns.labels(self.class_names)
        self.keys = (*columns.keys, *(("mask",) if columns.has("mask") else ()))
        columns.table = columns.table.drop_columns(["path", "label"])  # now in arrays

    def _present(self, paths: np.ndarray) -> np.ndarray:
        """The same paths; `FgvczooError` where files are missing, or a link on the way leads out of the root."""
        # One listing for each folder: a million single questions take long, on network disks for ever.
        folders: dict[str, dict[str, os.DirEntry[str] | None]] = {}
        missing = []
        for path in paths.tolist():
            folder, _, name = path.rpartition("/")
            if folder not in folders:
                folders[folder] = self._listing(folder)
            if name not in folders[folder]:
                missing.append(path)
            elif (link := folders[folder][name]) is not None:
                self._check_link(link)
        if missing:
            raise FgvczooError(
                f"{self.root}: {len(missing)} of {len(paths)} files of {self.table} are missing: {_some(missing)}"
            )
        return paths

    def _listing(self, folder: str) -> dict[str, os.DirEntry[str] | None]:
        """The files in a folder by name, with those that are links; none where there is no such folder."""
        path = self.root / folder
        if not path.is_dir():
            return {}
        if not self._is_inside(str(path)):
            raise FgvczooError(f"{path}: a link that leads out of {self.root}; copy the folder here")
        entries = self._scan(folder)
        return {entry.name: entry if entry.is_symlink() else None for entry in entries if not entry.is_dir()}


class FolderDataModule(FGVCDataModule):
    """A user's own pictures: a folder for each class, or a table with their paths, labels and annotations.

    root: the folder. table, crop_to_bbox, test_fraction, name, licence_allows_pictures: see `Folder`. options: see
    `FGVCDataModule`. Keys: those that the table has columns for; see docs/data/folder.md. A folder without a table has
    none.
    """

    def __init__(
        self,
        root: str | None = None,
        table: str | None = None,
        crop_to_bbox: bool = False,
        test_fraction: float = 0.2,
        name: str | None = None,
        licence_allows_pictures: bool = False,
        **options: Any,
    ) -> None:
        reader = Folder(
            root,
            table=table,
            crop_to_bbox=crop_to_bbox,
            test_fraction=test_fraction,
            name=name,
            licence_allows_pictures=licence_allows_pictures,
        )
        super().__init__(reader, **options)


def plain_name(name: str) -> str:
    """A name of letters, digits, "_", "-" and "." for any text."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "folder"


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
