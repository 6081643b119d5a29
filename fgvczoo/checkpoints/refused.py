"""Why a file is not read."""

from __future__ import annotations

import struct
import zipfile

from safetensors import SafetensorError


class Refused(Exception):
    """Why a file is not read; the end of a sentence that begins with its name."""


# What pickletools, zipfile, struct and safetensors raise for files that are not what they say.
BROKEN = (
    *(ValueError, LookupError, EOFError, OverflowError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile, SafetensorError),
)
