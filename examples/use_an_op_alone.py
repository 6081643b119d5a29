"""The fused operation on features of your own: where is this patch in other pictures?

    python examples/use_an_op_alone.py [PART]

Takes the patch of one synthetic bird at a part (the beak, unless told otherwise), and finds the most similar patch of
other birds of its class in one call, without the similarities of all pairs. Here the features are those of a trained
trunk; any (B, D, H, W) tensor serves.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fgvczoo
from fgvczoo.data.synthbirds import CUB_PART_NAMES, Drawing, draw
from fgvczoo.ops import nearest_patch


def cell_of(bird: Drawing, part: str, grid: tuple[int, int]) -> Tensor:
    """Row and column of the feature map that hold a part."""
    height, width = bird.image.shape[:2]
    x, y, _ = bird.parts[CUB_PART_NAMES.index(part)]
    return torch.tensor([y / height * grid[0], x / width * grid[1]]).long()


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else "beak"
    model = fgvczoo.load("st-protopnet-synthbirds")
    birds = [draw(seed=0, class_id=4, index=1000 + number) for number in range(50)]
    birds = [bird for bird in birds if bird.parts[CUB_PART_NAMES.index(part), 2]]  # those that show it
    with torch.no_grad():
        features = model.network.backbone(torch.stack([model.preprocess(bird.image) for bird in birds]))
    grid = (features.shape[2], features.shape[3])

    row, column = cell_of(birds[0], part, grid)
    patch = features[0, :, row, column]
    similarity, index = nearest_patch(features[1:], patch[None], metric="cosine")  # (B - 1, 1) each
    found = torch.stack([index[:, 0] // grid[1], index[:, 0] % grid[1]], dim=1)

    true = torch.stack([cell_of(bird, part, grid) for bird in birds[1:]])
    distance = (found - true).abs().amax(dim=1)
    near = (distance <= 1).float().mean()
    chance = 9 / (grid[0] * grid[1])
    print(f"the {part} of one bird, looked for on {len(true)} others: {near:.0%} are found within one cell of theirs")
    print(f"(a random cell: {chance:.0%}); mean cosine {similarity.mean():.2f}")


if __name__ == "__main__":
    main()
