"""DM2: diversified mutual metric learning."""

from fgvczoo.models.dm2.module import DM2

__all__ = ["DM2"]
