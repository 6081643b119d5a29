"""Autocast and the ops, which see to their types themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def half_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast gives matrix products on this device; None where it is off."""
    # By name: torch 2.11 cannot trace `torch.amp.is_autocast_available`, and other devices raise when asked.
    if device.type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if half_type(device) else nullcontext()
