"""Reads checkpoint files, and says in one line why one cannot be read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgvczoo.checkpoints.archives import LegacyArchive, ZipArchive, check_members
from fgvczoo.checkpoints.description import Box, Storage, View, short
from fgvczoo.checkpoints.machine import described
from fgvczoo.checkpoints.modules import MAX_KEY, TOO_MANY, module_state, module_values, table, unwrapped
from fgvczoo.checkpoints.plain import MAX_ENTRIES, plain_items, plain_values
from fgvczoo.checkpoints.refused import BROKEN, Refused
from fgvczoo.checkpoints.safetensors import read_safetensors
from fgvczoo.errors import FgvczooError

MAX_BYTES = 4 * 2**30
_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: `tensors` by the keys of the state dict, and the plain values and tensors beside it
    (`attributes`: those of a whole module, such as num_classes, or what a training script stored with its state).

    modules: of a whole module, the plain values of each inner one by its path ("" is the outermost), private ones, too,
    but not those that every module has. Where they are dicts by modules, these stand as their paths.
    """

    tensors: dict[str, Tensor]
    attributes: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_tensors(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """The state dict of a checkpoint file; arguments and errors as `read_checkpoint`."""
    return read_checkpoint(path, max_bytes).tensors


def check_archive(path: str | Path) -> None:
    """That a file of torch.save, or a checkpoint of Lightning, is a zip archive whose reading takes no more than its
    size: torch itself decompresses what is in it. Raises `FgvczooError` where it is not."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            check_members(zipfile.ZipFile(file), size)
    except OSError as error:
        raise FgvczooError(f"{path}: cannot be read ({error.strerror or error}); give a checkpoint file") from None
    except Refused as error:
        raise FgvczooError(f"{path}: {error}") from None
    except BROKEN:
        raise FgvczooError(f"{path}: not a whole checkpoint; give a file that torch.save or a run wrote") from None


def read_pickle(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The plain values and numpy arrays of numbers that a pickle describes, as CIFAR's; executes nothing of it.

    Text of Python 2 is read as Latin-1, sets and tuples as lists.

    Raises `FgvczooError` for a missing, cut or hostile file, and for one that holds something else.
    """
    path = Path(path)
    with _one_line(path, "pickle"):
        _check_size(path.stat().st_size, max_bytes)
        return plain_values(described(io.BytesIO(path.read_bytes()), {}))


def read_checkpoint(path: str | Path, max_bytes: int = MAX_BYTES) -> Checkpoint:
    """Reads a checkpoint file and executes nothing of it.

    path: safetensors, or a file of `torch.save` (either format) that holds a state dict, one inside
        {"state_dict": ...}, or a whole module, whose class need not exist here. A prefix "module." of all keys
        (DataParallel) is removed.
    max_bytes: files that are larger, or whose tensors would be, are refused.

    The tensors are on the CPU; those that shared memory still do.

    Raises `FgvczooError` for a missing, cut, altered or hostile file, and for one without a state dict.
    """
    path = Path(path)
    with _one_line(path, "checkpoint file"), path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        _check_size(size, max_bytes)
        file.seek(0)
        start = file.read(9)
        file.seek(0)
        if start[8:] == b"{" and start[:4] != b"PK\x03\x04":
            return Checkpoint(_without_prefix(read_safetensors(path)))
        archive = ZipArchive(file, size) if start[:4] == b"PK\x03\x04" else LegacyArchive(file, size)
        return _checkpoint(archive, max_bytes)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise Refused(f"it has {size:,} bytes; at most {max_bytes:,} are read (max_bytes)")


@contextmanager
def _one_line(path: Path, kind: str) -> Iterator[None]:
    """What goes wrong with a file inside becomes one line."""
    try:
        yield
    except OSError as error:
        raise FgvczooError(f"{path}: cannot be read ({error.strerror or error}); give a {kind}") from None
    except Refused as error:
        raise FgvczooError(f"{path}: {error}") from None
    except BROKEN as error:
        reason = " ".join(str(error).split())[:200] or "it is cut"
        raise FgvczooError(f"{path}: not a whole {kind} ({reason}); fetch it again") from None


def _checkpoint(archive: ZipArchive | LegacyArchive, max_bytes: int) -> Checkpoint:
    value, beside, modules = archive.value, {}, {}
    if isinstance(value, dict):
        wrapper = next((key for key in _WRAPPERS if isinstance(value.get(key), (dict, Box))), None)
        if wrapper is not None:
            beside = {key: item for key, item in value.items() if key != wrapper}
            value = value[wrapper]
    if isinstance(value, Box):
        value = unwrapped(value)
        beside |= {key: item for key, item in table(value.state).items() if key[:1] != "_" and key != "training"}
        state, paths = module_state(value)
        modules = module_values(paths)
    elif isinstance(value, dict):
        state = value
    else:
        raise Refused(f"holds a {short(value)}, no state dict and no module")
    other = next((key for key, item in state.items() if not isinstance(item, View)), None)
    if other is not None or not state:
        raise Refused(f"{short(other)} in it is no tensor; give a state dict" if state else "holds no tensors")
    if len(state) > MAX_ENTRIES or max(map(len, state)) > MAX_KEY:
        raise Refused(TOO_MANY)
    attributes = plain_items(beside)
    views = [item for item in (*state.values(), *attributes.values()) if isinstance(item, View)]
    if sum(view.nbytes for view in views) > max_bytes:
        raise Refused(f"its tensors have more than {max_bytes:,} bytes (max_bytes)")
    contents = {storage: _numbers(storage, archive.content(storage)) for storage in {view.storage for view in views}}
    return Checkpoint(
        _without_prefix({key: _tensor(view, contents) for key, view in state.items()}),
        {key: _tensor(item, contents) if isinstance(item, View) else item for key, item in attributes.items()},
        modules,
    )


def _numbers(storage: Storage, content: bytes) -> Tensor:
    if len(content) != storage.nbytes:
        raise Refused(f"the storage {short(storage.key)} is cut or of another size than its tensors say")
    if not content:
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype == torch.bool:  # a byte other than 0 and 1 is no bool that torch could work with
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)


def _tensor(view: View, contents: dict[Storage, Tensor]) -> Tensor:
    return contents[view.storage].as_strided(view.size, view.stride, view.offset)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if tensors and all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors
