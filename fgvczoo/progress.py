"""A bar for long work outside of Lightning's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(items: Iterable[T], title: str, *, show: bool = True) -> Iterable[T]:
    """The items, with a bar on stderr while they are taken; without one where stderr is no terminal."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not (show and console.is_terminal))
