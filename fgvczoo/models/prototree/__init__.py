"""ProtoTree: a decision tree of prototypes."""

from fgvczoo.models.prototree.module import ProtoTree

__all__ = ["ProtoTree"]
