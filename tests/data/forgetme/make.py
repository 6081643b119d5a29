"""A tiny copy of ForgetMe's pairs: pictures, the same without their object, masks of it.

The traps: two spellings of the folders; different endings of a pair; masks with values between; an object of few
    pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import write_lines

SUBSETS = {"bird": ("original", "edited"), "dog": ("orig", "bg")}


def make_forgetme(root: Path, *, pairs: int = 8, table: bool = False) -> None:
    """Writes the copy. pairs: of a subset. table: with pairs.csv."""
    lines = []
    for place, (subset, (original, edited)) in enumerate(SUBSETS.items()):
        for number in range(pairs):
            background = np.full((40 + number, 50, 3), (20 * number, 60 * place, 90), np.uint8)
            mask = np.zeros(background.shape[:2], np.uint8)
            mask[10:20, 10 : 12 + number] = 255
            mask[10, 10] = 127  # not of the object
            whole = background.copy()
            whole[mask >= 128] = 250
            files = (
                f"{subset}/{original}/{number}.bmp",
                f"{subset}/{edited}/{number}.png",
                f"{subset}/mask/{number}.png",
            )
            for file, pixels in zip(files, (whole, background, mask)):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / file)
            lines.append(f"{subset}{number},{','.join(files)},{'even' if number % 2 == 0 else 'odd'}")
    if table:
        write_lines(root / "pairs.csv", ["id,original,edited,mask,target_class", *lines])
