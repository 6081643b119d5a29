"""A tiny copy of NUS-WIDE in its official layout and file formats, with the traps of the real one.

The traps: backslashes in the lists; several concepts a picture, or none; listed pictures that are gone; labels in a
    file for each concept, in the order of the list.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.pictures import save_picture, write_lines


def make_nus_wide(root: Path, *, images: int = 60, concepts: int = 23) -> tuple[list[str], np.ndarray, list[str]]:
    """Writes the copy; paths (with slashes), (N, C) labels, and names of concepts. Every tenth picture is gone."""
    rng = np.random.default_rng(0)
    names = [f"concept{number}" for number in range(concepts)]
    paths = [f"folder{row % 3}/{row:04d}_{row * 7}.jpg" for row in range(images)]
    labels = (rng.random((images, concepts)) < 0.15).astype(int)
    labels[0] = 0
    # The first and the fifth concept are the rarest.
    labels[:, [0, 4]] = 0
    labels[1:5] = 0
    labels[1:3, 0] = labels[3:5, 4] = 1
    for row, path in enumerate(paths):
        if row % 10 != 9:
            save_picture(root / "Flickr" / path, row)
    windows = [path.replace("/", "\\") for path in paths]
    write_lines(root / "ImageList/Imagelist.txt", windows)
    write_lines(root / "ImageList/TrainImagelist.txt", windows[: images * 6 // 10])
    write_lines(root / "ImageList/TestImagelist.txt", windows[images * 6 // 10 :])
    write_lines(root / "ConceptsList/Concepts81.txt", names)
    for number, name in enumerate(names):
        write_lines(root / f"Groundtruth/AllLabels/Labels_{name}.txt", [str(value) for value in labels[:, number]])
    return paths, labels, names
