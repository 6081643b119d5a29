"""`load`: from a recipe's name, a folder or a Hub repository to a model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fgvczoo.errors import FgvczooError
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.build import build_model
from fgvczoo.zoo.recipe import Recipe, Weights, read_recipe
from fgvczoo.zoo.weights import CONFIG, load_weights

PUBLISHED = "published"


def load(name: str | Path, weights: str | Path | None = PUBLISHED) -> StagedModule:
    """A model, in eval mode.

    name: a recipe ("st-protopnet-synthbirds"), or the folder of weights or of a run that `fgvczoo fit` wrote.
    weights: "published" (what the recipe's card names), a weights folder, or None for random weights.

    Raises `FgvczooError` for an unknown name and where no weights are published.
    """
    folder = Path(name)
    if weights == PUBLISHED and folder.is_dir():
        return load_weights(weights_folder(folder))
    recipe = read_recipe(name)
    if weights is None:
        return build_model(recipe).eval()
    if weights == PUBLISHED:
        if recipe.card.weights is None:
            raise FgvczooError(no_weights(recipe))
        return load_weights(fetch(recipe, recipe.card.weights), sha256=recipe.card.weights.sha256)
    model = load_weights(weights_folder(Path(weights)))
    if model.paper != recipe.card.paper:
        raise FgvczooError(
            f"weights={weights}: they are of {model.paper}, the recipe {recipe.name} is {recipe.card.paper}"
        )
    return model


def weights_folder(folder: Path) -> Path:
    """The weights of a run folder, or the folder itself."""
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "weights" / CONFIG).is_file():
        return folder / "weights"
    raise FgvczooError(f"{folder}: no weights in it; an unfinished run is resumed with `fgvczoo fit --ckpt_path last`")


def fetch(recipe: Recipe, weights: Weights) -> Path:
    """The local folder of published weights."""
    if weights.source != "package":
        raise FgvczooError(no_weights(recipe))
    return Path(str(resources.files("fgvczoo") / "recipes" / "weights" / recipe.name))


def no_weights(recipe: Recipe) -> str:
    """What to do where a recipe has no published weights."""
    return (
        f"{recipe.name}: no weights are published; train them (`fgvczoo fit --config {recipe.name}`), pass "
        "weights=FOLDER of a run, or weights=None for the untrained architecture"
    )
