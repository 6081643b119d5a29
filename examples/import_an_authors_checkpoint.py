"""A checkpoint of the authors' code becomes a model of the zoo; nothing in the file is executed.

    python examples/import_an_authors_checkpoint.py protopnet 100push0.8112.pth [-o imported]

Without a checkpoint it writes one of a random network in the layout of ProtoPNet's code, and imports that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18

import fgvczoo
from fgvczoo.zoo.official import import_checkpoint, save_imported


class StandIn(nn.Module):
    """The names and shapes that ProtoPNet's code gives its tensors: 5 classes with 2 prototypes each."""

    def __init__(self) -> None:
        super().__init__()
        self.features = resnet18()
        self.features.fc = nn.Identity()
        self.add_on_layers = nn.Sequential(nn.Conv2d(512, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.Sigmoid())
        self.prototype_vectors = nn.Parameter(torch.rand(10, 64, 1, 1))
        self.ones = nn.Parameter(torch.ones(10, 64, 1, 1), requires_grad=False)
        self.last_layer = nn.Linear(10, 5, bias=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", nargs="?", default="protopnet")
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("imported"))
    options = parser.parse_args()
    checkpoint = options.checkpoint
    if checkpoint is None:
        checkpoint = Path("stand-in.pth")
        torch.save(StandIn(), checkpoint)  # a whole pickled module, as many repositories publish

    model, report = import_checkpoint(options.paper, checkpoint)
    print("\n".join(report.lines()))
    print("written:", save_imported(model, options.paper, options.output))

    again = fgvczoo.load(options.output)
    print(again.predict(torch.rand(3, 200, 200)))


if __name__ == "__main__":
    main()
