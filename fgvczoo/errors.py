"""The one error type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FgvczooError(Exception):
    """A user's mistake: the message is one line that says what was given, what was expected, what to do.

    The command line prints it on stderr without a traceback and exits with status 2. Messages quote names that a
    stranger chose: what is not printable (line ends, terminal commands) is escaped, and a long one is cut.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught ") and "Traceback (most recent call last)" in message:
            # A loader's worker failed: torch makes the error anew, of the traceback as text, which ends in the message.
            message = re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])
        super().__init__(printable(message))


class FgvczooWarning(UserWarning):
    """Something that a user should know and that stops nothing; the command line prints it as one line."""


_LONGEST = 1500


def printable(text: str) -> str:
    """Text on one line, its other characters escaped as Python does; cut after 1500 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def did_you_mean(given: str, known: Iterable[str], *, most: int = 3) -> str:
    """The names in `known` nearest to `given`, as a clause that ends a message; empty when nothing is near."""
    near = difflib.get_close_matches(given, list(known), n=most, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
