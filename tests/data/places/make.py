"""A tiny copy of Places365-Standard in its official layout and file formats, with the traps of the real one.

The traps: class names with the folder of their letter, and with two levels; paths that begin with a slash; equal names
    of files in the folders; a flat folder of validation images; a grey picture.
"""

from __future__ import annotations

from pathlib import Path

from tests.data.pictures import save_picture, write_lines

CLASSES = ("/a/airfield", "/b/basketball_court/indoor", "/b/basketball_court/outdoor")


def make_places(root: Path, *, train: int = 4, test: int = 2, folder: str = "data_256_standard") -> None:
    """Writes the copy. train, test: images of a class."""
    write_lines(root / "categories_places365.txt", [f"{name} {label}" for label, name in enumerate(CLASSES)])
    lines: dict[str, list[str]] = {"train_standard": [], "val": []}
    for label, name in enumerate(CLASSES):
        for number in range(train):
            path = f"{name}/{number + 1:08d}.jpg"
            save_picture(root / folder / path[1:], 10 * label + number, mode="L" if number == label == 1 else "RGB")
            lines["train_standard"].append(f"{path} {label}")
        for number in range(test):
            path = f"Places365_val_{2 * label + number + 1:08d}.jpg"
            save_picture(root / "val_256" / path, 100 + 10 * label + number)
            lines["val"].append(f"{path} {label}")
    for name, listed in lines.items():
        write_lines(root / f"places365_{name}.txt", listed)
