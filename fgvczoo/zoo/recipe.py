"""Recipes: one YAML file for each paper, data set and trunk, with the card that says what it is."""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from fgvczoo.errors import FgvczooError, did_you_mean

SECTIONS = ("card", "model", "data", "trainer", "seed_everything")
# What config.yaml of a run holds beside them.
_OPTIONS = ("run", "weights")
# Packages whose classes a recipe may name: naming a class imports its module. FGVCZOO_ALLOW adds others.
PACKAGES = ("fgvczoo", "lightning")
# Recipes are a few kilobytes. References (&, *) can make a small file describe a huge value.
_MAX_BYTES, _MAX_VALUES = 2**17, 20_000


@dataclass
class Published:
    """A number that the paper or its authors state. value: in the metric's own unit, None where none is confirmed."""

    metric: str
    value: float | None
    source: str
    note: str = ""


@dataclass
class Weights:
    """Where trained weights are and what they must hash to.

    source: "package" (in fgvczoo itself) or a Hub repository id. revision: a commit of that repository.
    sha256: of config.json, which holds those of the other files.
    """

    source: str
    sha256: str
    revision: str | None = None


@dataclass
class Licences:
    """Under what terms the authors' code, the weights that the recipe trains and the data may be used.

    redistributable: whether such weights may be passed on; None where only who trains them can say so.
    """

    code: str
    weights: str
    data: str
    redistributable: bool | None = None


@dataclass
class Card:
    """What a recipe is.

    paper: the model's name in the registry. title: one line. task: kind of work. num_classes: of the data it is for.
    dataset: the data set's name in the registry. licences, published, weights: see there; weights is None while none
    are published. baseline: the recipe that the comparison table sets it against. notes: where it departs from the
    paper.
    """

    paper: str
    title: str
    task: str
    dataset: str
    num_classes: int
    licences: Licences
    published: list[Published] = field(default_factory=list)
    weights: Weights | None = None
    baseline: str | None = None
    notes: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read: name (of the file, without ending), file, card, and all sections as plain values."""

    name: str
    path: Path
    card: Card
    config: dict[str, Any]


def recipe_folder() -> Path:
    """Where the recipes of the package lie."""
    return Path(str(resources.files("fgvczoo") / "recipes"))


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of the package's recipes that match a glob, sorted."""
    return sorted(fnmatch.filter((path.stem for path in recipe_folder().glob("*.yaml")), pattern))


def resolve_recipe(name: str | Path) -> Path:
    """The file of a recipe: a name of the package, or a path.

    Raises `FgvczooError` with the nearest names when there is none.
    """
    text = str(name)
    inside = recipe_folder() / f"{text}.yaml"
    if "/" not in text and "\\" not in text and inside.is_file():
        return inside
    path = Path(text)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise FgvczooError(f"recipe file {text}: not found; `fgvczoo recipe NAME > mine.yaml` writes one to start from")
    if len(path.parts) > 1:
        raise FgvczooError(f"{text}: not found; give a recipe's name or file, the folder of a run or of weights")
    raise FgvczooError(f"no recipe {text!r}{did_you_mean(text, list_recipes())} `fgvczoo list` shows all")


def read_recipe(name: str | Path) -> Recipe:
    """Reads and checks a recipe's sections and card; model and data are checked when they are built."""
    path = resolve_recipe(name)
    config = read_sections(path)
    for key in ("card", "model", "data"):
        if not isinstance(config.get(key), dict):
            raise FgvczooError(f"recipe {path.name}: the section {key!r} is missing")
    for key in ("model", "data"):
        if "class_path" not in config[key] or not isinstance(config[key].get("init_args", {}), dict | None):
            raise FgvczooError(f"recipe {path.name}: the section {key!r} is no class_path with init_args")
    card: Card = _build(Card, config["card"], f"recipe {path.name}: card")
    return Recipe(path.stem, path, card, config)


def allowed_packages() -> list[str]:
    """Packages whose classes a recipe may name: `PACKAGES` and those in FGVCZOO_ALLOW, separated by commas."""
    own = os.environ.get("FGVCZOO_ALLOW", "")
    return [*PACKAGES, *(name.strip() for name in own.split(",") if name.strip())]


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a recipe file, or of a run's config.yaml, as plain values; unknown ones are errors, and so are
    class paths outside of `allowed_packages`."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise FgvczooError(
                f"recipe {path.name}: {path.stat().st_size:,} bytes; a recipe has at most {_MAX_BYTES:,}"
            )
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FgvczooError(f"recipe {path.name}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FgvczooError(f"recipe {path.name}: not valid YAML ({reason})") from None
    _check_values(config, path.name)
    if not isinstance(config, dict):
        raise FgvczooError(f"recipe {path.name}: expected the sections {', '.join(SECTIONS)}")
    for key in config:
        if key not in (*SECTIONS, *_OPTIONS):
            expected = ", ".join(SECTIONS)
            raise FgvczooError(
                f"recipe {path.name}: no section {key!r}; expected {expected}{did_you_mean(str(key), SECTIONS)}"
            )
    return config


def _check_values(config: Any, name: str) -> None:
    """Refuses values that grow beyond bounds when references are followed, and class paths of other packages."""
    packages = allowed_packages()
    todo, seen = [("", config)], 0
    while todo:
        key, value = todo.pop()
        seen += 1
        if seen + len(todo) > _MAX_VALUES:
            raise FgvczooError(f"recipe {name}: more than {_MAX_VALUES:,} values; a recipe is a page of settings")
        if key == "class_path" and (not isinstance(value, str) or value.partition(".")[0] not in packages):
            raise FgvczooError(
                f"recipe {name}: class_path {str(value)[:80]!r} is outside of {', '.join(packages)}; to run code of "
                f"another package, set FGVCZOO_ALLOW={str(value).partition('.')[0][:40]}"
            )
        if isinstance(value, dict):
            todo += [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            todo += [("", item) for item in value]


# The card's settings that are dataclasses of their own.
_NESTED: dict[str, type] = {"licences": Licences, "weights": Weights, "published": Published}


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass from plain values; unknown and missing keys are errors that name the nearest key."""
    if not isinstance(values, dict):
        raise FgvczooError(f"{where}: expected settings, got {values!r}")
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise FgvczooError(f"{where}: no setting {key!r}{did_you_mean(str(key), known)}")
    built = {}
    for key, value in values.items():
        nested = _NESTED.get(key) if kind is Card else None
        if nested is None or value is None:
            built[key] = value
        elif isinstance(value, list):
            built[key] = [_build(nested, item, f"{where}.{key}") for item in value]
        else:
            built[key] = _build(nested, value, f"{where}.{key}")
    try:
        made = kind(**built)
    except TypeError as error:
        raise FgvczooError(f"{where}: {error}".replace("__init__() ", "")) from None
    for key, hint in get_type_hints(kind).items():
        kinds = get_args(hint) or (hint,)
        value = getattr(made, key)
        if key not in _NESTED and not isinstance(value, (*kinds, *((int,) if float in kinds else ()))):
            expected = " or ".join(known_type.__name__.replace("NoneType", "null") for known_type in kinds)
            raise FgvczooError(f"{where}: {key} is {str(value)[:80]!r}; expected {expected}")
    return made
