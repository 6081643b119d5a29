"""Pictures of the training patches that prototypes are."""

from __future__ import annotations

import numpy as np

from fgvczoo.explain.overlay import encode_jpeg, enlarge, frame
from fgvczoo.nn.prototypes import PrototypeSource
from fgvczoo.preprocess import read_image
from fgvczoo.tasks.base import DataSource

# Of the longer side, in pixels: enough for a card of the page, small enough to travel with the weights.
SIDE = 128


def prototype_pictures(sources: dict[str, list[PrototypeSource | None]], data: DataSource) -> dict[str, bytes]:
    """The source image of every projected prototype, cut as the model saw it, its patch framed: JPEG bytes by
    "branch.number". Prototypes without a source have none."""
    return {
        f"{name}.{number}": _framed(source, data)
        for name, branch_sources in sources.items()
        for number, source in enumerate(branch_sources)
        if source is not None
    }


def _framed(source: PrototypeSource, data: DataSource) -> bytes:
    row = data.row(data.find(source.image))
    x0, y0, x1, y1 = row["crop"] or (0, 0, row["width"], row["height"])
    image = read_image(row["path"])[y0:y1, x0:x1]
    scale = SIDE / max(image.shape[:2])
    return encode_jpeg(frame(enlarge(image, SIDE), (np.array(source.box) - [x0, y0, x0, y0]) * scale))
