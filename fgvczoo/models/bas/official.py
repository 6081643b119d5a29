"""Checkpoints of the authors' two repositories, BAS (conference) and BAS-Extension (journal)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fgvczoo.errors import FgvczooError, FgvczooWarning

VARIANTS = ("journal", "conference")
_VGG = {
    f"conv{stage}_{number}": place
    for (stage, number), place in zip(
        [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (5, 1), (5, 2), (5, 3)],
        [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    )
}
_MOBILENET_BLOCKS = ["0.0", "1.0", "1.1", "2.0", "2.1", *(f"3.{n}" for n in range(6)), "4.0", "4.1"]
_MOBILENET_LAYERS = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}


def model_of(state: Mapping[str, Tensor]) -> str:
    """Which of this folder's models a checkpoint is of: the segmentation form's generator has no bias."""
    plain = _plain(state)
    segmentation = "classifier_loc.0.weight" in plain and "classifier_loc.0.bias" not in plain
    return "bas-segmentation" if segmentation else "bas"


def state_from_official(state: Mapping[str, Tensor], variant: str | None = None) -> dict[str, Tensor]:
    """The authors' state dict with the keys of our network. variant: see `arguments_from_official`.

    Copies of the head that conference ILSVRC checkpoints carry (`_copy`, `erase_branch`) are left out. Raises
    `FgvczooError` for a key that no BAS network has.
    """
    del variant  # the tensors are the same
    renamed = {}
    for key, tensor in _plain(state).items():
        renamed[_rename(key)] = tensor
    return renamed


def arguments_from_official(state: Mapping[str, Tensor], variant: str | None = None) -> dict[str, Any]:
    """Constructor arguments that the tensors imply. variant: "journal" or "conference", which the tensors do not show;
    None: the journal form, with a warning."""
    if variant is not None and variant not in VARIANTS:
        raise FgvczooError(f"variant={variant!r}; expected {' or '.join(VARIANTS)}")
    plain = _plain(state)
    if "classifier_loc.0.weight" not in plain:
        raise FgvczooError("no classifier_loc.0.weight in it; expected a checkpoint of BAS or BAS-Extension")
    num_classes = len(plain["classifier_loc.0.weight"])
    if model_of(state) == "bas-segmentation":
        return {"num_classes": num_classes, "backbone": "resnet50"}
    if variant is None:
        warnings.warn(
            "the tensors do not say whether the class maps had a ReLU; taken as the journal's, give variant=conference"
            " for the conference repository's",
            FgvczooWarning,
            stacklevel=2,
        )
    backbone = next(name for mark, name in _MARKS if any(key.startswith(mark) for key in plain))
    head = next((key for key in _HEADS if f"{key}.0.weight" in plain), None)
    return {
        "num_classes": num_classes,
        "backbone": backbone,
        "hidden": len(plain[f"{head}.0.weight"]) if head else 1024,
        "relu_class_maps": variant == "conference",
    }


_MARKS = (("conv1_1.", "vgg16"), ("model.", "mobilenetv1_100"), ("Conv2d_1a", "inception_v3"), ("", "resnet50"))
_HEADS = ("classifier_cls", "classifier")


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of several GPUs and without copies of the head."""
    plain = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in plain.items() if "_copy" not in key and "erase_branch" not in key}


def _rename(key: str) -> str:
    if key.startswith("classifier_loc.0."):
        return key.replace("classifier_loc.0", "generator")
    if found := re.fullmatch(r"(?:classifier_cls|classifier)\.(?:(\d+)\.)?(weight|bias)", key):
        return f"classifier.{found[1] or 0}.{found[2]}"
    return f"trunk.backbone.trunk.{_trunk_key(key)}"


def _trunk_key(key: str) -> str:
    first, _, rest = key.partition(".")
    if first in _VGG:
        return f"features.{_VGG[first]}.{rest}"
    if first != "model":
        return key
    found = re.fullmatch(r"model\.(\d+)\.(\d)\.(.+)", key)
    block = int(found[1]) if found else -1
    if found and block == 0 and found[2] in "01":
        return f"{'conv_stem' if found[2] == '0' else 'bn1'}.{found[3]}"
    if not found or not 1 <= block <= len(_MOBILENET_BLOCKS) or found[2] not in _MOBILENET_LAYERS:
        raise FgvczooError(f"{key} is no tensor of BAS's MobileNetV1")
    return f"blocks.{_MOBILENET_BLOCKS[block - 1]}.{_MOBILENET_LAYERS[found[2]]}.{found[3]}"
