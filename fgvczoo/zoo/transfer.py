"""Trained weights as the start of another training: another data set, or another paper on the same trunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone
from fgvczoo.tasks.base import StagedModule


@dataclass(frozen=True)
class Transfer:
    """What became of the weights: names of the model's tensors.

    loaded: have the values of the weights. new: do not, and why: "classes" (they follow the classes of the data),
    "shape" (of another shape in the weights), "absent" (not in the weights).
    """

    loaded: list[str]
    new: dict[str, str]

    def lines(self, model: StagedModule) -> list[str]:
        """For people: by parameter group."""
        loaded = _by_group(model, self.loaded)
        lines = [f"loaded: {', '.join(f'{name} ({count} tensors)' for name, count in loaded.items()) or 'nothing'}"]
        for reason, words in (
            ("classes", f"new for {model.num_classes} classes"),
            ("shape", "new, of another shape in the weights"),
            ("absent", "new, not in the weights"),
        ):
            names = _by_group(model, [name for name, why in self.new.items() if why == reason])
            if names:
                lines.append(f"{words}: {', '.join(f'{name} ({count} tensors)' for name, count in names.items())}")
        return lines


def transfer(model: StagedModule, trained: StagedModule) -> Transfer:
    """Fills `model` with what it can take over from `trained`.

    The same paper and the same classes: everything, with the plain state beside the tensors. Other classes: all tensors
    whose shape does not follow the number of classes. Another paper: the trunk.

    Raises `FgvczooError` where the trunks differ, and for another paper where one has no trunk of its own.
    """
    mine, theirs = model.state_dict(), _named_as(model, trained)
    if model.paper == trained.paper and model.class_names == trained.class_names:
        model.restore_state_values(trained.state_values())
        mine, follow = model.state_dict(), set()
    else:
        follow = _follow_classes(model)
    trunk = _trunk(model)
    new = {}
    for name, tensor in mine.items():
        if name in follow:
            new[name] = "classes"
        elif name not in theirs:
            new[name] = "absent"
        elif theirs[name].shape != tensor.shape:
            new[name] = "shape"
        if name in new and trunk is not None and name.startswith(trunk):
            raise FgvczooError(
                f"the weights are of another trunk ({_backbone(trained)[1].name}, of the model "
                f"{_backbone(model)[1].name}); give the model their backbone, out_index and backbone_options"
            )
    loaded = [name for name in mine if name not in new]
    model.load_state_dict({name: theirs[name] for name in loaded}, strict=False)
    return Transfer(loaded, new)


def _named_as(model: StagedModule, trained: StagedModule) -> dict[str, torch.Tensor]:
    """The tensors of `trained` by the names that `model` has for them: all of the same paper, else the trunk's."""
    state = trained.state_dict()
    if trained.paper == model.paper:
        return state
    mine, theirs = _trunk(model), _trunk(trained)
    if mine is None or theirs is None:
        raise FgvczooError(
            f"the weights are of {trained.paper} and the model is {model.paper}: they share no trunk; give weights of"
            f" {model.paper}"
        )
    return {mine + name.removeprefix(theirs): tensor for name, tensor in state.items() if name.startswith(theirs)}


def _trunk(model: nn.Module) -> str | None:
    """The prefix of the names of its trunk's tensors; None for a network that is not built on one."""
    return _backbone(model)[0] if any(isinstance(part, Backbone) for part in model.modules()) else None


def _backbone(model: nn.Module) -> tuple[str, Backbone]:
    """The trunk and the prefix of its tensors' names."""
    name, backbone = next((name, part) for name, part in model.named_modules() if isinstance(part, Backbone))
    return f"{name}.", backbone


def _follow_classes(model: StagedModule) -> set[str]:
    """Names of the tensors whose shapes follow the number of classes, found by building the model for one more."""
    arguments = {**model.hparams, "num_classes": model.num_classes + 1, "class_names": None}
    with torch.device("meta"):
        other = type(model)(**arguments).state_dict()
    return {name for name, tensor in model.state_dict().items() if other[name].shape != tensor.shape}


def _by_group(model: StagedModule, names: list[str]) -> dict[str, int]:
    """How many of these tensors each parameter group has; buffers that no group holds count as "other"."""
    group_of = {
        id(tensor): group
        for group, module in model.groups().items()
        for tensor in (*module.parameters(), *module.buffers())
    }
    state = dict((*model.named_parameters(), *model.named_buffers()))
    counts: dict[str, int] = {}
    for name in names:
        group = group_of.get(id(state[name]), "other")
        counts[group] = counts.get(group, 0) + 1
    return counts
