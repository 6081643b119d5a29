"""The weights format: a folder with config.json, model.safetensors, README.md and, where the licence allows, pictures.

The same folder is what a run writes, what the Hub holds and what the package ships.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fgvczoo import __version__
from fgvczoo.checkpoints import read_header, read_safetensors
from fgvczoo.errors import FgvczooError
from fgvczoo.files import write_text
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.card import model_card
from fgvczoo.zoo.config import (
    CONFIG,
    FORMAT,
    PICTURES,
    README,
    TENSORS,
    TRAINING_ONLY,
    DamagedWeights,
    build_from_config,
    check_tensors,
    read_config,
)
from fgvczoo.zoo.recipe import Card


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses become dicts, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(item) for key, item in asdict(value).items()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is not a plain value: arguments of a module must be")


def save_weights(
    model: StagedModule,
    folder: str | Path,
    *,
    provenance: dict[str, Any],
    licences: dict[str, Any],
    card: Card | None = None,
) -> Path:
    """Writes a model in the weights format; the folder appears whole or not at all.

    provenance: where the weights come from (recipe, data set, seed, metrics, ...), JSON values.
    licences: of code, weights and data, and whether they are `redistributable`, as the card has them.
    card: of the recipe, for the README.

    Raises `FgvczooError` when the folder exists and holds something else than weights.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise FgvczooError(f"{folder}: exists and holds no weights of fgvczoo; give another folder")
    unsaved = (*TRAINING_ONLY, "class_names", "preprocess")
    config = {
        "format": FORMAT,
        "fgvczoo": __version__,
        "paper": model.paper,
        "init": {key: plain(value) for key, value in model.hparams.items() if key not in unsaved},
        "classes": model.class_names,
        "preprocess": model.preprocess.to_dict(),
        "state": model.state_values(),
        "provenance": plain(provenance),
        "licence": licences,
        "card": None if card is None else {"title": card.title, "task": card.task, "published": plain(card.published)},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
        save_file(state, temporary / TENSORS, metadata={"format": "pt"})
        if model.prototype_pictures:
            encoded = {
                key: torch.frombuffer(bytearray(value), dtype=torch.uint8)
                for key, value in model.prototype_pictures.items()
            }
            save_file(encoded, temporary / PICTURES)
        config["files"] = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / CONFIG).write_text(_json(config), encoding="utf-8")
        (temporary / README).write_text(model_card(config), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp and safetensors make private ones
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
            os.replace(folder, old / folder.name)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def record_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Adds what a test measured to the provenance of saved weights, and to their README; null for what is undefined."""
    config = read_config(folder / CONFIG)
    defined = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    config["provenance"] = {**(config["provenance"] or {}), "metrics": defined}
    write_text(folder / CONFIG, _json(config))
    write_text(folder / README, model_card(config))


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=1) + "\n"


def load_weights(folder: str | Path, *, sha256: str | None = None) -> StagedModule:
    """The model of a weights folder, in eval mode.

    The class is found by its registry name; nothing in the folder is executed, and it takes no more memory than its
    tensors. sha256: what config.json must hash to, which holds the hashes of the other files. Raises `FgvczooError` for
    a folder that is not one or does not fit, `DamagedWeights` for a file that is cut or altered.
    """
    folder = Path(folder)
    config = check_folder(folder, sha256=sha256)
    path = folder / TENSORS
    model = build_from_config(config, read_header(path), folder / CONFIG)
    model.load_state_dict(read_safetensors(path))
    model.provenance = config["provenance"]
    if PICTURES in config["files"]:
        pictures = read_safetensors(folder / PICTURES)
        model.prototype_pictures = {key: bytes(tensor.flatten().numpy()) for key, tensor in pictures.items()}
    return model.eval()


def weights_folder(folder: Path) -> Path:
    """The weights of a run folder, or the folder itself."""
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "weights" / CONFIG).is_file():
        return folder / "weights"
    raise FgvczooError(f"{folder}: no weights in it; an unfinished run is resumed with `fgvczoo fit --ckpt_path last`")


def check_folder(folder: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """The config of a weights folder whose files hash to what it says. Errors as `load_weights`."""
    path = folder / CONFIG
    if sha256 is not None:
        check_file(path, sha256)
    config = read_config(path)
    if TENSORS not in config["files"] or not set(config["files"]) <= {TENSORS, PICTURES}:
        raise FgvczooError(f"{path}: 'files' names {', '.join(config['files']) or 'none'}; expected {TENSORS}")
    for name, expected in config["files"].items():
        check_file(folder / name, str(expected))
    return config


def check_file(path: Path, sha256: str) -> None:
    """Raises `DamagedWeights` where a file is missing or hashes to something else."""
    if not path.is_file():
        raise DamagedWeights(f"{path.parent}: no {path.name} in it; fetch or write it again")
    if (found := file_sha256(path)) != sha256:
        raise DamagedWeights(
            f"{path}: sha256 {found[:12]}..., expected {sha256[:12]}...; the file was altered or cut, fetch it again"
        )


def load_tensors(model: torch.nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Strict loading whose first misfit is one sentence."""
    check_tensors(model.state_dict(), tensors, name)
    model.load_state_dict(tensors)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
