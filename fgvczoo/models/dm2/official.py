"""Checkpoints of the authors' earlier code, Relational Knowledge Distillation, as a cohort of one.

Its keys: `base.` and torchvision's keys of a ResNet, or `base.model.` and those of BN-Inception (with an unused
classifier, `last_linear`), and `linear.weight` (D, F), `linear.bias`. No DM2 checkpoints are published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import recognise_backbone

BACKBONES: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("resnet18", None),
    ("resnet50", None),
    ("bn_inception", None),
)


def state_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the keys of `Cohort`, complete. Raises `FgvczooError` for a key that is none of theirs."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("base."):
            name = key.removeprefix("base.").removeprefix("model.")
            if not name.startswith(("last_linear.", "fc.")):
                renamed[f"members.0.backbone.trunk.{name}"] = value
        elif key in ("linear.weight", "linear.bias"):
            renamed[f"members.0.head.{key.removeprefix('linear.')}"] = value
        else:
            raise FgvczooError(f"{key} is no key of a network of Relational Knowledge Distillation")
    return renamed


def arguments_from_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `DM2` that a state dict implies."""
    if "linear.weight" not in state:
        raise FgvczooError("no linear.weight in the checkpoint; give the state dict of a network of RKD's code")
    prefix = "members.0.backbone.trunk."
    trunk = {
        key.removeprefix(prefix): value for key, value in state_from_official(state).items() if key.startswith(prefix)
    }
    backbone, _ = BACKBONES[recognise_backbone(trunk, BACKBONES)]
    # The network knows no classes; a recipe's data has them.
    return {
        "num_classes": 1,
        "backbones": [backbone],
        "embedding_dim": state["linear.weight"].shape[0],
        "intervals": [1],
    }
