"""The weights format: a folder with config.json, model.safetensors, README.md and, where the licence allows, pictures.

The same folder is what a run writes, what the Hub holds and what the package ships.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fgvczoo import __version__
from fgvczoo.errors import FgvczooError
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.build import create

FORMAT = 1
CONFIG, TENSORS, PICTURES, README = "config.json", "model.safetensors", "prototypes.safetensors", "README.md"
# Arguments that only training reads.
_TRAINING_ONLY = ("stages", "plan", "backbone_weights")


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
    model: StagedModule, folder: str | Path, *, provenance: dict[str, Any], licences: dict[str, str], readme: str = ""
) -> Path:
    """Writes a model in the weights format; the folder appears whole or not at all.

    provenance: where the weights come from (recipe, data set, seed, metrics, ...), JSON values.
    licences: of code, weights and data, as the card has them.

    Raises `FgvczooError` when the folder exists and holds something else than weights.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise FgvczooError(f"{folder}: exists and holds no weights of fgvczoo; give another folder")
    init = {
        key: plain(value)
        for key, value in model.hparams.items()
        if key not in (*_TRAINING_ONLY, "class_names", "preprocess")
    }
    config = {
        "format": FORMAT,
        "fgvczoo": __version__,
        "paper": model.paper,
        "init": init,
        "classes": model.class_names,
        "preprocess": model.preprocess.to_dict(),
        "state": model.state_values(),
        "provenance": plain(provenance),
        "licence": licences,
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
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (temporary / README).write_text(readme, encoding="utf-8")
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


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a weights folder, checked for its format. Raises `FgvczooError` for what is not one."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FgvczooError(
            f"{folder}: no {CONFIG} in it; give a folder that `fgvczoo fit` or `save_weights` wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FgvczooError(f"{path}: not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise FgvczooError(f"{path}: not a config of fgvczoo (no format number)")
    if config["format"] > FORMAT:
        raise FgvczooError(
            f"{path}: format {config['format']}, this fgvczoo {__version__} reads up to {FORMAT}; upgrade fgvczoo"
        )
    missing = [key for key in ("paper", "init", "classes", "preprocess", "state") if key not in config]
    if missing:
        raise FgvczooError(f"{path}: {missing[0]!r} is missing; fetch or write it again")
    return config


def load_weights(folder: str | Path, *, sha256: str | None = None) -> StagedModule:
    """The model of a weights folder, in eval mode.

    The class is found by its registry name; nothing in the folder is executed. sha256: what model.safetensors must hash
    to. Raises `FgvczooError` for a folder that is not one, is cut, altered, or does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise FgvczooError(f"{folder}: no {TENSORS} in it; fetch or write it again")
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise FgvczooError(
            f"{path}: sha256 {found[:12]}..., expected {sha256[:12]}...; the file was altered or cut, fetch it again"
        )
    try:
        tensors = load_file(path)
        pictures = load_file(folder / PICTURES) if (folder / PICTURES).is_file() else {}
    except SafetensorError as error:
        raise FgvczooError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
    model = create(config["paper"], **config["init"], class_names=config["classes"], preprocess=config["preprocess"])
    model.provenance = config.get("provenance")
    model.restore_state_values(config["state"])
    load_tensors(model, tensors, str(path))
    if pictures:
        model.prototype_pictures = {key: tensor.numpy().tobytes() for key, tensor in pictures.items()}
    return model.eval()


def load_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Strict loading whose first misfit is one sentence."""
    wanted = model.state_dict()
    for key in (*wanted, *tensors):
        if key not in tensors:
            raise FgvczooError(f"{name}: {key} is missing; these are weights of another model")
        if key not in wanted:
            raise FgvczooError(f"{name}: {key} does not belong to this model; these are weights of another one")
        if wanted[key].shape != tensors[key].shape:
            given, expected = tuple(tensors[key].shape), tuple(wanted[key].shape)
            raise FgvczooError(f"{name}: {key} has shape {given}, this model needs {expected}")
    model.load_state_dict(tensors)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
