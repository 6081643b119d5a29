"""A tiny copy of VGGFace2 in its official layout and file formats, with the traps of the real one.

The traps: other identities for testing than for training; names with commas inside of quotes, and blanks after the
    commas between cells; equal names of files; boxes of x, y, width, height by name without ending.
"""

from __future__ import annotations

from pathlib import Path

from tests.data.pictures import save_picture, write_lines

NAMES = {"n000002": "A. J. Buckley", "n000003": "Sammy Davis, Jr.", "n000001": "14th Dalai Lama", "n000009": "Óscar"}
SPLITS = {"train": ("n000002", "n000003"), "test": ("n000001", "n000009")}


def make_vggface2(root: Path, *, images: int = 5, lists: bool = True) -> None:
    """Writes the copy. images: of an identity. lists: write train_list.txt and test_list.txt."""
    meta = ["Class_ID, Name, Sample_Num, Flag, Gender"]
    for split, people in SPLITS.items():
        paths = [f"{person}/{number + 1:04d}_01.jpg" for person in people for number in range(images)]
        for number, path in enumerate(paths):
            save_picture(root / split / path, number)
        if lists:
            write_lines(root / f"{split}_list.txt", paths)
        boxes = [f'"{path.removesuffix(".jpg")}",{number},2,20,25' for number, path in enumerate(paths)]
        write_lines(root / f"bb_landmark/loose_bb_{split}.csv", ["NAME_ID,X,Y,W,H", *boxes])
        meta += [f'{person}, "{NAMES[person]}", {images}, {int(split == "train")}, m' for person in people]
    write_lines(root / "meta/identity_meta.csv", meta)
