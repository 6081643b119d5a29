"""config.json of a weights folder, whoever wrote it: read within bounds, and built within the bounds of its tensors.

Nothing in it is executed: the class is found by its registry name, class paths are refused, and what would take more
memory or time than the tensors beside it justify is refused before it is taken.
"""

from __future__ import annotations

import json
import reprlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.nn.modules import module as registration

from fgvczoo import __version__
from fgvczoo.checkpoints import TensorInfo
from fgvczoo.errors import FgvczooError, did_you_mean
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.registry import model_class

FORMAT = 1
CONFIG, TENSORS, PICTURES, README = "config.json", "model.safetensors", "prototypes.safetensors", "README.md"
# Arguments that only training reads; backbone_weights would name a file.
TRAINING_ONLY = ("stages", "plan", "backbone_weights")

_TYPES: dict[str, tuple[type, ...]] = {
    "paper": (str,),
    "init": (dict,),
    "classes": (list,),
    "preprocess": (dict,),
    "state": (dict,),
    "files": (dict,),
    "provenance": (dict, type(None)),
    "licence": (dict,),
}
_MAX_BYTES, _MAX_DEPTH = 32 * 2**20, 32
# Buffers that are made anew, such as tables of relative positions, are in no file.
_MAX_UNSAVED_BYTES = 256 * 2**20


class DamagedWeights(FgvczooError):
    """A file of a weights folder is cut or altered: another copy may be whole."""


def read_config(path: Path) -> dict[str, Any]:
    """A config.json with the types that the format gives its keys.

    Raises `DamagedWeights` for what is not JSON, `FgvczooError` for a missing file, a newer format, a missing key, a
    key of another type, and a class path.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise FgvczooError(
            f"{path.parent}: no {CONFIG} in it; give a folder that `fgvczoo fit` or `save_weights` wrote"
        ) from None
    except OSError as error:
        raise FgvczooError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > _MAX_BYTES:
        raise FgvczooError(f"{path}: more than {_MAX_BYTES:,} bytes; a config is a few kilobytes")
    try:
        config = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedWeights(f"{path}: not valid JSON ({str(error)[:100]}); fetch or write it again") from None
    if not isinstance(config, dict) or type(config.get("format")) is not int:
        raise FgvczooError(f"{path}: not a config of fgvczoo (no format number)")
    if config["format"] > FORMAT:
        raise FgvczooError(
            f"{path}: format {config['format']}, this fgvczoo {__version__} reads up to {FORMAT}; upgrade fgvczoo"
        )
    for key, types in _TYPES.items():
        if key not in config:
            raise FgvczooError(f"{path}: {key!r} is missing; fetch or write it again")
        if not isinstance(config[key], types):
            raise FgvczooError(f"{path}: {key!r} is no {types[0].__name__} but {type(config[key]).__name__}")
    if not all(isinstance(name, str) for name in config["classes"]):
        raise FgvczooError(f"{path}: 'classes' holds something else than names")
    if config["init"].get("num_classes") != len(config["classes"]):
        given = str(config["init"].get("num_classes"))[:40]
        raise FgvczooError(f"{path}: num_classes={given}, but {len(config['classes'])} class names are given")
    for key in TRAINING_ONLY:
        if key in config["init"]:
            raise FgvczooError(f"{path}: init.{key} belongs to training and not to weights")
    _check_plain(config, path)
    return config


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_plain(config: dict[str, Any], path: Path) -> None:
    todo: list[tuple[Any, int]] = [(config["init"], 0), (config["state"], 0), (config["preprocess"], 0)]
    while todo:
        value, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise FgvczooError(f"{path}: nested more than {_MAX_DEPTH} deep")
        if isinstance(value, dict):
            if "class_path" in value:
                raise FgvczooError(f"{path}: names a class to import ({str(value['class_path'])[:80]!r}); refused")
            todo += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            todo += [(item, depth + 1) for item in value]


def build_from_config(config: dict[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> StagedModule:
    """The module that a config describes, without its tensors, which must be those that `tensors` lists.

    It is made twice: first without memory, to compare it with the tensors; a config can describe a module of any size
    in a few bytes. Raises `FgvczooError` where the config describes none, or another one.
    """
    with _at_most_modules_for(len(tensors), path), torch.device("meta"):
        skeleton = _create(config, path)
    check_tensors(skeleton.state_dict(), tensors, str(path.with_name(TENSORS)))
    saved = set(tensors)
    unsaved = sum(buffer.nbytes for name, buffer in skeleton.named_buffers() if name not in saved)
    if unsaved > _MAX_UNSAVED_BYTES:
        raise FgvczooError(f"{path}: describes {unsaved:,} bytes of buffers that are in no file; refused")
    return _create(config, path)


def _create(config: dict[str, Any], path: Path) -> StagedModule:
    try:
        cls = model_class(config["paper"])
        hints = get_type_hints(cls.__init__)
        arguments = {}
        # Not by the parser that recipes go through, which would open a file for a string in place of settings.
        for key, value in config["init"].items():
            if key not in hints:
                raise FgvczooError(f"init has no setting {key!r}{did_you_mean(key, hints)}")
            try:
                arguments[key] = _as_type(value, hints[key])
            except TypeError:
                raise FgvczooError(f"init.{key} is {reprlib.repr(value)}; expected {_words(hints[key])}") from None
        model: StagedModule = cls(**arguments, class_names=config["classes"], preprocess=config["preprocess"])
        model.restore_state_values(config["state"])
    except FgvczooError as error:
        raise FgvczooError(f"{path}: {error}") from None
    except Exception as error:  # whatever a network's constructor does with a stranger's values
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise FgvczooError(f"{path}: describes no {config['paper']} that can be built ({reason})") from None
    return model


def _as_type(value: Any, hint: Any) -> Any:
    """A JSON value as an argument of that type: lists become tuples where those are wanted. Raises `TypeError`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in inner:
            with suppress(TypeError):
                return _as_type(value, each)
    elif origin is Literal:
        if value in inner:
            return value
    elif origin is tuple:
        if isinstance(value, list) and (len(value) == len(inner) or ... in inner):
            return tuple(_as_type(item, inner[0 if ... in inner else n]) for n, item in enumerate(value))
    elif origin in (list, Sequence):
        if isinstance(value, list):
            return [_as_type(item, inner[0]) for item in value]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _as_type(item, inner[1]) for key, item in value.items()}
    elif hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return value
    elif is_dataclass(hint) and isinstance(value, dict):
        return value  # modules take their own settings as dicts
    raise TypeError


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def check_tensors(
    wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor | TensorInfo], name: str
) -> None:
    """Raises `FgvczooError` with the first tensor that is missing, too many, or of another shape or type."""
    for key in (*wanted, *given):
        if key not in given:
            raise FgvczooError(f"{name}: {key} is missing; these are weights of another model")
        if key not in wanted:
            raise FgvczooError(f"{name}: {key[:200]} does not belong to this model; these are weights of another one")
        ours, theirs = wanted[key], given[key]
        if tuple(ours.shape) != tuple(theirs.shape):
            raise FgvczooError(f"{name}: {key} has shape {tuple(theirs.shape)}, this model needs {tuple(ours.shape)}")
        if ours.dtype != theirs.dtype:
            raise FgvczooError(f"{name}: {key} is {theirs.dtype}, this model needs {ours.dtype}")


@contextmanager
def _at_most_modules_for(tensors: int, path: Path) -> Iterator[None]:
    """Stops the making of a network that has far more parts than there are tensors for it."""
    most, count, thread = 1000 + 20 * tensors, 0, threading.get_ident()

    def one_more(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise FgvczooError(f"describes a network of more than {most:,} parts for {tensors} tensors")

    hooks = [
        registration.register_module_parameter_registration_hook(one_more),
        registration.register_module_module_registration_hook(one_more),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
