"""What a pickle describes: plain values, names, boxes for objects, storages and views for tensors."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fgvczoo.checkpoints.refused import Refused

_MAX_DIMENSIONS, _MAX_COUNT = 16, 2**40


class Name(NamedTuple):
    """module.name, as the file has it; never imported."""

    module: str
    name: str


class Dict(dict[str, Any]):
    """A dict; what it holds by objects instead of strings stands beside it, as pairs."""

    by_object: list[tuple[Box, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.by_object = []


class Box:
    """An object of any class: keeps the state it is given, and nothing else."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


class Array(Box):
    """A numpy array; its state is (1, shape, type, in the order of columns, bytes)."""

    __slots__ = ()


class DType(NamedTuple):
    """A numpy type, by its code."""

    code: str


@dataclass(frozen=True)
class Storage:
    """`count` numbers of type `dtype` under the name `key` in the archive."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage, within its bounds."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMENSIONS:
        raise Refused("a tensor's shape is no short tuple")
    for value in values:
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            raise Refused(f"a tensor's shape or stride holds {short(value)}")
    return tuple(values)


def _view(storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any) -> View:
    """What `torch._utils._rebuild_tensor_v2` is asked to build."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    (start,) = counts([offset])
    view = View(storage, start, counts(size), counts(stride))
    if len(view.size) != len(view.stride):
        raise Refused(f"a tensor of shape {view.size} has the strides {view.stride}")
    if math.prod(max(n, 1) for n in view.size) > _MAX_COUNT:
        raise Refused(f"a tensor has the impossible shape {view.size}")
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride))
    if 0 not in view.size and (last >= storage.count or math.prod(view.size) > storage.count):
        raise Refused(
            f"a tensor of shape {view.size} reaches beyond its {storage.count} numbers; it was altered or cut"
        )
    return view


def set_item(mapping: Any, key: Any, value: Any) -> None:
    # Only strings become keys: hashing a stranger's tuples or colliding numbers can take for ever.
    if isinstance(mapping, dict) and isinstance(key, str):
        mapping[key] = value
    elif isinstance(mapping, Dict) and isinstance(key, Box):
        mapping.by_object.append((key, value))


def extend(target: Any, values: Iterable[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)


# All that a pickle can have built; whatever else it names gives a box. Sets are lists here, see `set_item`. Nothing is
# copied: a file could have one long list copied a million times.
_BUILDERS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): lambda: {},
    Name("builtins", "set"): lambda values=(): values,
    Name("__builtin__", "set"): lambda values=(): values,
    Name("torch", "Size"): lambda values=(): values,
    Name("torch._utils", "_rebuild_tensor"): _view,
    Name("torch._utils", "_rebuild_tensor_v2"): _view,
    Name("torch._utils", "_rebuild_parameter"): lambda data=None, *_: data,
    Name("torch._utils", "_rebuild_parameter_with_state"): lambda data=None, *_: data,
    **{Name(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: Array() for core in ("core", "_core")},
    Name("numpy", "dtype"): lambda code="", *_: DType(code if isinstance(code, str) else ""),
    Name("_codecs", "encode"): lambda text="", *_: text,  # how Python 2's protocol has bytes of Python 3
}


def build(name: Any, arguments: Any) -> Any:
    if not isinstance(name, Name) or name not in _BUILDERS:
        return Box()
    if not isinstance(arguments, tuple) or len(arguments) > 8:
        raise Refused(f"its pickle calls {name.name} wrongly")
    try:
        return _BUILDERS[name](*arguments)
    except TypeError:
        raise Refused(f"its pickle calls {name.name} with {len(arguments)} arguments") from None


def persistent(identity: Any, storages: dict[str, Storage]) -> Any:
    """What `torch.save` keeps outside the pickle: storages; before torch 1.6 the classes of modules, with source."""
    if isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, Name) or kind.module != "torch" or kind.name not in _DTYPES:
            known = ", ".join(name.removesuffix("Storage") for name in _DTYPES)
            raise Refused(f"a tensor has the type {short(kind)}; known are {known}")
        if view not in ([], [None]) or not isinstance(key, str):
            raise Refused("its storages are views or numbered, which torch has not written since 0.4; save it again")
        storage = Storage(key, _DTYPES[kind.name], *counts([count]))
        if storages.setdefault(key, storage) != storage:
            raise Refused(f"the storage {short(key)} has two types or sizes")
        return storage
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        return identity[1]
    raise Refused("it refers to something outside of it that is no tensor")


def short(value: Any) -> str:
    if isinstance(value, Name):
        value = f"{value.module}.{value.name}"
    return reprlib.repr(value) if isinstance(value, (str, int, float)) else type(value).__name__.strip("_").lower()
