"""Tensors out of strangers' checkpoints: safetensors, and the state dicts and whole modules that `torch.save` wrote.

A pickle is a program. Here its operations are read as data by a small machine of our own instead of an unpickler: names
are pairs of strings that are never imported, objects are boxes that keep the state they are given, and nothing is built
but plain values and descriptions of tensors. The tensors follow when all descriptions have been checked.
"""

from __future__ import annotations

import io
import math
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fgvczoo.errors import FgvczooError

MAX_BYTES = 4 * 2**30
# One operation of a pickle costs about two microseconds and at most a few hundred bytes.
_MAX_PICKLE, _MAX_OPERATIONS = 16 * 2**20, 2_000_000
_MAX_ENTRIES, _MAX_KEY, _MAX_DIMENSIONS, _MAX_COUNT = 100_000, 512, 16, 2**40
# Of a safetensors file. The format allows 100 MB, which take several times that when parsed.
_MAX_HEADER = 16 * 2**20
_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema")
# What the first two pickles of the format before torch 1.6 hold.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_BIG_ENDIAN = "it was written on a big-endian machine; load and save it on another one"
_TOO_MANY = "it has too many tensors, or too long names"


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
                if (dtype := _SAFETENSORS_DTYPES.get(part.get_dtype())) is None:
                    raise FgvczooError(f"{path}: {key} has the type {part.get_dtype()}, which no model here has")
                infos[key] = TensorInfo(tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise FgvczooError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
    return infos


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Errors as `read_header`."""
    read_header(path)
    return load_file(path)


def check_archive(path: str | Path) -> None:
    """That a file of torch.save, or a checkpoint of Lightning, is a zip archive whose reading takes no more than its
    size: torch itself decompresses what is in it. Raises `FgvczooError` where it is not."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            _check_members(zipfile.ZipFile(file), size)
    except OSError as error:
        raise FgvczooError(f"{path}: cannot be read ({error.strerror or error}); give a checkpoint file") from None
    except _Refused as error:
        raise FgvczooError(f"{path}: {error}") from None
    except _BROKEN:
        raise FgvczooError(f"{path}: not a whole checkpoint; give a file that torch.save or a run wrote") from None


def read_pickle(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The plain values and numpy arrays of numbers that a pickle describes, as CIFAR's; executes nothing of it.

    Text of Python 2 is read as Latin-1, sets and tuples as lists.

    Raises `FgvczooError` for a missing, cut or hostile file, and for one that holds something else.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise _Refused(f"it has {size:,} bytes; at most {max_bytes:,} are read (max_bytes)")
        return _values(_read_pickle(io.BytesIO(path.read_bytes()), {}))
    except OSError as error:
        raise FgvczooError(f"{path}: cannot be read ({error.strerror or error}); give a pickle") from None
    except _Refused as error:
        raise FgvczooError(f"{path}: {error}") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:200] or "it is cut"
        raise FgvczooError(f"{path}: not a whole pickle ({reason}); fetch it again") from None


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
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            if size > max_bytes:
                raise _Refused(f"it has {size:,} bytes; at most {max_bytes:,} are read (max_bytes)")
            file.seek(0)
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{" and start[:4] != b"PK\x03\x04":
                return Checkpoint(_without_prefix(read_safetensors(path)))
            archive = _ZipArchive(file, size) if start[:4] == b"PK\x03\x04" else _LegacyArchive(file, size)
            return _checkpoint(archive, max_bytes)
    except OSError as error:
        raise FgvczooError(f"{path}: cannot be read ({error.strerror or error}); give a checkpoint file") from None
    except _Refused as error:
        raise FgvczooError(f"{path}: {error}") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:200] or "it is cut"
        raise FgvczooError(f"{path}: not a whole checkpoint file ({reason}); fetch it again") from None


class _Refused(Exception):
    """Why a file is not read; the end of a sentence that begins with its name."""


# What pickletools, zipfile, struct and safetensors raise for files that are not what they say.
_BROKEN = (
    *(ValueError, LookupError, EOFError, OverflowError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile, SafetensorError),
)


# -- values that a pickle can describe ---------------------------------------------------------------------------------


class _Name(NamedTuple):
    """module.name, as the file has it; never imported."""

    module: str
    name: str


class _Dict(dict[str, Any]):
    """A dict; what it holds by objects instead of strings stands beside it, as pairs."""

    by_object: list[tuple[_Box, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.by_object = []


class _Box:
    """An object of any class: keeps the state it is given, and nothing else."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


class _Array(_Box):
    """A numpy array; its state is (1, shape, type, in the order of columns, bytes)."""

    __slots__ = ()


class _DType(NamedTuple):
    """A numpy type, by its code."""

    code: str


@dataclass(frozen=True)
class _Storage:
    """`count` numbers of type `dtype` under the name `key` in the archive."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _View:
    """A tensor: a strided view of a storage, within its bounds."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize


_SAFETENSORS_DTYPES = {
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


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMENSIONS:
        raise _Refused("a tensor's shape is no short tuple")
    for value in values:
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            raise _Refused(f"a tensor's shape or stride holds {_short(value)}")
    return tuple(values)


def _view(storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any) -> _View:
    """What `torch._utils._rebuild_tensor_v2` is asked to build."""
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor without a storage")
    (start,) = _counts([offset])
    view = _View(storage, start, _counts(size), _counts(stride))
    if len(view.size) != len(view.stride):
        raise _Refused(f"a tensor of shape {view.size} has the strides {view.stride}")
    if math.prod(max(n, 1) for n in view.size) > _MAX_COUNT:
        raise _Refused(f"a tensor has the impossible shape {view.size}")
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride))
    if 0 not in view.size and (last >= storage.count or math.prod(view.size) > storage.count):
        raise _Refused(
            f"a tensor of shape {view.size} reaches beyond its {storage.count} numbers; it was altered or cut"
        )
    return view


def _set(mapping: Any, key: Any, value: Any) -> None:
    # Only strings become keys: hashing a stranger's tuples or colliding numbers can take for ever.
    if isinstance(mapping, dict) and isinstance(key, str):
        mapping[key] = value
    elif isinstance(mapping, _Dict) and isinstance(key, _Box):
        mapping.by_object.append((key, value))


def _extend(target: Any, values: Iterable[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)


# All that a pickle can have built; whatever else it names gives a box. Sets are lists here, see `_set`. Nothing is
# copied: a file could have one long list copied a million times.
_BUILDERS: dict[_Name, Callable[..., Any]] = {
    _Name("collections", "OrderedDict"): lambda: {},
    _Name("builtins", "set"): lambda values=(): values,
    _Name("__builtin__", "set"): lambda values=(): values,
    _Name("torch", "Size"): lambda values=(): values,
    _Name("torch._utils", "_rebuild_tensor"): _view,
    _Name("torch._utils", "_rebuild_tensor_v2"): _view,
    _Name("torch._utils", "_rebuild_parameter"): lambda data=None, *_: data,
    _Name("torch._utils", "_rebuild_parameter_with_state"): lambda data=None, *_: data,
    **{_Name(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    _Name("numpy", "dtype"): lambda code="", *_: _DType(code if isinstance(code, str) else ""),
    _Name("_codecs", "encode"): lambda text="", *_: text,  # how Python 2's protocol has bytes of Python 3
}


def _build(name: Any, arguments: Any) -> Any:
    if not isinstance(name, _Name) or name not in _BUILDERS:
        return _Box()
    if not isinstance(arguments, tuple) or len(arguments) > 8:
        raise _Refused(f"its pickle calls {name.name} wrongly")
    try:
        return _BUILDERS[name](*arguments)
    except TypeError:
        raise _Refused(f"its pickle calls {name.name} with {len(arguments)} arguments") from None


def _persistent(identity: Any, storages: dict[str, _Storage]) -> Any:
    """What `torch.save` keeps outside the pickle: storages; before torch 1.6 the classes of modules, with source."""
    if isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, _Name) or kind.module != "torch" or kind.name not in _DTYPES:
            known = ", ".join(name.removesuffix("Storage") for name in _DTYPES)
            raise _Refused(f"a tensor has the type {_short(kind)}; known are {known}")
        if view not in ([], [None]) or not isinstance(key, str):
            raise _Refused("its storages are views or numbered, which torch has not written since 0.4; save it again")
        storage = _Storage(key, _DTYPES[kind.name], *_counts([count]))
        if storages.setdefault(key, storage) != storage:
            raise _Refused(f"the storage {_short(key)} has two types or sizes")
        return storage
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        return identity[1]
    raise _Refused("it refers to something outside of it that is no tensor")


def _short(value: Any) -> str:
    if isinstance(value, _Name):
        value = f"{value.module}.{value.name}"
    return reprlib.repr(value) if isinstance(value, (str, int, float)) else type(value).__name__.strip("_").lower()


# -- the machine -------------------------------------------------------------------------------------------------------

# Operations that push their argument.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _read_pickle(stream: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """The value that the next pickle of a stream describes, as plain values, `_Box`, `_Name`, `_Storage` and `_View`;
    adds what storages it names to `storages`."""
    length = len(stream.getbuffer())
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if marks and len(stack) <= marks[-1]:
            raise ValueError("its pickle takes more than it gave")
        return stack.pop()

    def pop_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def remember(index: int) -> None:
        if not 0 <= index <= length:
            raise _Refused(f"its pickle asks for {index:,} places of memory")
        memo[index] = stack[-1]

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > _MAX_OPERATIONS:
            raise _Refused(f"its pickle has more than {_MAX_OPERATIONS:,} operations")
        match opcode.name:
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                # As unpicklers have it: on a mark, it takes the mark.
                if marks and len(stack) == marks[-1]:
                    marks.pop()
                else:
                    pop()
            case "POP_MARK":
                pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                remember(argument)
            case "MEMOIZE":
                remember(len(memo))
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(reversed([pop() for _ in range(_TUPLES[name])])))
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(pop_mark())
            case "APPEND":
                value = pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = pop_mark()
                _extend(stack[-1], values)
            case "EMPTY_DICT":
                stack.append(_Dict())
            case "DICT":
                values = pop_mark()
                stack.append(_Dict())
                for key, value in zip(values[::2], values[1::2]):
                    _set(stack[-1], key, value)
            case "SETITEM":
                value, key = pop(), pop()
                _set(stack[-1], key, value)
            case "SETITEMS":
                values = pop_mark()
                for key, value in zip(values[::2], values[1::2]):
                    _set(stack[-1], key, value)
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(_Name(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = pop(), pop()
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise ValueError("its pickle names something by no string")
                stack.append(_Name(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments = pop()
                stack.append(_build(pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = pop(), pop()
                stack.append(_build(pop(), arguments))
            case "INST" | "OBJ":
                pop_mark()
                stack.append(_Box())
            case "BUILD":
                state = pop()
                if isinstance(stack[-1], _Box):
                    stack[-1].state = state
            case "PERSID" | "BINPERSID" as name:
                stack.append(_persistent(pop() if name == "BINPERSID" else argument, storages))
            case name:
                raise _Refused(f"its pickle uses {name}, which no checkpoint needs")
    raise ValueError("its pickle has no end")


# -- the two formats of torch.save -------------------------------------------------------------------------------------


class _ZipArchive:
    """The format since torch 1.6: FOLDER/data.pkl, and FOLDER/data/KEY for each storage, not compressed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._zip = zipfile.ZipFile(file)
        names = _check_members(self._zip, size)
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("a zip file without data.pkl; give a file that torch.save wrote")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._folder + "byteorder" in names and self._read("byteorder", _MAX_PICKLE) != b"little":
            raise _Refused(_BIG_ENDIAN)
        self.value = _read_pickle(io.BytesIO(self._read("data.pkl", _MAX_PICKLE)), {})

    def content(self, storage: _Storage) -> bytes:
        """The bytes of a storage."""
        return self._read(f"data/{storage.key}", storage.nbytes)

    def _read(self, name: str, limit: int) -> bytes:
        if self._zip.getinfo(self._folder + name).file_size > limit:
            raise _Refused(f"{_short(name)} in it has more than {limit:,} bytes")
        return self._zip.read(self._folder + name)


def _check_members(archive: zipfile.ZipFile, size: int) -> set[str]:
    """The names of the members, which are stored as they are and together no larger than the archive."""
    members = archive.infolist()
    names = {member.filename for member in members}
    for member in members:
        if member.filename.startswith("/") or "\\" in member.filename or ".." in member.filename.split("/"):
            raise _Refused(f"its member {_short(member.filename)} leads out of the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _Refused(f"its member {_short(member.filename)} is compressed or encrypted; torch.save does neither")
    if len(names) < len(members) or sum(member.file_size for member in members) > size:
        raise _Refused("its members overlap")
    return names


class _LegacyArchive:
    """The format before torch 1.6: pickles of magic number, protocol, system, value and keys; then, in the order of the
    keys, the count of each storage as int64 and its bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        stream = io.BytesIO(file.read(_MAX_PICKLE))
        storages: dict[str, _Storage] = {}
        try:
            header = [_read_pickle(stream, storages), _read_pickle(stream, storages)]
        except (_Refused, *_BROKEN):
            header = []
        if header != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
            raise _Refused("neither safetensors nor a whole file of torch.save; give such a file, or fetch it again")
        system, self.value, keys = (_read_pickle(stream, storages) for _ in range(3))
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise _Refused(_BIG_ENDIAN)
        self._places: dict[str, int] = {}
        place = stream.tell()
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in storages:
                raise _Refused(f"it stores {_short(key)}, which no tensor of it names")
            file.seek(place)
            (count,) = struct.unpack("<q", file.read(8))
            self._places[key] = place + 8
            place += 8 + storages[key].nbytes
            if count != storages[key].count or place > size:
                raise _Refused(f"the storage {_short(key)} is cut or of another size than its tensors say")

    def content(self, storage: _Storage) -> bytes:
        """The bytes of a storage."""
        self._file.seek(self._places[storage.key])
        return self._file.read(storage.nbytes)


# -- from what a pickle described to tensors ---------------------------------------------------------------------------


def _checkpoint(archive: _ZipArchive | _LegacyArchive, max_bytes: int) -> Checkpoint:
    value, beside, modules = archive.value, {}, {}
    if isinstance(value, dict):
        wrapper = next((key for key in _WRAPPERS if isinstance(value.get(key), (dict, _Box))), None)
        if wrapper is not None:
            beside = {key: item for key, item in value.items() if key != wrapper}
            value = value[wrapper]
    if isinstance(value, _Box):
        value = _unwrapped(value)
        beside |= {key: item for key, item in _table(value.state).items() if key[:1] != "_" and key != "training"}
        state, paths = _module_state(value)
        modules = _module_values(paths)
    elif isinstance(value, dict):
        state = value
    else:
        raise _Refused(f"holds a {_short(value)}, no state dict and no module")
    other = next((key for key, item in state.items() if not isinstance(item, _View)), None)
    if other is not None or not state:
        raise _Refused(f"{_short(other)} in it is no tensor; give a state dict" if state else "holds no tensors")
    if len(state) > _MAX_ENTRIES or max(map(len, state)) > _MAX_KEY:
        raise _Refused(_TOO_MANY)
    attributes = _plain_items(beside)
    views = [item for item in (*state.values(), *attributes.values()) if isinstance(item, _View)]
    if sum(view.nbytes for view in views) > max_bytes:
        raise _Refused(f"its tensors have more than {max_bytes:,} bytes (max_bytes)")
    contents = {storage: _numbers(storage, archive.content(storage)) for storage in {view.storage for view in views}}
    return Checkpoint(
        _without_prefix({key: _tensor(view, contents) for key, view in state.items()}),
        {key: _tensor(item, contents) if isinstance(item, _View) else item for key, item in attributes.items()},
        modules,
    )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _unwrapped(module: _Box) -> _Box:
    """The module inside of DataParallel and its like."""
    for _ in range(4):
        inside = _table(_table(module.state).get("_modules"))
        if set(inside) != {"module"} or not isinstance(inside["module"], _Box):
            break
        module = inside["module"]
    return module


def _module_state(root: _Box) -> tuple[dict[str, Any], dict[_Box, str]]:
    """The state dict of a module, as `torch.nn.Module.state_dict` has it, and the path of it and of each inner module.
    A file can nest one module in itself."""
    state: dict[str, Any] = {}
    paths: dict[_Box, str] = {}
    todo, steps = [("", root)], 0
    while todo:
        prefix, module = todo.pop()
        paths.setdefault(module, prefix.removesuffix("."))
        attributes = _table(module.state)
        passing = attributes.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, (list, tuple)) and len(passing) < 100 else ()
        inner = []
        for table in ("_parameters", "_buffers", "_modules"):
            for name, value in _table(attributes.get(table)).items():
                steps += 1
                if steps > _MAX_ENTRIES or len(prefix) + len(name) > _MAX_KEY:
                    raise _Refused(_TOO_MANY)
                if isinstance(value, _Box) and table == "_modules":
                    inner.append((f"{prefix}{name}.", value))
                elif value is not None and not (table == "_buffers" and name in passing):
                    state[prefix + name] = value
        todo += reversed(inner)
    return state, paths


# What every module has of its own.
_OF_ALL_MODULES = vars(torch.nn.Module()).keys()


def _module_values(paths: dict[_Box, str]) -> dict[str, dict[str, Any]]:
    """See `Checkpoint.modules`."""
    found, entries = {}, 0
    for module, path in paths.items():
        values = {key: item for key, item in _table(module.state).items() if key not in _OF_ALL_MODULES}
        by_module = {
            key: {paths[box]: item for box, item in values.pop(key).by_object if box in paths}
            for key in [*values]
            if isinstance(values[key], _Dict) and values[key].by_object
        }
        views = {key for key, item in values.items() if isinstance(item, _View)}
        plain = _plain_items({key: item for key, item in (values | by_module).items() if key not in views})
        entries += sum(len(item) if isinstance(item, (list, dict)) else 1 for item in plain.values())
        if entries > _MAX_ENTRIES:
            raise _Refused(_TOO_MANY)
        found[path] = plain
    return found


class _NotPlain(Exception):
    pass


def _plain_items(values: dict[str, Any]) -> dict[str, Any]:
    """Those values that are plain or tensors; of a module's attributes the rest are objects, which nobody reads."""
    steps = 0

    def plain(value: Any, depth: int = 0) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MAX_ENTRIES or depth > 8:
            raise _NotPlain
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)) and not isinstance(value, _Name):
            return [plain(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {key: plain(item, depth + 1) for key, item in value.items()}
        raise _NotPlain

    found = {}
    for key, value in values.items():
        with suppress(_NotPlain):
            found[key] = value if isinstance(value, _View) else plain(value)
    return found


def _values(value: Any, depth: int = 0) -> Any:
    """Plain values of what a pickle describes."""
    if depth > 8:
        raise _Refused("it is nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, dict):
        return {key: _values(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, (_Name, _DType)):
        return [_values(item, depth + 1) for item in value]
    if isinstance(value, _Array):
        return _array(value.state)
    raise _Refused(f"holds a {_short(value)}, which is no plain value")


def _array(state: Any) -> np.ndarray[Any, Any]:
    match state:
        case (1, (tuple() | list()) as shape, _DType(code), (False | 0), (str() | bytes()) as content):
            if code not in ("u1", "i1", "i2", "i4", "i8", "f4", "f8"):
                raise _Refused(f"an array has the type {_short(code)}")
            raw = content.encode("latin-1") if isinstance(content, str) else content
            sides, numbers = _counts(shape), np.frombuffer(raw, np.dtype(code).newbyteorder("<"))
            if math.prod(sides) != numbers.size:
                raise _Refused(f"an array of shape {sides} has {numbers.size} numbers; it was altered or cut")
            return numbers.reshape(sides)
    raise _Refused("an array is not described as numpy does")


def _numbers(storage: _Storage, content: bytes) -> Tensor:
    if len(content) != storage.nbytes:
        raise _Refused(f"the storage {_short(storage.key)} is cut or of another size than its tensors say")
    if not content:
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype == torch.bool:  # a byte other than 0 and 1 is no bool that torch could work with
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)


def _tensor(view: _View, contents: dict[_Storage, Tensor]) -> Tensor:
    return contents[view.storage].as_strided(view.size, view.stride, view.offset)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if tensors and all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors
