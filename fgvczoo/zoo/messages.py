"""One sentence out of a parser's many lines."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

from fgvczoo.errors import did_you_mean
from fgvczoo.zoo.recipe import SECTIONS

_TELLING = re.compile(r"is not accepted|Expected |unrecognized|has no attribute|No module|required|nvalid|not defined")
_NOISE = re.compile(r"Expected a <class 'NoneType'>|Does not validate|^Given value")


def parser_sentence(text: str) -> str:
    """The most deeply nested complaint, the keys that lead to it, and the nearest key where one is misspelt."""
    keys: list[tuple[int, str]] = []
    owners: list[tuple[int, str]] = []
    best: tuple[int, str, str, str] | None = None
    other = ""  # of what a constructor raised, whose words are its own
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not other and line.lstrip().startswith("- ") and not _NOISE.search(line):
            other = line.strip(" -")
        line = line.strip(" -")
        keys = [entry for entry in keys if entry[0] < indent]
        owners = [entry for entry in owners if entry[0] < indent]
        if match := re.match(r'Parser key "(.+)":', line):
            keys.append((indent, match[1]))
        elif match := re.match(r"Problem with given class_path '(.+)':", line):
            owners.append((indent, match[1]))
        elif _TELLING.search(line) and not _NOISE.search(line) and (best is None or indent > best[0]):
            best = (indent, line, ".".join(key for _, key in keys), owners[-1][1] if owners else "")
    if best is None:
        return other or " ".join(text.split())
    _, sentence, where, owner = best
    sentence = (
        sentence.replace("Expected a <class 'float'>", "expected a number").replace("<class '", "").replace("'>", "")
    )
    if match := re.search(r"Option '([^']+)' is not accepted", sentence):
        return f"{where + ': ' if where else ''}no setting {match[1]!r}{did_you_mean(match[1], _known(owner))}"
    if match := re.search(r"required: (\w+)\.(data|model)", sentence):
        return f"{match[1]}: no recipe given; name one, as in `fgvczoo {match[1]} --config st-protopnet-synthbirds`"
    if match := re.search(r"unrecognized arguments: --([\w.]+)", sentence):
        return f"no option --{match[1]}{did_you_mean(match[1], _options())}"
    return f"{where}: {sentence}" if where else sentence


def _known(owner: str) -> list[str]:
    """The arguments of a class by its path; the sections of a recipe where there is none."""
    module, _, name = owner.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return [*SECTIONS, "run", "weights", "ckpt_path"]


def _options() -> list[str]:
    from lightning.pytorch import Trainer

    trainer = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
    return [*trainer, "config", "run", "weights", "ckpt_path", "seed_everything", "data.root", "data.batch_size"]
