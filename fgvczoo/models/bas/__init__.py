"""BAS, Background Activation Suppression (IJCV 2023; CVPR 2022)."""

from fgvczoo.models.bas.module import BAS
from fgvczoo.models.bas.segmentation import BASSegmentation

__all__ = ["BAS", "BASSegmentation"]
