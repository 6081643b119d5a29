"""CUB's parts, clicks and 312 attributes of a drawing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fgvczoo.data.synthbirds.drawing import Color, Drawing
from fgvczoo.data.synthbirds.genotypes import Genotype
from fgvczoo.data.synthbirds.streams import Stream, generator

_COLORS = (
    *("blue", "brown", "iridescent", "purple", "rufous", "grey", "yellow", "olive"),
    *("green", "pink", "orange", "black", "white", "red", "buff"),
)
_PATTERNS = ("solid", "spotted", "striped", "multi-colored")
# CUB's groups in the order of attributes.txt.
ATTRIBUTE_GROUPS: dict[str, tuple[str, ...]] = {
    "bill_shape": (
        *("curved_(up_or_down)", "dagger", "hooked", "needle", "hooked_seabird", "spatulate"),
        *("all-purpose", "cone", "specialized"),
    ),
    "wing_color": _COLORS,
    "upperparts_color": _COLORS,
    "underparts_color": _COLORS,
    "breast_pattern": _PATTERNS,
    "back_color": _COLORS,
    "tail_shape": (
        *("forked_tail", "rounded_tail", "notched_tail", "fan-shaped_tail", "pointed_tail", "squared_tail"),
    ),
    "upper_tail_color": _COLORS,
    "head_pattern": (
        *("spotted", "malar", "crested", "masked", "unique_pattern", "eyebrow"),
        *("eyering", "plain", "eyeline", "striped", "capped"),
    ),
    "breast_color": _COLORS,
    "throat_color": _COLORS,
    "eye_color": tuple(color for color in _COLORS if color != "iridescent"),
    "bill_length": ("about_the_same_as_head", "longer_than_head", "shorter_than_head"),
    "forehead_color": _COLORS,
    "under_tail_color": _COLORS,
    "nape_color": _COLORS,
    "belly_color": _COLORS,
    "wing_shape": ("rounded-wings", "pointed-wings", "broad-wings", "tapered-wings", "long-wings"),
    "size": (
        *("large_(16_-_32_in)", "small_(5_-_9_in)", "very_large_(32_-_72_in)"),
        *("medium_(9_-_16_in)", "very_small_(3_-_5_in)"),
    ),
    "shape": (
        *("upright-perching_water-like", "chicken-like-marsh", "long-legged-like", "duck-like", "owl-like"),
        *("gull-like", "hummingbird-like", "pigeon-like", "tree-clinging-like", "hawk-like"),
        *("sandpiper-like", "upland-ground-like", "swallow-like", "perching-like"),
    ),
    "back_pattern": _PATTERNS,
    "tail_pattern": _PATTERNS,
    "belly_pattern": _PATTERNS,
    "primary_color": _COLORS,
    "leg_color": _COLORS,
    "bill_color": _COLORS,
    "crown_color": _COLORS,
    "wing_pattern": _PATTERNS,
}
ATTRIBUTE_NAMES = tuple(f"has_{group}::{value}" for group, values in ATTRIBUTE_GROUPS.items() for value in values)
CERTAINTIES = ("not visible", "guessing", "probably", "definitely")  # ids from 1
ATTRIBUTE_NOISE = 0.08  # the share of entries that an annotator gets wrong
CLICKS_PER_PART = 3

# The parts, by CUB's ids, of which one must be visible for a group to be judged; a group not listed is always judged.
_PARTS_OF_GROUP: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("bill_shape", "bill_length", "bill_color"), (2,)),
    **dict.fromkeys(("wing_color", "wing_shape", "wing_pattern"), (9, 13)),
    **dict.fromkeys(("back_color", "back_pattern"), (1,)),
    **dict.fromkeys(("breast_color", "breast_pattern"), (4,)),
    **dict.fromkeys(("belly_color", "belly_pattern"), (3,)),
    **dict.fromkeys(("tail_shape", "upper_tail_color", "under_tail_color", "tail_pattern"), (14,)),
    **dict.fromkeys(("head_pattern", "crown_color"), (5,)),
    "upperparts_color": (1, 10),
    "underparts_color": (3, 4, 15),
    "throat_color": (15,),
    "eye_color": (7, 11),
    "forehead_color": (6,),
    "nape_color": (10,),
    "leg_color": (8, 12),
}
_GROUP_OF_ATTRIBUTE = np.repeat(np.arange(len(ATTRIBUTE_GROUPS)), [len(values) for values in ATTRIBUTE_GROUPS.values()])
# Typical colours of CUB's names, for naming the body's; "iridescent" is not one colour.
_NAMED_COLORS: dict[str, Color] = {
    "blue": (85, 110, 175),
    "brown": (115, 85, 60),
    "purple": (125, 90, 155),
    "rufous": (165, 95, 70),
    "grey": (135, 135, 135),
    "yellow": (200, 190, 95),
    "olive": (125, 130, 75),
    "green": (90, 155, 95),
    "pink": (200, 135, 165),
    "orange": (205, 145, 85),
    "black": (30, 30, 30),
    "white": (230, 230, 230),
    "red": (180, 75, 75),
    "buff": (195, 175, 145),
}
_PATTERN_OF_MARKS = {"plain": "solid", "bars": "striped", "streaks": "striped", "spots": "spotted"}


class Attributes(NamedTuple):
    """One image's 312 attributes as an annotator gave them.

    present: (312,) bool.
    certainty: (312,) int, 1 to 4, an id in `CERTAINTIES`.
    seconds: (28,) float, the time spent on each group.
    """

    present: np.ndarray
    certainty: np.ndarray
    seconds: np.ndarray


def color_name(color: Color) -> str:
    """The CUB colour nearest to an RGB colour."""
    distance = np.abs(np.array(list(_NAMED_COLORS.values())) - color).sum(axis=1)
    return list(_NAMED_COLORS)[int(distance.argmin())]


def true_attributes(genotype: Genotype, body: str) -> np.ndarray:
    """What a perfect annotator sees, (312,) bool. `body` names the colour that the plain parts share."""
    plain_head = genotype.eye_ring == "none" and genotype.cap == "none"
    head = {
        "plain": plain_head,
        "eyering": genotype.eye_ring != "none",
        "capped": genotype.cap != "none",
    }
    values: dict[str, tuple[str, ...]] = {group: (body,) for group in ATTRIBUTE_GROUPS if group.endswith("_color")}
    values |= {
        "bill_shape": (genotype.beak_shape,),
        "bill_color": (genotype.beak_color,),
        "bill_length": ("about_the_same_as_head",),
        "head_pattern": tuple(name for name, seen in head.items() if seen),
        "eye_color": ("black" if genotype.eye_ring == "none" else genotype.eye_ring,),
        "crown_color": (body if genotype.cap == "none" else genotype.cap,),
        "wing_pattern": (_PATTERN_OF_MARKS[genotype.wing],),
        "belly_pattern": (_PATTERN_OF_MARKS[genotype.belly],),
        "tail_shape": ({"square": "squared"}.get(genotype.tail, genotype.tail) + "_tail",),
        "leg_color": (genotype.leg_color,),
        "size": ("small_(5_-_9_in)",),
        "shape": ("perching-like",),
        "wing_shape": ("rounded-wings",),
        **dict.fromkeys(("breast_pattern", "back_pattern", "tail_pattern"), ("solid",)),
    }
    return np.array([value in values[group] for group, names in ATTRIBUTE_GROUPS.items() for value in names])


def annotate(drawing: Drawing) -> Attributes:
    """The attributes with an annotator's noise.

    `ATTRIBUTE_NOISE` of the entries are wrong, with certainty 2 or 3; the others have certainty 4. Where the part that
    shows an attribute is hidden, nothing is present and the certainty is 1.
    """
    rng = generator(Stream.ATTRIBUTES, drawing.seed, drawing.class_id, drawing.index)
    truth = true_attributes(drawing.scene.genotype, color_name(drawing.body_color))
    wrong = rng.random(len(truth)) < ATTRIBUTE_NOISE
    doubt = rng.integers(2, 4, len(truth))
    seconds = rng.gamma(2.0, 4.0, len(ATTRIBUTE_GROUPS)) + 0.5
    seen = drawing.parts[:, 2] > 0
    judged = np.array(
        [
            group not in _PARTS_OF_GROUP or any(seen[part - 1] for part in _PARTS_OF_GROUP[group])
            for group in ATTRIBUTE_GROUPS
        ]
    )[_GROUP_OF_ATTRIBUTE]
    return Attributes((truth ^ wrong) & judged, np.where(judged, np.where(wrong, doubt, 4), 1), seconds)


def clicks(drawing: Drawing) -> np.ndarray:
    """Where annotators clicked, (15, clicks, 4): x, y in pixels, visible, seconds; hidden parts are 0, 0, 0, s."""
    rng = generator(Stream.CLICKS, drawing.seed, drawing.class_id, drawing.index)
    clicked = np.repeat(drawing.parts[:, None], CLICKS_PER_PART, axis=1)
    shift = rng.normal(0, 0.012 * drawing.scene.width, (len(clicked), CLICKS_PER_PART, 2))
    clicked[..., :2] += shift * clicked[..., 2:]
    clicked[..., :2] = clicked[..., :2].clip(0, [drawing.scene.width, drawing.scene.height])
    return np.concatenate([clicked, rng.gamma(2.0, 1.5, (len(clicked), CLICKS_PER_PART, 1))], axis=2)
