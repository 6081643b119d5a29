"""Tensors out of strangers' checkpoints: safetensors, and the state dicts and whole modules that `torch.save` wrote.

A pickle is a program. Here its operations are read as data by a small machine of our own instead of an unpickler: names
are pairs of strings that are never imported, objects are boxes that keep the state they are given, and nothing is built
but plain values and descriptions of tensors. The tensors follow when all descriptions have been checked.
"""

from fgvczoo.checkpoints.read import (
    MAX_BYTES,
    Checkpoint,
    check_archive,
    read_checkpoint,
    read_pickle,
    read_tensors,
)
from fgvczoo.checkpoints.safetensors import TensorInfo, read_header, read_safetensors

__all__ = [
    "MAX_BYTES",
    "Checkpoint",
    "TensorInfo",
    "check_archive",
    "read_checkpoint",
    "read_header",
    "read_pickle",
    "read_safetensors",
    "read_tensors",
]
