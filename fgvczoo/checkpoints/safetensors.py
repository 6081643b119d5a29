"""Files of safetensors: their headers, whose claims are checked, and their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fgvczoo.errors import FgvczooError

# The format allows 100 MB, which take several times that when parsed.
_MAX_HEADER = 16 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Shapes and types of the tensors in a safetensors file, of which only the header is read.

    Raises `FgvczooError` for a file that is missing, cut or not safetensors, whose header is huge, or that has a type
    of numbers that no module has.
    """
    path, infos = Path(path), {}
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _MAX_HEADER:
                raise FgvczooError(f"{path}: not a safetensors file, or its header has more than {_MAX_HEADER:,} bytes")
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                if (dtype := _DTYPES.get(part.get_dtype())) is None:
                    raise FgvczooError(f"{path}: {key} has the type {part.get_dtype()}, which no model here has")
                infos[key] = TensorInfo(tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise FgvczooError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
    return infos


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Errors as `read_header`."""
    read_header(path)
    return load_file(path)
