"""Small pictures for the tiny copies of data sets: plain colours that tell them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_picture(path: Path, number: int, *, mode: str = "RGB", size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Writes picture `number` in the format that its mode needs, whatever the name says; its height and width.

    mode: RGB, L (grey), CMYK, or RGBA, which is a PNG. size: height, width; by default different from one to another.
    """
    height, width = size or (40 + 7 * number % 20, 40 + 11 * number % 24)
    colour = 37 * number % 256, 91 * number % 256, 153 * number % 256
    pixels = np.full((height, width, 3), colour, np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] ^= 255
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path, "PNG" if mode == "RGBA" or path.suffix == ".png" else "JPEG", quality=95)
    return height, width


def write_lines(path: Path, lines: list[str]) -> None:
    """A text file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


DAMAGES = ("truncated", "empty", "page", "noise")


def damage(picture: Path, kind: str) -> None:
    """Makes a picture file what failed downloads and copies leave: its first half; nothing; a saved HTML page; bytes of
    something else."""
    content = picture.read_bytes()
    noise = bytes(range(256)) * 2
    page = b"<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>\n"
    picture.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "page": page, "noise": noise}[kind])
