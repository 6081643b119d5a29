"""The two formats of torch.save: where the pickle stands, and the bytes of each storage."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import BinaryIO

from fgvczoo.checkpoints.description import Storage, short
from fgvczoo.checkpoints.machine import described
from fgvczoo.checkpoints.refused import BROKEN, Refused

_MAX_PICKLE = 16 * 2**20
# What the first two pickles of the format before torch 1.6 hold.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_BIG_ENDIAN = "it was written on a big-endian machine; load and save it on another one"


class ZipArchive:
    """The format since torch 1.6: FOLDER/data.pkl, and FOLDER/data/KEY for each storage, not compressed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._zip = zipfile.ZipFile(file)
        names = check_members(self._zip, size)
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("a zip file without data.pkl; give a file that torch.save wrote")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._folder + "byteorder" in names and self._read("byteorder", _MAX_PICKLE) != b"little":
            raise Refused(_BIG_ENDIAN)
        self.value = described(io.BytesIO(self._read("data.pkl", _MAX_PICKLE)), {})

    def content(self, storage: Storage) -> bytes:
        """The bytes of a storage."""
        return self._read(f"data/{storage.key}", storage.nbytes)

    def _read(self, name: str, limit: int) -> bytes:
        if self._zip.getinfo(self._folder + name).file_size > limit:
            raise Refused(f"{short(name)} in it has more than {limit:,} bytes")
        return self._zip.read(self._folder + name)


def check_members(archive: zipfile.ZipFile, size: int) -> set[str]:
    """The names of the members, which are stored as they are and together no larger than the archive."""
    members = archive.infolist()
    names = {member.filename for member in members}
    for member in members:
        if member.filename.startswith("/") or "\\" in member.filename or ".." in member.filename.split("/"):
            raise Refused(f"its member {short(member.filename)} leads out of the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise Refused(f"its member {short(member.filename)} is compressed or encrypted; torch.save does neither")
    if len(names) < len(members) or sum(member.file_size for member in members) > size:
        raise Refused("its members overlap")
    return names


class LegacyArchive:
    """The format before torch 1.6: pickles of magic number, protocol, system, value and keys; then, in the order of the
    keys, the count of each storage as int64 and its bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        stream = io.BytesIO(file.read(_MAX_PICKLE))
        storages: dict[str, Storage] = {}
        try:
            header = [described(stream, storages), described(stream, storages)]
        except (Refused, *BROKEN):
            header = []
        if header != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
            raise Refused("neither safetensors nor a whole file of torch.save; give such a file, or fetch it again")
        system, self.value, keys = (described(stream, storages) for _ in range(3))
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise Refused(_BIG_ENDIAN)
        self._places: dict[str, int] = {}
        place = stream.tell()
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in storages:
                raise Refused(f"it stores {short(key)}, which no tensor of it names")
            file.seek(place)
            (count,) = struct.unpack("<q", file.read(8))
            self._places[key] = place + 8
            place += 8 + storages[key].nbytes
            if count != storages[key].count or place > size:
                raise Refused(f"the storage {short(key)} is cut or of another size than its tensors say")

    def content(self, storage: Storage) -> bytes:
        """The bytes of a storage."""
        self._file.seek(self._places[storage.key])
        return self._file.read(storage.nbytes)
