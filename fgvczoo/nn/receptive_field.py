"""Which pixels a cell of a convolutional trunk's feature map can see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone


@dataclass(frozen=True)
class ReceptiveField:
    """Geometry of a feature map over a square picture, in pixels (ProtoPNet's bookkeeping).

    cells: of a row or column. jump: between the centres of two cells. size: of the field. start: centre of the first
    cell's field. picture: side of the picture.
    """

    cells: int
    jump: float
    size: float
    start: float
    picture: int

    def through(self, kernel: int, stride: int, padding: int) -> ReceptiveField:
        """The geometry behind one more convolution or pooling."""
        return ReceptiveField(
            cells=(self.cells - kernel + 2 * padding) // stride + 1,
            jump=self.jump * stride,
            size=self.size + (kernel - 1) * self.jump,
            start=self.start + ((kernel - 1) / 2 - padding) * self.jump,
            picture=self.picture,
        )

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """The field of a cell: x0, y0, x1, y1, ends exclusive, cut to the picture.

        For deep trunks it is most of the picture: it says what a cell can see, not what it looks at.
        """
        for name, place in (("row", row), ("column", column)):
            if not 0 <= place < self.cells:
                raise FgvczooError(f"{name}={place}: the map has {self.cells} x {self.cells} cells")
        (x0, x1), (y0, y1) = (self._span(place) for place in (column, row))
        return x0, y0, x1, y1

    def _span(self, place: int) -> tuple[int, int]:
        centre = self.start + place * self.jump
        return max(int(centre - self.size / 2), 0), min(int(centre + self.size / 2), self.picture)


def receptive_field(backbone: Backbone, picture: int, window: int = 1) -> ReceptiveField:
    """The geometry of prototypes of `window` x `window` cells on a trunk, for pictures of `picture` x `picture` pixels.

    For trunks whose convolutions and poolings follow one another along the main path (VGG, ResNet, DenseNet); shortcuts
    see less and are passed over. Raises `FgvczooError` for a trunk with attention, which sees everything.
    """
    field = ReceptiveField(picture, 1, 1, 0.5, picture)
    for name, layer in backbone.trunk.named_modules():
        if "attn" in name or "attention" in name:
            raise FgvczooError(f"{backbone.name} has attention: each of its cells sees the whole picture")
        if "downsample" in name or not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            continue
        kernel, stride, padding = (
            value if isinstance(value, int) else int(value[0])
            for value in (layer.kernel_size, layer.stride, layer.padding)
        )
        field = field.through(kernel, stride, padding)
    return field.through(window, 1, 0)
