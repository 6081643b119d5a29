"""ProtoPNet: this looks like that."""

from fgvczoo.models.protopnet.module import ProtoPNet

__all__ = ["ProtoPNet"]
