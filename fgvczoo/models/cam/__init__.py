"""CAM and Grad-CAM: the baseline of localisation."""

from fgvczoo.models.cam.module import CAM

__all__ = ["CAM"]
