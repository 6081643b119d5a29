"""Completion of words in a shell, by argcomplete: `eval "$(fgvczoo completion bash)"`. Imports nothing heavy."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import argcomplete
import yaml

from fgvczoo.cli.commands import build_parser
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo.recipe import list_recipes, resolve_recipe
from fgvczoo.zoo.registry import list_datasets, list_models

# Of what argparse knows nothing: fit, validate and test are parsed by Lightning, which takes seconds to import.
TRAINING = ("fit", "validate", "test")


def shell_code(shell: str) -> str:
    """What the shell is to evaluate."""
    return str(argcomplete.shellcode(["fgvczoo"], shell=shell))


def complete() -> None:
    """Answers the shell that asks (`_ARGCOMPLETE` is set) and ends the process."""
    parser = build_parser()
    commands = _subcommands(parser)
    for name in TRAINING:
        _training_options(commands.add_parser(name))
    for command in commands.choices.values():
        _add_completers(command, _COMPLETERS)
    for command in _subcommands(commands.choices["data"]).choices.values():
        _add_completers(command, {"name": _COMPLETERS["data"]})
    argcomplete.autocomplete(parser)


def _subcommands(parser: argparse.ArgumentParser) -> Any:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _add_completers(parser: argparse.ArgumentParser, completers: dict[str, Callable[..., list[str]]]) -> None:
    for action in parser._actions:
        if (completer := completers.get(action.dest)) is not None:
            action.completer = completer  # type: ignore[attr-defined]


def _training_options(parser: argparse.ArgumentParser) -> None:
    for option in ("--config", "--run", "--weights", "--ckpt_path", "--seed_everything", "--data", "--data.root"):
        parser.add_argument(option, dest=option.removeprefix("--"))
    for option in _recipe_options():
        if option not in parser._option_string_actions:
            parser.add_argument(option)


def _recipe_options() -> Iterable[str]:
    """--model.KEY, --data.KEY, --trainer.KEY for the settings of the recipe on the line."""
    words = _words()
    name = next((after for before, after in itertools.pairwise(words) if before == "--config"), None)
    try:
        config = yaml.safe_load(resolve_recipe(name).read_text(encoding="utf-8")) if name else {}
    except (FgvczooError, OSError, yaml.YAMLError):
        return []
    sections = ((section, config.get(section) or {}) for section in ("model", "data", "trainer"))
    return [f"--{section}.{key}" for section, values in sections for key in values.get("init_args", values)]


def _words() -> list[str]:
    line = os.environ.get("COMP_LINE", "")
    try:
        return shlex.split(line)
    except ValueError:  # within quotes
        return line.split()


def _recipes(prefix: str, **_: Any) -> list[str]:
    return [*list_recipes(), *(str(path) for path in Path().glob("*.yaml"))]


def _names(prefix: str, **_: Any) -> list[str]:
    return [*list_recipes(), *(str(path) for path in Path("runs").glob("*") if path.is_dir())]


_COMPLETERS: dict[str, Callable[..., list[str]]] = {
    "config": _recipes,
    "pattern": _recipes,
    "name": _names,
    "weights": lambda prefix, **_: [str(path) for path in Path("runs").glob("*") if path.is_dir()],
    "ckpt_path": lambda prefix, **_: ["last"],
    "data": lambda prefix, **_: list_datasets(),
    "paper": lambda prefix, **_: list_models(),
}
