"""`load`: from a recipe's name, a folder or a Hub repository to a model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fgvczoo.checkpoints import check_archive, read_tensors
from fgvczoo.errors import FgvczooError
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.build import build_model
from fgvczoo.zoo.recipe import Recipe, Weights, read_recipe
from fgvczoo.zoo.weights import load_tensors, load_weights, weights_folder

PUBLISHED = "published"


def load(name: str | Path, weights: str | Path | None = PUBLISHED, *, revision: str | None = None) -> StagedModule:
    """A model, in eval mode.

    name: a recipe ("st-protopnet-synthbirds"), the folder of weights or of a run that `fgvczoo fit` wrote, or a
        repository of the Hub ("owner/name", "owner/name@revision").
    weights: "published" (what the recipe's card names), or of the recipe's model: a folder or repository as above, a
        checkpoint of a run (.ckpt), a file of its tensors (.safetensors, .pth), or None for random weights.
    revision: branch, tag or commit of a Hub repository.

    Files are checked; nothing in them is executed. Published weights and Hub repositories are downloaded once, into
    the cache of `huggingface_hub`, whose settings (HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME, HF_TOKEN) hold.

    Raises `FgvczooError` for an unknown name, where no weights are published, and for weights that do not fit.
    """
    given = name if weights == PUBLISHED else weights
    if given is not None and (folder := locate(given, revision)) is not None:
        model = load_weights(folder)
        return model if weights == PUBLISHED else _of_paper(model, read_recipe(name), weights)
    if revision is not None:
        raise FgvczooError(f"revision={revision!r} is of a Hub repository (owner/name), and {given} is none")
    recipe = read_recipe(name)
    if weights is None:
        return build_model(recipe).eval()
    if weights == PUBLISHED:
        if recipe.card.weights is None:
            raise FgvczooError(no_weights(recipe))
        return load_weights(published(recipe, recipe.card.weights), sha256=recipe.card.weights.sha256)
    return _load_file(recipe, Path(weights))


def locate(given: str | Path, revision: str | None = None) -> Path | None:
    """The weights folder of a folder, a run or a Hub repository, which is fetched; None for what is none of them."""
    if Path(given).is_dir():
        return weights_folder(Path(given))
    from fgvczoo.zoo.hub import Repo, fetch, parse_repo

    repo = parse_repo(str(given)) if isinstance(given, str) else None
    if repo is None:
        return None
    if revision is not None and repo.revision is not None:
        raise FgvczooError(f"{repo} names a revision, and revision={revision!r} is given as well; give one")
    return fetch(Repo(repo.id, revision or repo.revision))


def _of_paper(model: StagedModule, recipe: Recipe, weights: Any) -> StagedModule:
    if model.paper != recipe.card.paper:
        raise FgvczooError(
            f"weights={weights}: they are of {model.paper}, the recipe {recipe.name} is {recipe.card.paper}"
        )
    return model


def _load_file(recipe: Recipe, path: Path) -> StagedModule:
    """The recipe's model with the tensors of a file."""
    if not path.is_file():
        raise FgvczooError(f"weights={path}: no such file or folder; give a run, a weights folder or a checkpoint")
    if path.suffix != ".ckpt":
        model = build_model(recipe)
        load_tensors(model, read_tensors(path), str(path))
        return model.eval()
    checkpoint = read_run_checkpoint(path)
    own = checkpoint.get("fgvczoo")
    if not isinstance(own, dict) or own.get("paper") != recipe.card.paper:
        found = own.get("paper") if isinstance(own, dict) else "not written by fgvczoo"
        raise FgvczooError(f"weights={path}: it is of {found}, the recipe {recipe.name} is {recipe.card.paper}")
    model = build_model(recipe, num_classes=own["num_classes"], class_names=own["classes"])
    model.restore_state_values(own["state"])
    load_tensors(model, checkpoint["state_dict"], str(path))
    return model.eval()


def read_run_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run (.ckpt), its tensors mapped and not read. Raises `FgvczooError` for what is not whole."""
    check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises whatever its unpickler does
        checkpoint = None
    if not isinstance(checkpoint, dict):
        raise FgvczooError(f"{path}: not a whole checkpoint; give a .ckpt that `fgvczoo fit` wrote")
    return checkpoint


def published(recipe: Recipe, weights: Weights) -> Path:
    """The local folder of published weights: in the package, or in the cache, downloaded where it is not there."""
    if weights.source == "package":
        return Path(str(resources.files("fgvczoo") / "recipes" / "weights" / recipe.name))
    from fgvczoo.zoo.hub import Repo, fetch

    return fetch(Repo(weights.source, weights.revision), sha256=weights.sha256)


def no_weights(recipe: Recipe) -> str:
    """What to do where a recipe has no published weights."""
    return (
        f"{recipe.name}: no weights are published; train them (`fgvczoo fit --config {recipe.name}`), pass weights=, a "
        "run, a folder or a Hub repository, or import the authors' checkpoint (`fgvczoo import`); weights=None gives "
        "the untrained architecture"
    )
