"""The classes: eight local factors, combined into genotypes that come in pairs of siblings."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fgvczoo.data.synthbirds.streams import Stream, generator
from fgvczoo.errors import FgvczooError


class Genotype(NamedTuple):
    """What a class looks like: one value of every factor in `FACTORS`."""

    beak_color: str
    beak_shape: str
    eye_ring: str
    cap: str
    wing: str
    belly: str
    tail: str
    leg_color: str


FACTORS: dict[str, tuple[str, ...]] = {
    "beak_color": ("red", "yellow", "black", "blue"),
    "beak_shape": ("cone", "dagger", "hooked"),
    "eye_ring": ("none", "white", "red"),
    "cap": ("none", "black", "red"),
    "wing": ("plain", "bars", "spots"),
    "belly": ("plain", "streaks", "spots"),
    "tail": ("square", "forked", "pointed"),
    "leg_color": ("black", "pink", "yellow", "blue"),
}

# The part that shows a factor, and CUB's ids of that part.
FACTOR_PART: dict[str, str] = {
    "beak_color": "beak",
    "beak_shape": "beak",
    "eye_ring": "eye",
    "cap": "cap",
    "wing": "wing",
    "belly": "belly",
    "tail": "tail",
    "leg_color": "legs",
}
CUB_PARTS_OF: dict[str, tuple[int, ...]] = {
    "beak": (2,),
    "eye": (7, 11),
    "cap": (5,),
    "wing": (9, 13),
    "belly": (3,),
    "tail": (14,),
    "legs": (8, 12),
}

PAIR_TYPES = ("allopatric", "allochronic", "sympatric")


@dataclass(frozen=True)
class SiblingPair:
    """Two classes that differ in one factor and in nothing else.

    classes: the labels 2p and 2p + 1 of pair p, from 0.
    factor: the name in `FACTORS` in which they differ.
    part: the part that shows it, a key of `CUB_PARTS_OF`.
    type: what place and date tell: "allopatric" siblings live in two regions, "allochronic" ones in two seasons,
        "sympatric" ones share both.
    """

    classes: tuple[int, int]
    factor: str
    part: str
    type: str


@lru_cache(maxsize=16)
def genotypes(pairs: int, seed: int = 0) -> tuple[Genotype, ...]:
    """The genotypes of 2 x `pairs` classes, all distinct.

    The first classes of a longer table are those of a shorter one. The bases of two pairs differ in at least four
    factors while such bases are left (beyond 50 pairs), in at least three after that.

    Raises `FgvczooError` when there are not that many.
    """
    everything = np.array(list(itertools.product(*(range(len(values)) for values in FACTORS.values()))), np.int8)
    everything = generator(Stream.GENOTYPES, seed).permutation(everything)
    distance = np.full(len(everything), len(FACTORS))  # to the nearest base so far
    classes: list[Genotype] = []
    for pair in range(pairs):
        fitting = distance >= (4 if (distance >= 4).any() else 3)
        if not fitting.any():
            raise FgvczooError(f"pairs={pairs}: seed {seed} has {pair} pairs; ask for at most {pair}")
        base = everything[fitting.argmax()]
        distance = np.minimum(distance, (everything != base).sum(axis=1))
        classes += [_named(base), _named(_sibling(base, pair, seed))]
    return tuple(classes)


def _sibling(base: np.ndarray, pair: int, seed: int) -> np.ndarray:
    """`base` with another value of the factor of this pair."""
    factor = pair % len(FACTORS)
    choices = len(list(FACTORS.values())[factor])
    sibling = base.copy()
    sibling[factor] = (base[factor] + generator(Stream.SIBLING, seed, pair).integers(1, choices)) % choices
    return sibling


def _named(values: np.ndarray) -> Genotype:
    return Genotype(*(names[value] for names, value in zip(FACTORS.values(), values)))


def sibling_pairs(pairs: int) -> tuple[SiblingPair, ...]:
    """The pairs of siblings in class order; their factors go round the eight, their types round the three."""
    names = list(FACTORS)
    return tuple(
        SiblingPair((2 * p, 2 * p + 1), names[p % 8], FACTOR_PART[names[p % 8]], PAIR_TYPES[p % 3])
        for p in range(pairs)
    )


def pair_letters(pair: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    letters = ""
    while pair >= 0:
        pair, rest = divmod(pair, 26)
        letters = string.ascii_uppercase[rest] + letters
        pair -= 1
    return letters


def class_name(class_id: int) -> str:
    """The name without CUB's number: `Synthetic_Bird_A1` is label 0, `Synthetic_Bird_A2` its sibling."""
    return f"Synthetic_Bird_{pair_letters(class_id // 2)}{class_id % 2 + 1}"


def class_folder(class_id: int) -> str:
    """The name as classes.txt has it: `001.Synthetic_Bird_A1`."""
    return f"{class_id + 1:03d}.{class_name(class_id)}"
