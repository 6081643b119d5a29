"""What the readers of official layouts share: files that a list names, and the splits of the protocols."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import numpy as np

from fgvczoo.errors import FgvczooError

Protocol = Literal["standard", "metric-learning"]


def by_protocol(
    protocol: Protocol, all_class_names: list[str], labels: np.ndarray, is_train: np.ndarray
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes that are trained on, and the splits.

    "standard": the official split, "train" and "test".
    "metric-learning": all images of the first half of the classes are "train", all of the others "test", "query" and
        "gallery", whatever the official split says. The others keep their labels, which are those of no trained class.

    all_class_names: of all labels. labels, is_train: (N,) of the images.
    """
    if protocol not in get_args(Protocol):
        raise FgvczooError(f"protocol={protocol!r}; expected {' or '.join(map(repr, get_args(Protocol)))}")
    rows = np.arange(len(labels))
    if protocol == "standard":
        return all_class_names, {"train": rows[is_train], "test": rows[~is_train]}
    half = len(all_class_names) // 2
    return all_class_names[:half], disjoint_splits(labels < half)


def disjoint_splits(is_train: np.ndarray) -> dict[str, np.ndarray]:
    """Splits of retrieval, where no class of "train" is in the others: every test image is a query to all the rest."""
    train, test = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    return {"train": train, "test": test, "query": test, "gallery": test}


def check_listed(folder: Path, paths: Sequence[str], source: Path) -> None:
    """Refuses paths, relative to `folder` with "/", that lead out of it, and files that are not there.

    source: the list, as messages call it.
    """
    # One listing for each folder: thousands of single questions take long on network disks.
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path:
            raise FgvczooError(f"{source}: lists {path!r}, outside the images folder")
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
