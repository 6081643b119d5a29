"""ST-ProtoPNet: support and trivial prototypes."""

from fgvczoo.models.st_protopnet.module import STProtoPNet

__all__ = ["STProtoPNet"]
