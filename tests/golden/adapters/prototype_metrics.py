"""Consistency and stability from given similarity maps, through `fgvczoo.metrics`: for the papers with such a case."""

from __future__ import annotations

import torch
from torch import Tensor

from fgvczoo.metrics import Consistency, Stability, consistency, own_pairs, part_hits, stability
from tests.golden.case import Case


def run(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    size, threshold = (config["img_size"], config["img_size"]), config["threshold"]
    class_of = torch.arange(config["num_classes"]).repeat_interleave(config["prototypes_per_class"])
    parts = torch.cat([inputs["part_locations"], (inputs["part_visible"] > 0)[..., None]], dim=2)
    maps = planted(inputs["maps"], inputs["part_locations"], config)
    image, prototype = own_pairs(inputs["labels"], class_of)
    order = prototype.argsort(stable=True)  # the case lists prototypes, and the images of each
    image, prototype = image[order], prototype[order]
    hits, perturbed = (
        part_hits(found[image, prototype], parts[image], size, config["half_size"])
        for found in (maps, maps + 0.6 * inputs["noise"])
    )
    visible = parts[image, :, 2] > 0
    consistent = Consistency(len(class_of), config["num_parts"], threshold)
    consistent.update(hits, visible, prototype)
    stable = Stability(len(class_of))
    stable.update(hits, perturbed, prototype)
    return {
        "hits": hits.long().flatten(),
        "consistent": consistency(hits, visible, prototype, len(class_of), threshold).long(),
        "stability_per_prototype": stability(hits, perturbed, prototype, len(class_of)),
        "consistency_score": consistent.compute()["consistency"],
        "stability_score": stable.compute()["stability"],
    }


def planted(maps: Tensor, locations: Tensor, config: dict[str, object]) -> Tensor:
    """Prototype j with j % 3 != 2 gets 4 more in the cell of part j % K of every image."""
    maps, (rows, columns) = maps.clone(), config["feature_size"]  # type: ignore[misc]
    every = torch.arange(len(maps))
    for prototype in range(maps.shape[1]):
        if prototype % 3 != 2:
            x, y = locations[:, prototype % locations.shape[1]].T
            maps[every, prototype, y * rows // config["img_size"], x * columns // config["img_size"]] += 4
    return maps
