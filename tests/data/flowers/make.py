"""A tiny copy of Oxford Flowers 102 in its official layout and file formats, with the traps of the real one.

The traps: labels and image ids from 1; parts in one file; more images for testing than for training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from tests.data.pictures import save_picture

PARTS = {"trnid": 2, "valid": 2, "tstid": 4}  # images of a class


def make_flowers(root: Path, *, classes: int = 3) -> dict[str, list[tuple[int, int]]]:
    """Writes the copy; variable -> image ids and labels (from 0)."""
    rng = np.random.default_rng(0)
    total = classes * sum(PARTS.values())
    ids = iter((rng.permutation(total) + 1).tolist())
    parts = {
        name: [(next(ids), label) for label in range(classes) for _ in range(count)] for name, count in PARTS.items()
    }
    labels = np.zeros((1, total), np.uint8)
    for listed in parts.values():
        for number, label in listed:
            labels[0, number - 1] = label + 1
            save_picture(root / "jpg" / f"image_{number:05d}.jpg", number)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    sets = {name: np.array([[number for number, _ in listed]], np.uint16) for name, listed in parts.items()}
    scipy.io.savemat(root / "setid.mat", sets, do_compression=True)
    return parts
