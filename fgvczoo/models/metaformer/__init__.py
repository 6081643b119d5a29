"""MetaFormer: where and when as evidence."""

from fgvczoo.models.metaformer.module import MetaFormer

__all__ = ["MetaFormer"]
