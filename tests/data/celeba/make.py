"""A tiny copy of CelebA, aligned and cropped, in its official layout and file formats, with the traps of the real one.

The traps: counts and headers in some lists only; variable blanks; attributes of -1 and 1; boxes of other pictures;
    copies with commas.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.pictures import save_picture, write_lines

ATTRIBUTES = ("Bald", "Eyeglasses", "Smiling")
POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")


def make_celeba(root: Path, *, train: int = 10, val: int = 2, test: int = 4, csv: bool = False) -> np.ndarray:
    """Writes the copy; (N, 3) attributes, 0 or 1. csv: with commas and one header line."""
    rng = np.random.default_rng(0)
    total = train + val + test
    names = [f"{number + 1:06d}.jpg" for number in range(total)]
    for number, name in enumerate(names):
        save_picture(root / "img_align_celeba" / name, number, size=(54, 44))
    attributes = rng.integers(0, 2, (total, 3))
    attributes[:2] = [[0, 0, 0], [1, 1, 1]]
    points = rng.integers(1, 40, (total, 10))
    splits = [0] * train + [1] * val + [2] * test
    columns = [name for point in POINTS for name in (f"{point}_x", f"{point}_y")]

    def write(name: str, header: list[str], rows: list[list[object]], *, counted: bool) -> None:
        joiner = "," if csv else "  "
        lines = [joiner.join(map(str, [image, *row])) for image, row in zip(names, rows)]
        if csv:
            lines.insert(0, joiner.join(["image_id", *header]))
        elif counted:
            lines[:0] = [str(total), " ".join(header)]
        write_lines(root / f"{name}.{'csv' if csv else 'txt'}", lines)

    write("list_attr_celeba", list(ATTRIBUTES), (2 * attributes - 1).tolist(), counted=True)
    write("list_landmarks_align_celeba", columns, points.tolist(), counted=True)
    write("list_bbox_celeba", ["x_1", "y_1", "width", "height"], [[95, 71, 226, 313]] * total, counted=True)
    write("list_eval_partition", ["partition"], [[split] for split in splits], counted=False)
    write("identity_CelebA", ["identity"], [[number % 3 + 1] for number in range(total)], counted=False)
    return attributes
