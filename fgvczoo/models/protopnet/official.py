"""Checkpoints of the authors' code: their keys and ours, and the arguments that their tensors imply.

The authors' keys: `features.*` (trunk), `add_on_layers.*`, `prototype_vectors` (P, D, h, w), `last_layer.weight`
(C, P), `ones` (constant, dropped). Everything here reads a plain state dict.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import TORCHVISION, recognise_backbone
from fgvczoo.nn.prototypes import class_identity


def state_from_official(state: Mapping[str, Tensor], *, pruned: bool = False) -> dict[str, Tensor]:
    """The authors' state dict under the keys of `ProtoPNetNetwork`, complete.

    pruned: see `classes_from_official`. Raises `FgvczooError` for a key that no ProtoPNet has.
    """
    renamed = {"head.prototypes.class_of": classes_from_official(state, pruned=pruned)}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if first == "features":
            renamed[f"backbone.trunk.{rest}"] = value
        elif first == "add_on_layers":
            renamed[f"head.add_on.{rest}"] = value
        elif first == "last_layer":
            renamed[f"head.last_layer.{rest}"] = value
        elif key == "prototype_vectors":
            renamed["head.prototypes.vectors"] = value
        elif key != "ones":
            raise FgvczooError(f"{key} is no key of a ProtoPNet checkpoint; give the state dict of the authors' model")
    return renamed


def arguments_from_official(state: Mapping[str, Tensor], *, pruned: bool = False) -> dict[str, Any]:
    """The arguments of `ProtoPNetNetwork` and `ProtoPNet` that a state dict of the authors implies.

    It does not say how distances become similarities: add `activation="linear"` where the model was not trained with
    the default. pruned: see `classes_from_official`. Raises `FgvczooError` for a trunk that is not the authors'.
    """
    vectors, weight = _tensor(state, "prototype_vectors"), _tensor(state, "last_layer.weight")
    trunk = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    classes, convolutions = len(weight), sum(key.startswith("add_on_layers.") for key in state) // 2
    class_of = classes_from_official(state, pruned=pruned)
    regular = len(vectors) % classes == 0 and torch.equal(class_of, class_identity(classes, len(vectors) // classes))
    return {
        "num_classes": classes,
        "backbone": TORCHVISION[recognise_backbone(trunk, [(name, None) for name in TORCHVISION])],
        "prototypes_per_class": len(vectors) // classes if regular else 1,
        "prototype_classes": None if regular else class_of.tolist(),
        "prototype_dim": vectors.shape[1],
        "prototype_window": tuple(vectors.shape[2:]),
        "add_on": "regular" if convolutions == 2 else "bottleneck",  # with two convolutions they are the same
    }


def classes_from_official(state: Mapping[str, Tensor], *, pruned: bool = False) -> Tensor:
    """The class of each prototype (P,), which a state dict of the authors does not hold.

    Equal shares of consecutive prototypes. Of a `pruned` model, and where the shares would not be equal: the class that
    each prototype's connection is strongest to, with a warning.
    """
    weight = _tensor(state, "last_layer.weight")
    classes, count = weight.shape
    if count % classes == 0 and not pruned:
        return class_identity(classes, count // classes)
    warnings.warn(
        f"{count} prototypes for {classes} classes: the class of each is taken from its strongest connection",
        stacklevel=2,
    )
    return weight.argmax(dim=0)


def _tensor(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise FgvczooError(f"no {key} in the checkpoint; give the state dict of the authors' ProtoPNet")
    return state[key]
