"""Pictures of the training patches that prototypes are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fgvczoo.explain.overlay import encode_jpeg, enlarge, frame
from fgvczoo.nn.prototypes import PrototypeSource
from fgvczoo.tasks.base import DataSource

# Of the longer side, in pixels: enough for a card of the page, small enough to travel with the weights.
SIDE = 128


def prototype_pictures(sources: dict[str, list[PrototypeSource | None]], data: DataSource) -> dict[str, bytes]:
    """The source image of every projected prototype, cut as the model saw it, its patch framed: JPEG bytes by
    "branch.number". Prototypes without a source have none."""
    return {
        f"{name}.{number}": encode_jpeg(framed(source.image, source.box, data))
        for name, branch_sources in sources.items()
        for number, source in enumerate(branch_sources)
        if source is not None
    }


def framed(image_id: str, box: Sequence[float], data: DataSource, side: int = SIDE) -> np.ndarray:
    """An image of the data set, cut as the model saw it, its longer side `side` pixels, with a box drawn on it.

    box: x0, y0, x1, y1 in pixels of the original picture.
    """
    row = data.row(data.find(image_id))
    x0, y0, x1, y1 = row["crop"] or (0, 0, row["width"], row["height"])
    image = data.picture(row["index"])[y0:y1, x0:x1]
    scale = side / max(image.shape[:2])
    return frame(enlarge(image, side), (np.array(box) - [x0, y0, x0, y0]) * scale)
