"""The command line. Importing this imports nothing heavy: `fgvczoo list` and `--help` answer at once."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from fgvczoo.errors import FgvczooError, FgvczooWarning, printable

TRAINING = ("fit", "validate", "test")
INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 (a check failed, or our fault), 2 (the user's mistake), 130 (Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a line could go on
        from fgvczoo.cli.completion import complete

        complete()
    debug = os.environ.get("FGVCZOO_DEBUG") == "1"
    try:
        with warnings.catch_warnings():
            _show_warnings_on_one_line()
            return _run(args, from_shell=argv is None)
    except KeyboardInterrupt:
        print("fgvczoo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `fgvczoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, status = explain_error(error)
        print(f"fgvczoo: {message}", file=sys.stderr)
        return status


def _run(args: list[str], from_shell: bool) -> int:
    if args and args[0] in TRAINING:
        return _train(args, from_shell)
    from fgvczoo.cli.commands import run

    return run(args)


def _show_warnings_on_one_line() -> None:
    """Those of ours; until `warnings.catch_warnings` ends."""
    show = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, FgvczooWarning):
            print(f"fgvczoo: {printable(str(message))}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    warnings.showwarning = one_line


def _train(args: list[str], from_shell: bool) -> int:
    # Lightning starts further processes with the shell's own arguments and warns when it is given others beside them.
    given = None if from_shell else args
    if not {"-h", "--help"}.isdisjoint(args):
        from fgvczoo.cli.train import ZooCLI

        try:
            ZooCLI(given)
        except SystemExit as end:
            return int(end.code or 0)
    from fgvczoo.cli.run import RunInterrupted
    from fgvczoo.cli.train import ZooCLI

    _quiet()  # after the imports, which set the levels
    try:
        ZooCLI(given)
    except RunInterrupted as stop:
        print(f"fgvczoo: {stop}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _quiet() -> None:
    """Silences Lightning's chatter and advertising; errors and our own lines remain."""
    import logging

    if os.environ.get("FGVCZOO_DEBUG") != "1":
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", module=r"torchmetrics\..*")
        warnings.filterwarnings("default", category=FgvczooWarning)  # also where Lightning's frames are the nearest


def explain_error(error: BaseException) -> tuple[str, int]:
    """One line and an exit status for any exception."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FgvczooError):
            return _one_line(str(seen)), 2
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if "FgvczooError: " in text:  # raised in a loader's worker: its traceback arrives as text
        return _one_line(text.rsplit("FgvczooError: ", 1)[1].splitlines()[0]), 2
    if type(error).__name__ == "MisconfigurationException":  # Lightning's word for a user's mistake
        return _one_line(text), 2
    if type(error).__name__ in ("ArgumentError", "NSKeyError", "ParserError") or _from_parser(error):
        return parser_error(text), 2
    return f"internal error: {type(error).__name__}: {_one_line(text)} (FGVCZOO_DEBUG=1 shows where)", 1


def _from_parser(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "jsonargparse" in trace.tb_frame.f_code.co_filename


def parser_error(text: str) -> str:
    """The innermost sentence of a parser's message, with the nearest known name where one is misspelt."""
    from fgvczoo.zoo.messages import parser_sentence

    return parser_sentence(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
