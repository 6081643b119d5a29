"""The one error type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FgvczooError(Exception):
    """A user's mistake: the message is one line that says what was given, what was expected, what to do.

    The command line prints it on stderr without a traceback and exits with status 2.
    """


def did_you_mean(given: str, known: Iterable[str], *, most: int = 3) -> str:
    """The names in `known` nearest to `given`, as a clause that ends a message; empty when nothing is near."""
    near = difflib.get_close_matches(given, list(known), n=most, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
