"""fgvczoo: a PyTorch Lightning model zoo for fine-grained visual classification.

    >>> import fgvczoo
    >>> model = fgvczoo.load("st-protopnet-synthbirds")
    >>> model.explain("bird.jpg").save("why.html")

Importing this imports no torch: every name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fgvczoo.errors import FgvczooError as FgvczooError
    from fgvczoo.zoo.build import build_data as build_data
    from fgvczoo.zoo.build import create as create
    from fgvczoo.zoo.export import export as export
    from fgvczoo.zoo.hub import push as push
    from fgvczoo.zoo.load import load as load
    from fgvczoo.zoo.official import from_official as from_official
    from fgvczoo.zoo.recipe import list_recipes as list_recipes
    from fgvczoo.zoo.registry import list_datasets as list_datasets
    from fgvczoo.zoo.registry import list_models as list_models
    from fgvczoo.zoo.weights import save_weights as save_weights

_HOME = {
    "FgvczooError": "fgvczoo.errors",
    "build_data": "fgvczoo.zoo.build",
    "create": "fgvczoo.zoo.build",
    "export": "fgvczoo.zoo.export",
    "from_official": "fgvczoo.zoo.official",
    "list_datasets": "fgvczoo.zoo.registry",
    "list_models": "fgvczoo.zoo.registry",
    "list_recipes": "fgvczoo.zoo.recipe",
    "load": "fgvczoo.zoo.load",
    "push": "fgvczoo.zoo.hub",
    "save_weights": "fgvczoo.zoo.weights",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fgvczoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
