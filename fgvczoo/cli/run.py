"""A run's folder and what is kept in it: config.yaml, metrics.csv, data.json, checkpoints/last.ckpt, weights/."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint

from fgvczoo.data.base import FGVCDataModule
from fgvczoo.errors import FgvczooError
from fgvczoo.files import write_text
from fgvczoo.zoo.load import read_run_checkpoint

# Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED = 130


@dataclass
class RunFolder:
    """`runs/NAME`, or any folder. `interrupted` is set by Ctrl-C."""

    path: Path
    interrupted: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, run: str | None, configs: Any) -> RunFolder:
        """The folder that --run names; else that of the recipe; for a run's own config.yaml, the folder it lies in."""
        if run:
            return cls(Path(run) if len(Path(run).parts) > 1 else Path("runs") / run)
        if not configs:
            return cls(Path("runs") / "unnamed")
        first = Path(str(configs[0]))
        if first.name == "config.yaml":
            return cls(Path(os.path.relpath(first.resolve().parent)))
        return cls(Path("runs") / first.stem)

    @property
    def _config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """What of the data set the run had, see `RunData`."""
        return self.path / "data.json"

    @property
    def images(self) -> Path:
        """The list of images, where some of the official ones are missing."""
        return self.path / "images.txt"

    @property
    def last(self) -> Path:
        """The checkpoint that a resumed run starts from."""
        return self.path / "checkpoints" / "last.ckpt"

    def checkpoint(self, given: str) -> str:
        """The file behind --ckpt_path: "last" is this run's. Raises `FgvczooError` when there is none."""
        path = self.last if given == "last" else Path(given)
        if not path.is_file():
            hint = "train first, without --ckpt_path" if given == "last" else "give a .ckpt file, or last"
            raise FgvczooError(f"--ckpt_path {given}: no checkpoint {path}; {hint}")
        read_run_checkpoint(path)  # before anything is built
        return str(path)

    def check_free(self, *, resume: bool) -> None:
        """Raises `FgvczooError` where a fresh run would overwrite another."""
        if resume or not (self._config.exists() or self.last.exists()):
            return
        if self.last.exists():
            todo = "resume it with --ckpt_path last, or give another name with --run NAME"
        else:
            todo = (
                "it has no checkpoint yet: delete the folder if it is not running, or give another name with --run NAME"
            )
        raise FgvczooError(f"{self.path} holds a run; {todo}")

    def discard(self) -> None:
        """Removes what a run left that failed before its first checkpoint, so that its command can be repeated."""
        if self.last.exists():
            return
        for file in (self._config, self.path / "metrics.csv", self.data, self.images):
            file.unlink(missing_ok=True)
        for folder in (self.last.parent, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def prepare(self) -> None:
        """Makes the folder; keeps the metrics of an earlier part of the run as metrics.1.csv, metrics.2.csv, ..."""
        self.path.mkdir(parents=True, exist_ok=True)
        metrics = self.path / "metrics.csv"
        if metrics.exists():
            number = 1
            while (kept := self.path / f"metrics.{number}.csv").exists():
                number += 1
            os.replace(metrics, kept)

    def write_config(self, text: str) -> None:
        """config.yaml: all that the run was started with. Raises `FgvczooError` when a resumed run is given another
        model, data or seed than it began with."""
        file = self._config
        if file.exists():
            before, now = (_flat(yaml.safe_load(content)) for content in (file.read_text(encoding="utf-8"), text))
            for key in sorted(before.keys() | now.keys()):
                if key.startswith(_FIXED) and not key.endswith(_FREE) and before.get(key) != now.get(key):
                    raise FgvczooError(
                        f"{self.path} was started with {key}={before.get(key)}, not {now.get(key)}; repeat its "
                        f"options, or give --config {file} --ckpt_path last"
                    )
        write_text(file, text)


# What a resumed run must share with its beginning, and what of that may change.
_FIXED = ("model.", "data.", "seed_everything")
_FREE = (".root", ".decoded", ".num_workers", ".eval_batch_size")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: item for name, value in values.items() for key, item in _flat(value, f"{prefix}{name}.").items()}


class RunCheckpoint(Checkpoint):
    """Keeps checkpoints/last.ckpt: after every epoch, every `minutes`, and on Ctrl-C at the end of the batch.

    Never after the last batch of an epoch: a run resumed from there would skip what follows the epoch (projection).
    The file is written under another name and renamed, so that a killed run leaves the one before.
    """

    def __init__(self, run: RunFolder, minutes: float = 10.0) -> None:
        self.run = run
        self.seconds = minutes * 60
        self._saved = time.monotonic()
        self._previous: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self.run.interrupted:  # pressed twice: at once
            raise KeyboardInterrupt
        self.run.interrupted = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if trainer.world_size > 1 and batch_idx % 50 != 49:  # asking the other ranks takes time
            return
        due = trainer.strategy.broadcast(time.monotonic() - self._saved >= self.seconds)
        if due or self._interrupted(trainer):
            self._save(trainer)
        self._stop_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        self._stop_if_interrupted(trainer)

    def _interrupted(self, trainer: L.Trainer) -> bool:
        return bool(trainer.strategy.reduce_boolean_decision(self.run.interrupted, all=False))

    def _stop_if_interrupted(self, trainer: L.Trainer) -> None:
        if self._interrupted(trainer):
            self.run.interrupted = True
            raise RunInterrupted(f"interrupted; resume with --ckpt_path last ({self.run.last})")

    def _save(self, trainer: L.Trainer) -> None:
        part = self.run.last.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.run.last)
        self._saved = time.monotonic()


class RunData(L.Callback):
    """Keeps data.json: images by split, and the unreadable ones that were skipped (`on_corrupt`), over all processes.

    Where images that the official lists name are not there, and every copy is another subset, it says how many, and
    images.txt names those that are. A run does not go on with others than it began with.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.before: dict[str, str] = {}  # skipped by earlier parts of the run

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: FGVCDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self.run.data.is_file():
            kept = read_data(self.run.data)
            self.before = kept["skipped"]["pictures"]
            if data.reader.missing and kept.get("fingerprint", data.reader.fingerprint) != data.reader.fingerprint:
                raise FgvczooError(
                    f"{self.run.path} was started with other images of {data.dataset_name} than are there now; "
                    f"{self.run.images.name} lists them; put them back, or give another name with --run NAME"
                )
        if trainer.is_global_zero and data.reader.missing:
            print(subset(data))
            write_text(self.run.images, "".join(f"{name}\n" for name in data.reader.image_ids.tolist()))
        self._write(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        data: FGVCDataModule = trainer.datamodule  # type: ignore[attr-defined]
        skipped = self.before | _of_all_processes(data.skipped)
        if trainer.is_global_zero:
            write_data(self.run.data, data, skipped)


def write_data(file: Path, data: FGVCDataModule, skipped: dict[str, str]) -> None:
    """data.json of a run. skipped: path -> reason."""
    found = {
        "dataset": data.dataset_name,
        "splits": {name: len(rows) for name, rows in data.splits.items()},
        **of_subset(data),
        "skipped": {"count": len(skipped), "pictures": dict(sorted(skipped.items()))},
    }
    write_text(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read_data(file: Path) -> dict[str, Any]:
    """What `write_data` wrote."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found["skipped"]["pictures"], dict):
            raise ValueError("no list of skipped pictures")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FgvczooError(f"{file}: not what a run writes ({error}); delete it, and the run goes on without") from None
    return found


def of_subset(data: FGVCDataModule) -> dict[str, Any]:
    """How many images the official lists name, how many of them are missing, and the fingerprint of the others; empty
    where none is missing."""
    reader = data.reader
    if not reader.missing:
        return {}
    return {"listed": len(reader) + reader.missing, "missing": reader.missing, "fingerprint": reader.fingerprint}


def subset(data: FGVCDataModule) -> str:
    """`of_subset` as a line."""
    reader = data.reader
    return (
        f"{data.dataset_name}: {len(reader):,} of {len(reader) + reader.missing:,} listed images are there; results "
        f"compare with those of the fingerprint {reader.fingerprint}"
    )


def _of_all_processes(skipped: dict[str, str]) -> dict[str, str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(skipped)
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, skipped)
    return {path: reason for own in every for path, reason in own.items()}


class RunInterrupted(FgvczooError):
    """Ctrl-C during training, after the checkpoint was written."""
