"""A tiny copy of Cross-View iNAT-2021 birds: iNaturalist 2021, its list of pairs, and satellite images.

The traps: the second column of a list is the place in the images of the JSON, not an id; the name of a satellite image
    is the number of the line, from 0; a third column; not all birds have a pair.
"""

from __future__ import annotations

from pathlib import Path

from tests.data.inaturalist.make import CATEGORIES, Sighting, make_inaturalist
from tests.data.pictures import save_picture, write_lines


def make_inat_birds(root: Path) -> dict[str, list[Sighting]]:
    """Writes the copy; split -> the birds of its lines."""
    written = make_inaturalist(root, train=8, val=4)
    pairs = {}
    for split, name, folder in (("train", "train", "train_overhead"), ("test", "val", "val_overhead")):
        own = [sighting for sighting in written if sighting.split == name]
        places = [place for place, s in enumerate(own) if CATEGORIES[s.label][2] == "Birds"][::-1]
        places = places[len(places) // 4 :]
        write_lines(root / f"{name}_birds.csv", [f"{7 * k},{place},{k % 5}" for k, place in enumerate(places)])
        for k in range(len(places)):
            save_picture(root / f"{folder}/images_sentinel/{k}.jpeg", 50 + k, size=(30, 30))
        pairs[split] = [own[place] for place in places]
    return pairs
