"""Lists of gigabytes, read once into an Arrow file of the cache that processes map into memory and share."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from fgvczoo.errors import FgvczooError
from fgvczoo.files import atomic_path, cache_folder


def cached_table(kind: str, version: int, sources: Sequence[Path], make: Callable[[], pa.Table]) -> pa.Table:
    """What `make` gives, mapped from the cache; made when it is not there, or when one of `sources` is another file.

    A column is one chunk, whose numbers numpy reads without a copy. Of several processes one makes it.

    kind: a folder of the cache. version: of what `make` gives. `FgvczooError` where a source is missing, or the cache
    cannot be written.
    """
    stamps = [[str(file.resolve()), *_stamp(file)] for file in sources]
    source = json.dumps([version, stamps]).encode()
    name = hashlib.blake2b(json.dumps([path for path, *_ in stamps]).encode(), digest_size=8).hexdigest()
    file = cache_folder() / kind / f"{name}.arrow"
    if (table := _mapped(file, source)) is not None:
        return table
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if (table := _mapped(file, source)) is None:
                made = make().combine_chunks()
                made = made.replace_schema_metadata({**(made.schema.metadata or {}), b"source": source})
                with atomic_path(file) as temporary, pa.ipc.new_file(str(temporary), made.schema) as writer:
                    writer.write_table(made)
                table = _mapped(file, source)
    except OSError as error:
        raise FgvczooError(f"{file}: cannot be written ({error}); set FGVCZOO_CACHE to a folder that can") from None
    assert table is not None  # just written
    return table


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        raise FgvczooError(f"{file} is missing; unpack the archive again") from None
    return status.st_size, status.st_mtime_ns


def _mapped(file: Path, source: bytes) -> pa.Table | None:
    """The cached table; None where there is none of these sources."""
    try:
        mapped = pa.memory_map(str(file))
        table = pa.ipc.open_file(mapped).read_all()
        if table.schema.metadata[b"source"] != source:
            return None
        # One pass over all pages: a disk reads them in order now, not at random for each worker, and the pages of
        # workers are those of this process.
        mapped.seek(0)
        np.frombuffer(mapped.read_buffer(), np.uint8)[:: mmap.PAGESIZE].max(initial=0)
        return table
    except (OSError, pa.ArrowException, KeyError, TypeError):
        return None
