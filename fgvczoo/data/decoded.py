"""Decoded pictures in a folder: what is read a second time costs a file, not a decoder."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import warnings
from hashlib import blake2b
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch

from fgvczoo.errors import FgvczooError, FgvczooWarning
from fgvczoo.files import atomic_path
from fgvczoo.preprocess import MAX_PIXELS, read_image

# All that pixels rest on beside the picture; the number goes up when `read_image` makes others of one.
_DECODER = f"1 {cv2.__version__} {PIL.__version__}"
# A file: what it was made from, height, width; then the pixels, row by row.
_HEADER = struct.Struct("<24sII")
_SPARE = 1 << 30  # bytes of the disk that are left to others, a run's checkpoints among them


class Decoded:
    """The pictures of a folder of decoded ones, which are those of `read_image` to the bit.

    A file holds one picture, 3 H W bytes and 32, by the resolved path of its source, or by the content of encoded
    bytes. It counts while size and time of change of its source are what they were, and the versions of the decoders;
    else, and where it is damaged, it is written anew. Files appear whole, so that any number of processes and runs
    share the folder. Nothing is ever removed: delete the folder when it has served.

    Where nothing can be written (a full disk, which is one with less than a gibibyte left, or a folder of somebody
    else's), a warning says so once, at the start or by the process that meets it, and other pictures are decoded every
    time.

    Args:
        folder: made where it is missing; `FgvczooError` where it cannot be. As trusted as the pictures themselves.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FgvczooError(f"decoded={folder}: cannot be made ({error.strerror}); give a folder that can") from None
        self._closed = torch.zeros((), dtype=torch.bool).share_memory_()  # to writing; workers see it, too
        try:
            self._check_room(0)
        except OSError as error:
            self._close(error)

    def read(self, source: Path | bytes, name: str) -> np.ndarray:
        """`read_image(source, name)`, out of the folder where it is there; else it is there afterwards."""
        try:
            file, stamp = self._entry(source)
        except OSError:  # there is no such picture, and `read_image` has the words for it
            return read_image(source, name)
        if (pixels := _load(file, stamp)) is None:
            pixels = read_image(source, name)
            self._save(file, stamp, pixels)
        return pixels

    def _entry(self, source: Path | bytes) -> tuple[Path, bytes]:
        """The file of a picture, and what tells whether it is of the picture as it is now."""
        if isinstance(source, bytes):
            identity, state = source, ""
        else:
            identity, status = os.fsencode(os.path.realpath(source)), source.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        name = blake2b(identity, digest_size=16).hexdigest()
        return self.folder / name[:2] / name, blake2b(f"{_DECODER} {state}".encode(), digest_size=24).digest()

    def _save(self, file: Path, stamp: bytes, pixels: np.ndarray) -> None:
        if self._closed:
            return
        try:
            self._check_room(pixels.nbytes)
            with atomic_path(file) as temporary:
                temporary.write_bytes(_HEADER.pack(stamp, *pixels.shape[:2]) + pixels.tobytes())
        except OSError as error:
            self._close(error)

    def _check_room(self, size: int) -> None:
        if not os.access(self.folder, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if shutil.disk_usage(self.folder).free < _SPARE + size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _close(self, error: OSError) -> None:
        self._closed.fill_(True)
        what = f"decoded={self.folder}: cannot be written ({error.strerror})"
        warnings.warn(f"{what}; pictures that it lacks are decoded every time", FgvczooWarning, stacklevel=2)


def _load(file: Path, stamp: bytes) -> np.ndarray | None:
    """The pixels of a file, read at once: mapped into memory its pages would come one by one, four times as slowly, and
    a file that somebody cuts meanwhile would end the process. None where it is not whole, or not of this stamp."""
    try:
        with file.open("rb", buffering=0) as opened:
            found, height, width = _HEADER.unpack(opened.read(_HEADER.size))
            size = os.fstat(opened.fileno()).st_size - _HEADER.size
            if found != stamp or not 0 < height * width <= MAX_PIXELS or size != 3 * height * width:
                return None
            pixels = np.empty((height, width, 3), np.uint8)
            return pixels if opened.readinto(pixels) == size else None  # type: ignore[arg-type]
    except (OSError, struct.error):
        return None
