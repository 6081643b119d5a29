"""From a recipe to a module and a data module, by the same parser that the command line uses."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning import LightningDataModule

from fgvczoo.errors import FgvczooError
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.messages import parser_sentence
from fgvczoo.zoo.recipe import Recipe, read_recipe
from fgvczoo.zoo.registry import DATASETS, model_class


def user_error(error: BaseException) -> FgvczooError | None:
    """The error of ours that lies behind one of a parser, a trainer or a worker; None if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FgvczooError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def build_data(recipe: Recipe | str, **overrides: Any) -> LightningDataModule:
    """The recipe's data module; `overrides` replace its arguments (root=..., batch_size=...)."""
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    section = _section(recipe, "data")
    data: LightningDataModule = _instantiate(
        LightningDataModule, {**section, "init_args": {**section["init_args"], **overrides}}, recipe.name
    )
    return data


def build_model(recipe: Recipe | str, **overrides: Any) -> StagedModule:
    """The recipe's module with random weights, built without data: number of classes and preprocessing are the card's
    and the data section's; `overrides` replace its arguments."""
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    section = _section(recipe, "model")
    from_data = {
        "num_classes": recipe.card.num_classes,
        "preprocess": _section(recipe, "data")["init_args"].get("preprocess"),
    }
    arguments = {**section["init_args"], **from_data, **overrides}
    model: StagedModule = _instantiate(StagedModule, {**section, "init_args": arguments}, recipe.name)
    return model


def create(paper: str, **arguments: Any) -> StagedModule:
    """A paper's module by its name, with random weights: create("st-protopnet", num_classes=200, backbone="resnet50").

    Raises `FgvczooError` for an unknown paper or argument.
    """
    cls = model_class(paper)
    section = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
    model: StagedModule = _instantiate(StagedModule, section, paper)
    return model


def data_from_provenance(model: StagedModule, root: Any = None, **overrides: Any) -> Any:
    """The data module that a loaded model was trained with, over the data in `root` (None: where that data set lies by
    itself; for one of the Hub, its repository or a local copy); `overrides` replace its arguments."""
    section = model.provenance.get("data") if model.provenance else None
    if section is None:
        raise FgvczooError("these weights do not say what data they were trained with; leave out --data_root")
    if not isinstance(section, dict) or section.get("class_path") not in DATASETS.values():
        raise FgvczooError(f"these weights name {str(section)[:80]} as their data, which is no data set of fgvczoo")
    # Where files are written is never said by weights, which may be a stranger's.
    arguments = {**(section.get("init_args") or {}), "decoded": None, **overrides}
    if root is not None and str(root) != arguments.get("repo"):
        arguments |= {"root": str(root)} | ({"repo": None} if "repo" in arguments else {})
    return _instantiate(LightningDataModule, {"class_path": section["class_path"], "init_args": arguments}, "data")


def _section(recipe: Recipe, name: str) -> dict[str, Any]:
    section = recipe.config[name]
    return {"class_path": section["class_path"], "init_args": dict(section.get("init_args") or {})}


def _instantiate(base: type, section: dict[str, Any], where: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "it", fail_untyped=False)
    try:
        config = parser.parse_object({"it": section})
        return parser.instantiate_classes(config).it
    except (ArgumentError, ValueError, TypeError) as error:
        raise user_error(error) or FgvczooError(f"{where}: {parser_sentence(str(error))}") from error
