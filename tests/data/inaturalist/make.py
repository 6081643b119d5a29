"""Tiny copies of iNaturalist 2017, 2018 and 2021 in their official layouts, with the traps of the real ones.

The traps: categories in another order than their ids and than the folders; images and annotations in different orders;
place and date in files of their own (2017, 2018) or in the list (2021); null values, latitude and longitude 0.0; dates
without hour, with hour, with time zone; names that are numbers (2018) with the real ones in categories.json; file names
relative to the root; licences with letters beyond ASCII; classes of different sizes; a grey picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.pictures import save_picture, write_lines

# In the order of the list, which is that of the labels: id, name, supercategory, genus.
CATEGORIES = (
    (30, "Turdus merula", "Birds", "Turdus"),
    (4, "Bombus terrestris", "Insects", "Bombus"),
    (17, "Turdus philomelos", "Birds", "Turdus"),
    (9, "Quercus robur", "Plants", "Quercus"),
)
# Place of the image in its list -> latitude, longitude, month, hour; None where null.
SIGHTINGS = (
    (0.0, 0.0, 3, 0),
    (None, None, 12, 23),
    (-33.5, 151.25, None, None),
    (45.0, -180.0, 7, 14),
)


@dataclass(frozen=True)
class Sighting:
    """What is written of one image."""

    image_id: int
    label: int
    split: str
    file_name: str
    seen: tuple[Any, Any, Any, Any]


def make_inaturalist(
    root: Path, version: str = "2021", *, train: int = 4, val: int = 2, locations: bool = True, lists: bool = True
) -> list[Sighting]:
    """Writes the copy and returns what is in it, in the order of the lists. train, val: images of a class, at most.

    2021 has train.json, train_mini.json (two a class) and val.json. locations: write the files of place and date, in
    2017 and 2018. lists: write those of metric learning, in 2018.
    """
    rng = np.random.default_rng(int(version))
    sightings: list[Sighting] = []
    for split, most in (("train", train), ("val", val)):
        first = len(sightings)
        for number in range(len(CATEGORIES) * most):
            label, place = number % len(CATEGORIES), number // len(CATEGORIES)
            if split == "train" and place > 1 and label == 3:
                continue  # a rare class
            category, name, group, _ = CATEGORIES[label]
            file = f"{rng.bytes(8).hex()}.jpg"
            folder = {
                "2017": f"train_val_images/{group}/{name}",
                "2018": f"train_val2018/{group}/{category}",
                "2021": f"{split}/{category:05d}_Animalia_{name.replace(' ', '_')}",
            }[version]
            # Ids are not in the order of the list.
            image_id = 100_000 - 7 * number if split == "train" else 200_000 + number
            seen = SIGHTINGS[(len(sightings) - first) % len(SIGHTINGS)]
            if version == "2017":
                seen = (*seen[:3], None)
            sightings.append(Sighting(image_id, label, split, f"{folder}/{file}", seen))
            save_picture(root / folder / file, len(sightings), mode="L" if len(sightings) == 2 else "RGB")
        own = sightings[first:]
        _write(root, version, split, own, rng, locations)
        if version == "2021" and split == "train":
            mini = [
                Sighting(s.image_id, s.label, s.split, s.file_name.replace("train/", "train_mini/"), s.seen)
                for s in own
                if sum(t.label == s.label for t in own[: own.index(s)]) < 2
            ]
            for number, sighting in enumerate(mini):
                save_picture(root / sighting.file_name, number)
            _write(root, version, "train_mini", mini, rng, locations)
    if version == "2018":
        real = [{"id": number, "name": name, "genus": genus} for number, name, _, genus in CATEGORIES]
        (root / "categories.json").write_text(json.dumps(real[::-1]))
        if lists:
            for split, classes in (("train", (1, 3)), ("test", (0, 2))):
                names = [s.file_name for s in sightings if s.label in classes]
                write_lines(root / f"Inat_dataset_splits/Inaturalist_{split}_set1.txt", names)
    return sightings


def _write(root: Path, version: str, name: str, own: list[Sighting], rng: np.random.Generator, locations: bool) -> None:
    categories: list[dict[str, Any]] = [
        {"id": number, "name": str(number) if version == "2018" else species, "supercategory": group}
        | ({"kingdom": "?", "genus": genus, "common_name": "x"} if version == "2021" else {})
        for number, species, group, genus in CATEGORIES
    ]
    images: list[dict[str, Any]] = [
        {"id": s.image_id, "file_name": s.file_name, "width": 1, "height": 1, "license": 1, "rights_holder": "Żółć 鳥"}
        | ({"location_uncertainty": None} | _seen(s, version, "latitude", "longitude") if version == "2021" else {})
        for s in own
    ]
    notes = [{"id": 5 * place, "image_id": own[place].image_id, "category_id": CATEGORIES[own[place].label][0]}
             for place in rng.permutation(len(own)).tolist()]  # fmt: skip
    stem = name if version == "2021" else f"{name}{version}"
    whole = {"info": {"year": 2021, "url": "[]{}"}, "images": images, "licenses": [], "annotations": notes}
    (root / f"{stem}.json").write_text(json.dumps(whole | {"categories": categories}, ensure_ascii=False), "utf-8")
    if version != "2021" and locations:
        places = [{"id": s.image_id, "loc_uncert": None} | _seen(s, version, "lat", "lon") for s in reversed(own)]
        (root / f"{stem}_locations.json").write_text(json.dumps(places))


def _seen(sighting: Sighting, version: str, latitude: str, longitude: str) -> dict[str, Any]:
    lat, lon, month, hour = sighting.seen
    date = None if month is None else f"2016-{month:02d}-28"
    if date and hour is not None:
        date += f" {hour:02d}:45:00" + ("+00:00" if version == "2021" else "")
    return {latitude: lat, longitude: lon, "date": date}
