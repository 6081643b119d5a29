"""A tiny copy of GTOS-mobile in its official layout, with the traps of the real one.

The traps: one class name with a capital letter; frames of sequences, nearly equal to each other; other endings; a class
    with one sequence.
"""

from __future__ import annotations

from pathlib import Path

from tests.data.pictures import save_picture

CLASSES = ("Painting", "aluminum", "sandPaper")


def make_gtos(root: Path, *, sequences: int = 3, frames: int = 2, test: int = 2) -> None:
    """Writes the copy. sequences, of `frames` each, of a class but the last, which has one; test: images of a class."""
    for label, name in enumerate(CLASSES):
        for number in range(sequences * frames):
            sequence, frame = (0, number) if label == 2 else divmod(number, frames)
            save_picture(root / f"train/{name}/{name}_{sequence:02d}_{frame:04d}.jpg", 10 * label + number)
        for number in range(test):
            save_picture(root / f"test/{name}/IMG_{number}.JPG", 100 + 10 * label + number)
