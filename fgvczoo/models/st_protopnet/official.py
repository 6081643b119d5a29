"""Checkpoints of the authors' code: their keys and ours, and the arguments that their tensors imply.

The authors' keys: `features.*` (trunk), and for each branch b `add_on_layers_b.*`, `prototype_vectors_b` (P, D, 1, 1),
`last_layer_b.weight` (C, P); `ones` (constant, dropped). Everything here reads a plain state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import recognise_backbone
from fgvczoo.nn.prototypes import class_identity

BRANCHES = ("trivial", "support")

# The trunks of the authors' code; the ResNet-50 with a fourth block in its last stage has weights from iNaturalist.
BACKBONES: tuple[tuple[str, dict[str, Any] | None], ...] = (
    *((name, None) for name in ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")),
    *((name, None) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")),
    ("resnet50", {"layers": [3, 4, 6, 4]}),
    *((name, None) for name in ("densenet121", "densenet161", "densenet169", "densenet201")),
)


def state_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under the keys of `STProtoPNetNetwork`, complete.

    Raises `FgvczooError` for a key that no ST-ProtoPNet has.
    """
    classes, per_class = _sizes(state)
    renamed = {f"{branch}.prototypes.class_of": class_identity(classes, per_class) for branch in BRANCHES}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        kind, _, branch = first.rpartition("_")
        if first == "features":
            renamed[f"backbone.trunk.{rest}"] = value
        elif branch in BRANCHES and kind in ("add_on_layers", "last_layer"):
            renamed[f"{branch}.{kind.removesuffix('_layers')}.{rest}"] = value
        elif branch in BRANCHES and kind == "prototype_vectors":
            renamed[f"{branch}.prototypes.vectors"] = value.flatten(1)
        elif key != "ones":
            raise FgvczooError(
                f"{key} is no key of an ST-ProtoPNet checkpoint; give the state dict of the authors' model"
            )
    return renamed


def arguments_from_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `STProtoPNetNetwork` and `STProtoPNet` that a state dict of the authors implies.

    The variant shows in the places of the add-on convolutions. Raises `FgvczooError` for a trunk that is not the
    authors'.
    """
    classes, per_class = _sizes(state)
    trunk = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    backbone, options = BACKBONES[recognise_backbone(trunk, BACKBONES)]
    return {
        "num_classes": classes,
        "backbone": backbone,
        "backbone_options": options,
        "variant": "cropped" if "add_on_layers_trivial.0.weight" in state else "full",
        "prototypes_per_class": per_class,
        "prototype_dim": state["prototype_vectors_trivial"].shape[1],
    }


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Classes, and prototypes of a class in each branch."""
    for key in (f"{kind}_{branch}" for branch in BRANCHES for kind in ("prototype_vectors", "last_layer")):
        if key not in state and f"{key}.weight" not in state:
            raise FgvczooError(f"no {key} in the checkpoint; give the state dict of the authors' ST-ProtoPNet")
    classes, count = state["last_layer_trivial.weight"].shape
    if count % classes:
        raise FgvczooError(f"{count} prototypes for {classes} classes: ST-ProtoPNet has as many for each")
    return classes, count // classes
