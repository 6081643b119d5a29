"""The plain classifier that other methods are compared with."""

from fgvczoo.models.linear.module import LinearClassifier

__all__ = ["LinearClassifier"]
