"""Where and when a bird was seen, and what the place looks like from above.

Which classes place and date can tell apart is known: see `SiblingPair.type`.
"""

from __future__ import annotations

import calendar
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from fgvczoo.data.synthbirds.genotypes import PAIR_TYPES
from fgvczoo.data.synthbirds.streams import Stream, generator

REGIONS = ((45.0, -100.0), (-15.0, -60.0), (50.0, 10.0), (5.0, 25.0), (30.0, 100.0), (-28.0, 140.0))  # degrees
HABITATS = ("water", "forest", "crop", "urban", "desert")
_HABITAT_COLORS = np.array([(40, 70, 120), (45, 90, 45), (150, 160, 75), (140, 135, 135), (205, 180, 130)], np.uint8)
TILE_SIDE = 64
VAGRANTS, MISSING = 0.12, 0.08  # shares of the images


class Niche(NamedTuple):
    """Where a class lives: the index of a region and of a habitat, and the peak of its season in 0..12 (months)."""

    region: int
    habitat: int
    peak: float


class Sighting(NamedTuple):
    """Place and time of one image.

    latitude, longitude: degrees, -90..90 and -180..180.
    date: year, month 1..12, day 1..31.
    hour: 0..23.
    location_uncertainty: metres.
    """

    latitude: float
    longitude: float
    date: tuple[int, int, int]
    hour: int
    location_uncertainty: int


@lru_cache(maxsize=1024)
def niche(seed: int, class_id: int) -> Niche:
    """The niche of a class (a label, from 0)."""
    pair, second = divmod(class_id, 2)
    rng = generator(Stream.HABITAT, seed, pair)
    regions, habitats = rng.permutation(len(REGIONS)), rng.permutation(len(HABITATS))
    peak = rng.uniform(0, 12)
    kind = PAIR_TYPES[pair % len(PAIR_TYPES)]
    own = second if kind == "allopatric" else 0
    return Niche(int(regions[own]), int(habitats[own]), (2.0, 8.0)[second] if kind == "allochronic" else peak)


def sighting(seed: int, class_id: int, index: int) -> Sighting | None:
    """Place and time of an image, or none where they were not recorded."""
    rng = generator(Stream.PLACE, seed, class_id, index)
    home = niche(seed, class_id)
    latitude, longitude = rng.normal(REGIONS[home.region], (6.0, 8.0))
    anywhere = rng.uniform((-60, -180), (70, 180))
    if rng.random() < VAGRANTS:
        latitude, longitude = anywhere
    season = rng.normal(home.peak, 1.8) % 12
    year, hour = int(rng.integers(2012, 2022)), int(rng.normal(10, 3.5)) % 24
    uncertainty = int(np.exp(rng.normal(4, 1.5)))
    if rng.random() < MISSING:
        return None
    month = int(season) + 1
    day = int((season % 1) * calendar.monthrange(year, month)[1]) + 1
    longitude = (longitude + 180) % 360 - 180
    return Sighting(round(float(latitude), 5), round(float(longitude), 5), (year, month, day), hour, uncertainty)


def tile(seed: int, class_id: int, index: int) -> np.ndarray:
    """The satellite picture of the place, (64, 64, 3) uint8.

    More than half of it is the habitat of the class; also images without a recorded place have one.
    """
    rng = generator(Stream.TILE, seed, class_id, index)
    share = 0.45 * rng.dirichlet(np.full(len(HABITATS), 0.7))
    share[niche(seed, class_id).habitat] += 0.55
    coarse = Image.fromarray(rng.standard_normal((8, 8), np.float32))
    height = np.asarray(coarse.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.BICUBIC)).ravel()
    order = rng.permutation(len(HABITATS))
    ends = np.rint(share[order].cumsum() * len(height)).astype(int)
    habitat = np.empty(len(height), int)
    habitat[height.argsort(kind="stable")] = order[np.searchsorted(ends[:-1], np.arange(len(height)), side="right")]
    pixels = 9 * rng.standard_normal((len(height), 3), np.float32)
    pixels += _HABITAT_COLORS[habitat]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8).reshape(TILE_SIDE, TILE_SIDE, 3)
