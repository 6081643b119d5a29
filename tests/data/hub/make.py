"""Tiny data sets as `datasets` writes them: Parquet files of a split or two, with pictures as bytes in the rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

NAMES = ("b owl", "étourneau", "-dash")
LABELS: dict[str, Any] = {
    "names": datasets.ClassLabel(names=list(NAMES)),
    "text": datasets.Value("string"),
    "numbers": datasets.Value("int32"),
}


def encoded(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A picture of noise, `size` width, height, as the bytes of a PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_parquet(
    root: Path,
    counts: Mapping[str, int],
    *,
    label: str = "names",
    image: str = "image",
    name: str = "label",
    files: int = 2,
    more: Mapping[str, tuple[Any, list[Any]]] | None = None,
    by_class: bool = False,
) -> Path:
    """Writes so many rows of each split to Parquet files.

    label: the kind of label, of `LABELS`. image, name: of the columns. more: other columns, name -> (type, values of
    the rows of every split, as many as the longest has). by_class: in the order of the classes.
    """
    root.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        labels = [row % len(NAMES) for row in range(count)]
        if by_class:
            labels.sort()
        columns = {
            image: [{"bytes": encoded(1000 * number + row), "path": None} for row in range(count)],
            name: [NAMES[own] for own in labels] if label == "text" else labels,
        }
        features = {image: datasets.Image(), name: LABELS[label]}
        for key, (feature, values) in (more or {}).items():
            columns[key], features[key] = values[:count], feature
        whole = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        number_of_files = min(files, count)
        for file in range(number_of_files):
            part = whole.shard(number_of_files, file, contiguous=True)
            part.to_parquet(root / f"{split}-{file:05d}-of-{number_of_files:05d}.parquet")
    return root
