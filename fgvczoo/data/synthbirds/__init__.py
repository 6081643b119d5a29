"""SynthBirds: drawn birds in CUB-200-2011's layout, made in seconds, with known answers.

Classes come in pairs of siblings that differ in one part; where it lies in each image is known exactly. Every image is
a pure function of (seed, class, index). Torch is not imported here.
"""

from fgvczoo.data.synthbirds.annotations import ATTRIBUTE_GROUPS, ATTRIBUTE_NAMES
from fgvczoo.data.synthbirds.drawing import CUB_PART_NAMES, PARTS, Drawing, draw
from fgvczoo.data.synthbirds.genotypes import (
    CUB_PARTS_OF,
    FACTOR_PART,
    FACTORS,
    Genotype,
    SiblingPair,
    class_folder,
    class_name,
    genotypes,
    sibling_pairs,
)
from fgvczoo.data.synthbirds.habitats import HABITATS, REGIONS, Niche, Sighting, niche, sighting, tile
from fgvczoo.data.synthbirds.sizes import SIZES, Size
from fgvczoo.data.synthbirds.writer import VERSION, default_root, make

__all__ = [
    "ATTRIBUTE_GROUPS",
    "ATTRIBUTE_NAMES",
    "CUB_PARTS_OF",
    "CUB_PART_NAMES",
    "FACTORS",
    "FACTOR_PART",
    "HABITATS",
    "PARTS",
    "REGIONS",
    "SIZES",
    "VERSION",
    "Drawing",
    "Genotype",
    "Niche",
    "SiblingPair",
    "Sighting",
    "Size",
    "class_folder",
    "class_name",
    "default_root",
    "draw",
    "genotypes",
    "make",
    "niche",
    "sibling_pairs",
    "sighting",
    "tile",
]
