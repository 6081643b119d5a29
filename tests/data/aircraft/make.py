"""A tiny copy of FGVC-Aircraft in its official layout and file formats, with the traps of the real one.

The traps: class names with blanks and slashes, in another order than the alphabet's; three lists for each part; boxes
    that count from 1 and inclusively; a banner of 20 rows at the bottom.
"""

from __future__ import annotations

from pathlib import Path

from tests.data.pictures import save_picture, write_lines

# variant -> family, manufacturer; in the order of variants.txt.
VARIANTS = {
    "F-16A/B": ("F-16", "Lockheed Corporation"), "F/A-18": ("F/A-18", "McDonnell Douglas"),
    "707-320": ("Boeing 707", "Boeing"), "An-12": ("An-12", "Antonov"),
}  # fmt: skip
FAMILIES, MANUFACTURERS = ("An-12", "Boeing 707", "F-16", "F/A-18"), (
    "Antonov", "Boeing", "Lockheed Corporation", "McDonnell Douglas",
)  # fmt: skip
BANNER = 20


def make_aircraft(root: Path, *, train: int = 2, val: int = 2, test: int = 2) -> dict[str, tuple[str, str]]:
    """Writes the copy; image id -> part, variant. train, val, test: images of a variant."""
    data = root / "fgvc-aircraft-2013b" / "data"
    images: dict[str, tuple[str, str]] = {}
    for part, count in (("train", train), ("val", val), ("test", test)):
        for place in range(count):
            for variant in reversed(VARIANTS):
                image = f"{1_025_794 - 37 * len(images):07d}"
                images[image] = (part, variant)
                save_picture(data / "images" / f"{image}.jpg", len(images), size=(50 + place, 60))
    for name, file, listed in (
        ("variant", "variants", VARIANTS), ("family", "families", FAMILIES), ("manufacturer", "manufacturers",
        MANUFACTURERS),
    ):  # fmt: skip
        write_lines(data / f"{file}.txt", list(listed))
        for part in ("train", "val", "trainval", "test"):
            of_part = {image: variant for image, (own, variant) in images.items() if own in part}
            names = {
                "variant": lambda v: v,
                "family": lambda v: VARIANTS[v][0],
                "manufacturer": lambda v: VARIANTS[v][1],
            }
            write_lines(
                data / f"images_{name}_{part}.txt", [f"{image} {names[name](v)}" for image, v in of_part.items()]
            )
    for part in ("train", "val", "trainval", "test"):
        write_lines(data / f"images_{part}.txt", [image for image, (own, _) in images.items() if own in part])
    write_lines(data / "images_box.txt", [f"{image} 1 1 {20 + row} 25" for row, image in enumerate(images)])
    return images
