"""Training in stages, declared in the recipe.

A recipe names its stages (what is trained, with which optimiser and schedule) and its plan (which stage for how many
epochs, and the actions between them):

    stages:
      warm:       {groups: {add_on: {lr: 3e-3}, prototypes: {lr: 3e-3}}}
      joint:      {groups: {...}, milestones: [2, 4], gamma: 0.2}
    plan: [{warm: 5}, {joint: 16}, project, {last_layer: 10}, {joint: 9}]

One pass over the training data is one epoch of the trainer, so the current stage is a function of the epoch alone and
nothing about it needs to be saved. A stage that appears twice goes on where it stopped: same optimiser, same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fgvczoo.errors import FgvczooError, did_you_mean

_SCHEDULES = ("constant", "milestones", "cosine", "polynomial", "cosine-updates")


@dataclass
class Group:
    """How a stage trains one parameter group: learning rate and (coupled, as the optimiser has it) weight decay.

    bias_lr: the learning rate of its biases, those of norms included, where it is another; 0 leaves them as they are.
    decay: what the weight decay is for: "all" parameters, or "matrices" only, those of two dimensions or more that are
        no biases (so neither norms nor class tokens).
    """

    lr: float
    weight_decay: float = 0.0
    bias_lr: float | None = None
    decay: str = "all"

    def __post_init__(self) -> None:
        if self.decay not in ("all", "matrices"):
            raise FgvczooError(f"decay={self.decay!r} of a parameter group; expected all or matrices")


@dataclass
class Stage:
    """What one stage trains, and how. Groups that it does not name are frozen: eval mode, no gradient, no optimiser.

    groups: parameter-group name -> learning rate and weight decay.
    optimizer: the name of a class in torch.optim; `optimizer_options` are its further arguments.
    schedule: "constant"; "milestones": the rate is multiplied by `gamma` before each of these epochs of the stage;
        "cosine": half a cosine from 1 to 0 over the stage's epochs in the plan, after `warmup` linear epochs;
        "polynomial": (1 - epoch / epochs) to the power of 0.9; "cosine-updates": set before every update instead of
        every epoch, linear from `warmup_from` to 1 over `warmup` epochs, then half a cosine from 1 to `minimum` whose
        time counts from the stage's first update, the warm-up included.
    warmup_from, minimum: of "cosine-updates", as shares of the learning rates.
    base_batch: the learning rates are those for a batch of this size, over all processes and accumulated batches
        together, and are scaled in proportion to the one that is trained with; None: they are what they are.
    """

    groups: dict[str, Group]
    optimizer: str = "Adam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup: int = 0
    warmup_from: float = 0.0
    minimum: float = 0.0
    base_batch: int | None = None

    @property
    def by_update(self) -> bool:
        """Whether the schedule moves within an epoch."""
        return self.schedule == "cosine-updates"

    def batch_factor(self, batch: int) -> float:
        """What the learning rates are multiplied by for this total batch."""
        return 1.0 if self.base_batch is None else batch / self.base_batch

    def factor(self, epoch: float, epochs: int) -> float:
        """What the learning rates are multiplied by in epoch `epoch` (from 0; in schedules by update with a fraction:
        the share of it that is over) of `epochs` of this stage."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine-updates":
            if epoch < self.warmup:
                return self.warmup_from + (1 - self.warmup_from) * epoch / self.warmup
            return self.minimum + 0.5 * (1 - self.minimum) * (1 + math.cos(math.pi * min(epoch / epochs, 1)))
        if self.schedule == "milestones":
            return float(self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        if self.schedule == "polynomial":
            return float((1 - epoch / epochs) ** 0.9)
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup) / max(1, epochs - self.warmup)))


@dataclass(frozen=True)
class Phase:
    """A run of epochs of one stage within the plan. `offset`: epochs that the stage had in earlier phases."""

    stage: str
    first_epoch: int
    epochs: int
    offset: int
    actions: tuple[str, ...]  # run after the last epoch, in order


class Plan:
    """The sequence of phases. Built from the recipe's `stages` and `plan`; raises `FgvczooError` on what cannot run."""

    def __init__(
        self,
        stages: dict[str, Stage],
        plan: Sequence[str | dict[str, int]],
        groups: Sequence[str],
        actions: Sequence[str],
    ) -> None:
        self.stages = {name: _as_stage(name, stage) for name, stage in stages.items()}
        for name, stage in self.stages.items():
            _check_stage(name, stage, groups)
        self.phases: list[Phase] = []
        self.epochs = 0
        trained: dict[str, int] = {}
        for entry in plan:
            if isinstance(entry, str):
                self._add_action(entry, actions)
                continue
            if len(entry) != 1:
                raise FgvczooError(
                    f"plan: {entry} must be one stage with its epochs, as in {{warm: 5}}, or an action's name"
                )
            name, epochs = next(iter(entry.items()))
            if name not in self.stages:
                raise FgvczooError(
                    f"plan: no stage {name!r}; stages are {', '.join(self.stages)}{did_you_mean(name, self.stages)}"
                )
            if not isinstance(epochs, int) or epochs < 0:
                raise FgvczooError(f"plan: {name} for {epochs!r} epochs; expected a whole number, 0 or more")
            if epochs == 0:
                continue
            self.phases.append(Phase(name, self.epochs, epochs, trained.get(name, 0), ()))
            trained[name] = trained.get(name, 0) + epochs
            self.epochs += epochs
        if not self.phases:
            raise FgvczooError("plan: nothing to train; name at least one stage with its epochs, as in {warm: 5}")
        self._trained = trained

    def _add_action(self, name: str, actions: Sequence[str]) -> None:
        if name not in actions:
            known = ", ".join(actions) or "none"
            raise FgvczooError(f"plan: no action {name!r}; this model has {known}{did_you_mean(name, actions)}")
        if not self.phases:
            raise FgvczooError(f"plan: {name!r} comes before any stage; begin with a stage, as in {{warm: 5}}")
        last = self.phases[-1]
        self.phases[-1] = Phase(last.stage, last.first_epoch, last.epochs, last.offset, (*last.actions, name))

    def phase(self, epoch: int) -> Phase:
        """The phase of an epoch of the trainer; the last one for epochs beyond the plan."""
        for phase in self.phases:
            if epoch < phase.first_epoch + phase.epochs:
                return phase
        return self.phases[-1]

    def actions_after(self, epoch: int) -> tuple[str, ...]:
        """The actions that follow directly on this epoch."""
        phase = self.phase(epoch)
        return phase.actions if epoch == phase.first_epoch + phase.epochs - 1 else ()

    def learning_rate_factor(self, epoch: int, done: float = 0.0) -> float:
        """The schedule's factor in this epoch of the trainer. done: the share of it that is over."""
        phase = self.phase(epoch)
        within = phase.offset + epoch - phase.first_epoch + done
        return self.stages[phase.stage].factor(within, self._trained[phase.stage])

    @property
    def used(self) -> list[str]:
        """Names of the stages that the plan trains, in order of their first appearance."""
        return list(dict.fromkeys(phase.stage for phase in self.phases))


def _as_stage(name: str, stage: Stage | dict[str, Any]) -> Stage:
    """A stage from a config file's plain values, or unchanged."""
    if isinstance(stage, Stage):
        return stage
    known = Stage.__dataclass_fields__
    for key in stage:
        if key not in known:
            raise FgvczooError(
                f"stages.{name}: no setting {key!r}; expected {', '.join(known)}{did_you_mean(key, known)}"
            )
    groups = {key: value if isinstance(value, Group) else Group(**value) for key, value in stage["groups"].items()}
    return Stage(**{**stage, "groups": groups})


def _check_stage(name: str, stage: Stage, groups: Sequence[str]) -> None:
    for group in stage.groups:
        if group not in groups:
            raise FgvczooError(
                f"stages.{name}: no group {group!r}; groups are {', '.join(groups)}{did_you_mean(group, groups)}"
            )
    if not stage.groups:
        raise FgvczooError(f"stages.{name}: trains nothing; name at least one of the groups {', '.join(groups)}")
    optimizer = getattr(torch.optim, stage.optimizer, None)
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise FgvczooError(f"stages.{name}: torch.optim has no optimiser {stage.optimizer!r}")
    if stage.schedule not in _SCHEDULES:
        raise FgvczooError(f"stages.{name}: schedule={stage.schedule!r}; expected {', '.join(_SCHEDULES)}")


def build_optimizer(stage: Stage, modules: dict[str, nn.Module]) -> Optimizer:
    """The stage's optimiser; `base_lr` of each group is what the schedule multiplies."""
    groups = []
    for name, group in stage.groups.items():
        parts: dict[tuple[float, float], list[nn.Parameter]] = {}
        for key, parameter in modules[name].named_parameters():
            is_bias = key.rpartition(".")[2] == "bias"
            rate = group.bias_lr if is_bias and group.bias_lr is not None else group.lr
            decays = group.decay == "all" or (parameter.ndim > 1 and not is_bias)
            if not (is_bias and group.bias_lr == 0):
                parts.setdefault((rate, group.weight_decay if decays else 0.0), []).append(parameter)
        groups += [
            {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay, "name": name}
            for (rate, decay), params in parts.items()
        ]
    return getattr(torch.optim, stage.optimizer)(groups, **stage.optimizer_options)


def freeze_all_but(trained: Sequence[str], modules: dict[str, nn.Module]) -> None:
    """Groups in `trained`: train mode and gradients; all others: eval mode, no gradients."""
    for name, module in modules.items():
        active = name in trained
        module.train(active)
        module.requires_grad_(active)
