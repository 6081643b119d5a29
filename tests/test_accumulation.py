"""Accumulated small batches are the larger batch, as the pages' overrides for small GPUs promise."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import torch

import fgvczoo
from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.tasks.stages import Group, Stage
from fgvczoo.zoo.recipe import list_recipes, read_recipe

PAGES = Path(__file__).parents[1] / "docs" / "models"
PAPERS = ("protopnet", "st-protopnet", "prototree")
OVERRIDE = re.compile(
    r"--data\.batch_size (\d+) --trainer\.accumulate_grad_batches (\d+) --trainer\.precision bf16-mixed"
)


@pytest.mark.parametrize("paper", PAPERS)
def test_the_override_for_small_gpus_keeps_the_recipes_batch(paper: str) -> None:
    found = OVERRIDE.search((PAGES / f"{paper}.md").read_text())
    assert found is not None
    recipes = [read_recipe(name) for name in list_recipes(f"{paper}-*cub")]
    recipes = [recipe for recipe in recipes if recipe.card.paper == paper]
    assert recipes
    for recipe in recipes:
        assert recipe.config["data"]["init_args"]["batch_size"] == int(found[1]) * int(found[2]), recipe.name
        # Neither the learning rates nor the number of updates follow the size of what is loaded at once.
        assert all(stage.get("base_batch") is None for stage in recipe.config["model"]["init_args"]["stages"].values())


@pytest.mark.parametrize("paper", PAPERS)
def test_accumulated_batches_train_like_whole_ones(paper: str, birds: Path) -> None:
    """Without batch norms: in train mode they take the statistics of what is loaded at once."""

    def trained(batch: int, accumulated: int) -> dict[str, torch.Tensor]:
        groups = {"backbone": Group(1e-3), "add_on": Group(1e-2), "prototypes": Group(1e-2)}
        model = fgvczoo.create(
            paper,
            num_classes=4,
            backbone="test_convnext",
            out_index=1,
            prototype_dim=8,
            preprocess={"size": [48, 48]},
            stages={"train": Stage(groups, "SGD")},
            plan=[{"train": 2}],
            **({"height": 3} if paper == "prototree" else {}),
        )
        data = SynthBirdsDataModule(
            root=str(birds), size="tiny", cropped=True, preprocess={"size": [48, 48]}, batch_size=batch
        )
        trainer = L.Trainer(
            **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
            **{"enable_model_summary": False, "use_distributed_sampler": False, "max_epochs": -1},
            accumulate_grad_batches=accumulated,
            limit_val_batches=0,
        )
        trainer.fit(model, data)
        assert trainer.global_step == 2 * 2  # of 16 images in batches of 8
        return model.state_dict()

    torch.manual_seed(0)
    start = torch.get_rng_state()
    whole = trained(8, 1)
    torch.set_rng_state(start)
    parts = trained(2, 4)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
