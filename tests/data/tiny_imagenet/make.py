"""A tiny copy of Tiny-ImageNet in its official layout and file formats, with the traps of the real one.

The traps: wnids.txt is in another order than the labels; words.txt names other classes, too, and has equal first names;
    a flat folder of validation images; a grey picture; test images without labels.
"""

from __future__ import annotations

from pathlib import Path

from tests.data.pictures import save_picture, write_lines

WORDS = {"n03126707": "crane", "n01440764": "tench, Tinca tinca", "n02012849": "crane, bird"}


def make_tiny_imagenet(root: Path, *, train: int = 4, test: int = 2) -> None:
    """Writes the copy. train, test: images of a class."""
    base = root / "tiny-imagenet-200"
    write_lines(base / "wnids.txt", list(WORDS))
    write_lines(base / "words.txt", ["n00001740\tentity", *(f"{wnid}\t{words}" for wnid, words in WORDS.items())])
    lines = []
    for label, wnid in enumerate(WORDS):
        names = [f"{wnid}_{number}.JPEG" for number in range(train)]
        for number, name in enumerate(names):
            mode = "L" if number == label == 1 else "RGB"
            save_picture(base / f"train/{wnid}/images/{name}", 10 * label + number, size=(64, 64), mode=mode)
        boxes = [f"{name}\t{number}\t1\t{number + 30}\t62" for number, name in enumerate(names)]
        write_lines(base / f"train/{wnid}/{wnid}_boxes.txt", boxes)
        for number in range(test):
            name = f"val_{len(lines)}.JPEG"
            save_picture(base / f"val/images/{name}", 100 + len(lines), size=(64, 64))
            lines.append(f"{name}\t{wnid}\t{number}\t2\t44\t63")
    write_lines(base / "val/val_annotations.txt", lines)
    save_picture(base / "test/images/test_0.JPEG", 0, size=(64, 64))
