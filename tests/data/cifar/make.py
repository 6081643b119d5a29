"""Tiny copies of CIFAR-10 and CIFAR-100 in their official layout, pickled as Python 2 did.

The traps: pickles, of which nothing may be executed; bytes as texts of Python 2; rows of 1,024 reds, greens, blues; two
lists of labels.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("airplane", "automobile", "bird")
FINE, COARSE = ("apple", "fish", "baby", "bear"), ("food", "animals")


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2 wrote it: texts are byte strings, an array is numpy's call and its state."""

    def text(value: str) -> bytes:
        raw = value.encode("latin-1")
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw

    def write(value: Any) -> bytes:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(write(key) + write(item) for key, item in value.items()) + b"u"
        assert isinstance(value, np.ndarray)
        dtype = b"cnumpy\ndtype\n(" + text("u1") + write(0) + write(1) + b"tR(" + write(3) + text("|") + b"NNN"
        dtype += write(-1) + write(-1) + write(0) + b"tb"
        shape = b"(" + b"".join(write(side) for side in value.shape) + b"t"
        raw = value.tobytes().decode("latin-1")
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + write(0) + b"t" + text("b") + b"tR"
        return empty + b"(" + write(1) + shape + dtype + b"\x89" + text(raw) + b"tb"

    return b"\x80\x02" + write(value) + b"."


def _batch(rng: np.random.Generator, name: str, labels: list[int], key: str) -> dict[str, Any]:
    data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    names = [f"{name}_s_{place:06d}.png" for place in range(len(labels))]
    return {"batch_label": name, key: labels, "data": data, "filenames": names}


def make_cifar10(root: Path, *, per_batch: int = 3) -> dict[str, dict[str, Any]]:
    """Writes the copy; file -> what is in it. per_batch: images of a class in each of six files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    batches = {
        name: _batch(rng, name, [place % len(NAMES) for place in range(per_batch * len(NAMES))], "labels")
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    }
    for name, batch in batches.items():
        (folder / name).write_bytes(python2_pickle(batch))
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": list(NAMES), "num_vis": 3072}))
    return batches


def make_cifar100(root: Path, *, train: int = 4, test: int = 2) -> dict[str, dict[str, Any]]:
    """Writes the copy; file -> what is in it. train, test: images of a fine class."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    batches = {}
    for name, count in (("train", train), ("test", test)):
        fine = [place % len(FINE) for place in range(count * len(FINE))]
        batches[name] = _batch(rng, name, fine, "fine_labels") | {"coarse_labels": [label % 2 for label in fine]}
        (folder / name).write_bytes(python2_pickle(batches[name]))
    names = {"fine_label_names": list(FINE), "coarse_label_names": list(COARSE)}
    (folder / "meta").write_bytes(python2_pickle(names))
    return batches
