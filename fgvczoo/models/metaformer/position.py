"""Relative positions: which row of a bias table a pair of tokens reads, and tables for other grids."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]
Resizing = Literal["official", "exact"]


def grid_of(image_size: tuple[int, int], stage: int) -> Grid:
    """Height and width of the grid of stage 3 or 4."""
    step = 2 ** (stage + 1)
    return image_size[0] // step, image_size[1] // step


def relative_index(grid: Grid, extra: int) -> Tensor:
    """(N, N) int64 with N = extra + h w: the table's row for the pair (i, j).

    (y_i - y_j + h - 1) (2 w - 1) + (x_i - x_j + w - 1) for two cells; 0 where one of them is an extra token.
    """
    height, width = grid
    y, x = (part.flatten() for part in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    rows = (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)
    return F.pad(rows, (extra, 0, extra, 0))


def resize_table(table: Tensor, old: Grid, new: Grid, rule: Resizing = "exact") -> Tensor:
    """A bias table ((2h-1)(2w-1) + 1, heads) of one grid, resized bicubically for another.

    exact: rows 0 .. n-1 are the offsets, and the last row, which nothing reads, stays. official: as the authors' loader
    does it, which takes row 0 for that of the extra tokens and the rows after it for the offsets: everything is off by
    one cell. The published fine-tunings began from that.
    """
    if old == new:
        return table
    begin = 0 if rule == "exact" else 1
    (old_h, old_w), (new_h, new_w) = old, new
    offsets = table[begin : begin + (2 * old_h - 1) * (2 * old_w - 1)]
    image = offsets.t().reshape(1, -1, 2 * old_h - 1, 2 * old_w - 1)
    resized = F.interpolate(image, (2 * new_h - 1, 2 * new_w - 1), mode="bicubic", align_corners=False)
    rows = resized[0].flatten(1).t()
    return torch.cat([table[:begin], rows, table[len(table) + begin - 1 :]])
