"""BAS, Background Activation Suppression (IJCV 2023; CVPR 2022)."""

from fgvczoo.models.bas.module import BAS

__all__ = ["BAS"]
