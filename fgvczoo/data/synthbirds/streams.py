"""Random numbers as a pure function of what they are for."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What numbers are drawn for. A value is part of the frozen generator: never renumber, only append."""

    GENOTYPES = 0
    SIBLING = 1
    HABITAT = 2
    POSE = 3
    SCENERY = 4
    OCCLUDER = 5
    CAMERA = 6
    ATTRIBUTES = 7
    CLICKS = 8
    PLACE = 9
    TILE = 10


def generator(stream: Stream, seed: int, owner: int = 0, index: int = 0) -> np.random.Generator:
    """The generator of one stream of one image (`owner` is its class), one pair (`owner` is the pair) or the seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, owner, index, stream])))
