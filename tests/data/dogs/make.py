"""A tiny copy of Stanford Dogs in its official layout and file formats, with the traps of the real one.

The traps: MATLAB lists of cells; names with dashes; annotations without an ending, several dogs a picture; a PNG with
    alpha that is called .jpg.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from tests.data.pictures import save_picture

BREEDS = ("n02085620-Chihuahua", "n02096051-Airedale", "n02099267-flat-coated_retriever")


def make_dogs(root: Path, *, train: int = 4, test: int = 3) -> dict[str, list[tuple[str, int]]]:
    """Writes the copy; split -> paths and labels, in the order of the lists. train, test: pictures of a breed."""
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, breed in enumerate(BREEDS):
        for number in range(train + test):
            stem = f"{breed}/{breed.partition('-')[0]}_{1000 - number}"
            picture = root / "Images" / f"{stem}.jpg"
            save_picture(picture, 10 * label + number, mode="RGBA" if (label, number) == (1, 0) else "RGB")
            lists["train" if number < train else "test"].append((f"{stem}.jpg", label))
            note = root / "Annotation" / stem
            note.parent.mkdir(parents=True, exist_ok=True)
            box = "<xmin>{}</xmin><ymin>3</ymin><xmax>{}</xmax><ymax>22</ymax>"
            objects = "".join(
                f"<object><name>dog</name><bndbox>{box.format(2 + k, 20 + k)}</bndbox></object>"
                for k in range(1 + number % 2)
            )
            note.write_text(f"<annotation>{objects}</annotation>")
    for name, listed in {**lists, "file": lists["train"] + lists["test"]}.items():
        cells = np.empty((len(listed), 1), object)
        notes = np.empty((len(listed), 1), object)
        for row, (path, _) in enumerate(listed):
            cells[row, 0], notes[row, 0] = path, path.removesuffix(".jpg")
        labels = np.array([[label + 1] for _, label in listed], np.uint8)
        name = "file_list" if name == "file" else f"{name}_list"
        scipy.io.savemat(root / f"{name}.mat", {"file_list": cells, "annotation_list": notes, "labels": labels})
    return lists
