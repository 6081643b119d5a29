"""Trees small enough for tests, and their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.models.prototree import ProtoTree
from fgvczoo.tasks.stages import Group, Stage

TINY = {"backbone": "test_resnet", "out_index": 2, "preprocess": {"size": [48, 48]}, "prototype_dim": 8, "height": 3}


def prototree(seed: int = 0, **arguments: Any) -> ProtoTree:
    torch.manual_seed(seed)
    return ProtoTree(**{"num_classes": 4, **TINY, **arguments}).eval()


def learned(seed: int = 0, **arguments: Any) -> ProtoTree:
    """With leaves that say something."""
    model = prototree(seed, **arguments)
    with torch.no_grad():
        model.network.head.leaves.counts.copy_(torch.rand_like(model.network.head.leaves.counts) * 6)
    return model


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


NO_NORM = {"backbone": "test_convnext", "out_index": 1}
TRAIN = {"train": Stage({"backbone": Group(1e-3), "add_on": Group(1e-2), "prototypes": Group(1e-2)}, "AdamW")}


def fit(model: ProtoTree, birds: Path, **options: Any) -> ProtoTree:
    batch, epochs = options.pop("batch_size", 8), options.pop("max_epochs", -1)
    data = SynthBirdsDataModule(
        root=str(birds), size="tiny", cropped=True, preprocess={"size": [48, 48]}, batch_size=batch, eval_batch_size=8
    )
    trainer = L.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "use_distributed_sampler": False, "max_epochs": epochs, **options},
    )
    trainer.fit(model, data)
    return model
