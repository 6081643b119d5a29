"""What every module of the zoo shares: plain arguments, what it needs of the data, stages, seeding, plain state."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from fgvczoo.batch import Batch
from fgvczoo.errors import FgvczooError
from fgvczoo.nn.backbones import Backbone, load_pretrained
from fgvczoo.preprocess import Preprocess
from fgvczoo.tasks.stages import Plan, Stage, build_optimizer, freeze_all_but


@runtime_checkable
class DataSource(Protocol):
    """All that a module sees of a data module."""

    num_classes: int
    class_names: list[str]
    preprocess: Preprocess
    dataset_name: str

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def splits(self) -> Collection[str]: ...

    def loader(self, split: str, augment: bool = False, shard: str = "exact") -> Iterable[Batch]: ...

    def row(self, index: int) -> dict[str, Any]: ...

    def picture(self, index: int) -> np.ndarray: ...

    def sample(self, index: int) -> dict[str, Any]: ...

    def samples(self, indices: Iterable[int]) -> Iterable[dict[str, Any]]: ...

    def find(self, image_id: str) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Needs:
    """What a module reads: splits of the data module and keys of the batch. Checked before training starts."""

    splits: tuple[str, ...] = ("train",)
    keys: tuple[str, ...] = ()


class StagedModule(L.LightningModule, ABC):
    """A LightningModule that trains in stages and travels as plain values.

    Subclasses name their parameter groups (`groups`), their actions (`actions`: plan name -> method name) and what they
    need of the data (`needs`), and define `training_step`, in which `self.stage_name` says what is being trained.

    `__init__` of every subclass takes plain values only (they are written to config.json and to checkpoints) and calls
    `self.save_hyperparameters(logger=False)`; it builds without downloads and without data.
    """

    paper: ClassVar[str]
    needs: Needs = Needs()
    actions: ClassVar[dict[str, str]] = {}
    output_names: ClassVar[tuple[str, ...]] = ("logits",)  # of what `forward` gives, in exported files

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None,
        preprocess: dict[str, Any] | None,
        backbone_weights: str | None,
        stages: dict[str, Stage],
        plan: Sequence[str | dict[str, int]],
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise FgvczooError(f"num_classes={num_classes}, but {len(class_names)} class names are given")
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names is not None else [str(c) for c in range(num_classes)]
        self.preprocess = Preprocess(**(preprocess or {}))
        self.backbone_weights = backbone_weights
        self.provenance: dict[str, Any] | None = None  # of loaded weights: recipe, data, seed
        self.prototype_pictures: dict[str, bytes] = {}  # "branch.number" -> JPEG, where they may be shown
        self._stages, self._plan_entries = stages, plan
        self._optimizers: dict[str, Optimizer] = {}
        self._resume: dict[str, Any] | None = None

    @abstractmethod
    def groups(self) -> dict[str, nn.Module]:
        """Parameter groups by the names that stages use. Together they hold every parameter, each once."""

    def prepare_plan(self) -> None:
        """Checks stages and plan against the groups; call it at the end of `__init__`."""
        self.plan = Plan(self._stages, self._plan_entries, list(self.groups()), list(self.actions))

    # -- plain state beside the tensors: what shapes or provenance depend on training ------------------------------

    def state_values(self) -> dict[str, Any]:
        """What a saved model needs besides its tensors, as JSON values."""
        return {}

    def restore_state_values(self, state: dict[str, Any]) -> None:
        """The inverse of `state_values`; called before the tensors are loaded."""

    # -- Lightning ------------------------------------------------------------------------------------------------

    @property
    def stage_name(self) -> str:
        """The stage that is being trained."""
        return self.plan.phase(self.trainer.current_epoch).stage

    def setup(self, stage: str) -> None:
        source = getattr(self.trainer, "datamodule", None)
        if source is not None:
            self._check_source(source)
        if stage != "fit":
            return
        loop = self.trainer.fit_loop
        limit = loop.max_epochs
        loop.max_epochs = self.plan.epochs if limit is None or limit < 0 else min(limit, self.plan.epochs)

    def on_fit_start(self) -> None:
        # Not in `setup`, which runs before a checkpoint is loaded: a resumed run has its own weights.
        if self.backbone_weights and self._resume is None:
            for backbone in [module for module in self.modules() if isinstance(module, Backbone)]:
                if self.trainer.is_global_zero:
                    load_pretrained(backbone, self.backbone_weights)
                self.trainer.strategy.barrier()
                if not self.trainer.is_global_zero:  # now from the cache that rank 0 filled
                    load_pretrained(backbone, self.backbone_weights)

    def _check_source(self, source: DataSource) -> None:
        if source.num_classes != self.num_classes:
            raise FgvczooError(
                f"the model has {self.num_classes} classes and the data ({source.dataset_name}) {source.num_classes}; "
                "use the weights of a model trained on this data, or the data that this model was trained on"
            )
        for split in self.needs.splits:
            if split not in source.splits:
                raise FgvczooError(
                    f"{self.paper} needs the split {split!r}; {source.dataset_name} has {', '.join(source.splits)}"
                )
        for key in self.needs.keys:
            if key not in source.keys:
                raise FgvczooError(f"{self.paper} needs {key!r} in the batch; add it to data.keys")

    def configure_optimizers(self) -> Optimizer:
        modules = self.groups()
        self._optimizers = {name: build_optimizer(self.plan.stages[name], modules) for name in self.plan.used}
        if self._resume is not None:
            for name, state in self._resume["optimizers"].items():
                self._optimizers[name].load_state_dict(state)
            return self._optimizers[self._resume["stage"]]
        return self._optimizers[self.plan.phases[0].stage]

    def on_train_start(self) -> None:
        self._enter_epoch()

    def on_train_epoch_start(self) -> None:
        self._enter_epoch()
        source = getattr(self.trainer, "datamodule", None)
        if source is not None:
            source.set_epoch(self.trainer.current_epoch)

    def _enter_epoch(self) -> None:
        """Puts the epoch's stage in force. Only from the epoch: a resumed run and an unbroken one are the same here."""
        stage = self.stage_name
        optimizer = self._optimizers[stage]
        if self.trainer.strategy.optimizers[0] is not optimizer:
            self.trainer.strategy.optimizers = [optimizer]
        self._set_learning_rates(0.0)
        # DDP was built with everything trainable; freezing afterwards is safe with find_unused_parameters.
        freeze_all_but(list(self.plan.stages[stage].groups), self.groups())

    def _set_learning_rates(self, done: float) -> None:
        """By the schedule. done: the share of the epoch that is over."""
        stage = self.plan.stages[self.stage_name]
        factor = self.plan.learning_rate_factor(self.trainer.current_epoch, done)
        if stage.base_batch is not None:
            source = getattr(self.trainer, "datamodule", None)
            if source is None:
                raise FgvczooError(f"base_batch={stage.base_batch}: the batch is that of a data module; give one")
            factor *= stage.batch_factor(source.batch_size * self.trainer.accumulate_grad_batches)
        for group in self._optimizers[self.stage_name].param_groups:
            group["lr"] = group["base_lr"] * factor

    def parameters_replaced(self) -> None:
        """Call it at the end of an action that gave parameters new shapes: optimisers start anew, DDP wraps anew.

        It takes place between two epochs, so the next checkpoint holds the new shapes (see `state_values`) and
        optimisers, and a run resumed from it needs nothing more. Without a fit under way there is nothing to do.
        """
        if self._trainer is None or not self._trainer.training:
            return
        modules = self.groups()
        self._optimizers = {name: build_optimizer(self.plan.stages[name], modules) for name in self.plan.used}
        strategy = self.trainer.strategy
        strategy.optimizers = [self._optimizers[self.stage_name]]
        if isinstance(strategy, DDPStrategy):
            self.requires_grad_(True)  # DDP knows only what requires gradients now; the next epoch freezes
            strategy.model = self
            strategy.configure_ddp()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Nothing may depend on a random stream that a resumed run cannot find again (dropout, drop path, mixup).
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed((seed + 1) * 1_000_003 + self.trainer.global_step * 64 + self.trainer.global_rank)
        if self.plan.stages[self.stage_name].by_update:
            accumulated = self.trainer.accumulate_grad_batches
            updates = -(-self.trainer.num_training_batches // accumulated)
            self._set_learning_rates(batch_idx // accumulated / updates)

    def on_train_epoch_end(self) -> None:
        for name in self.plan.actions_after(self.trainer.current_epoch):
            getattr(self, self.actions[name])()

    def on_validation_model_train(self) -> None:
        # Lightning would put everything into train mode after a validation; frozen groups stay in eval mode.
        freeze_all_but(list(self.plan.stages[self.stage_name].groups), self.groups())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fgvczoo"] = {
            "paper": self.paper,
            "num_classes": self.num_classes,
            "classes": self.class_names,
            "state": self.state_values(),
            "stage": self.stage_name if self._optimizers else None,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }
        # The recipe builds the module; arguments in a file must not overrule it.
        for key in ("hyper_parameters", "hparams_name"):
            checkpoint.pop(key, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("fgvczoo")
        if own is None or own["paper"] != self.paper:
            found = own["paper"] if own else "not written by fgvczoo"
            raise FgvczooError(
                f"checkpoint: it is of {found}, the model is {self.paper}; give a checkpoint of this model"
            )
        if own["num_classes"] != self.num_classes:
            raise FgvczooError(
                f"checkpoint: it has {own['num_classes']} classes and the model {self.num_classes}; "
                "give the data and recipe that it was trained with"
            )
        self.restore_state_values(own["state"])
        if own["stage"] is not None:
            self._resume = own
