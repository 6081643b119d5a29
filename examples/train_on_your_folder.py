"""A classifier that shows why, trained on a folder of your own pictures: FOLDER/CLASS/*.jpg.

    python examples/train_on_your_folder.py my_birds [--epochs 20] [-o weights]

The same from the shell, with all that a recipe holds:
`fgvczoo fit --config st-protopnet-synthbirds --data folder --data.root my_birds --weights st-protopnet-synthbirds`.
Without a folder it draws one of synthetic birds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning import Trainer, seed_everything
from PIL import Image

import fgvczoo
from fgvczoo.data.folder import FolderDataModule
from fgvczoo.data.synthbirds import draw
from fgvczoo.zoo.transfer import transfer


def toy_folder(root: Path) -> Path:
    """Four classes of ten pictures."""
    for class_id in range(4):
        folder = root / f"bird {class_id}"
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(10):
            bird = draw(seed=1, class_id=class_id, index=index)
            Image.fromarray(bird.image).crop(bird.box).save(folder / f"{index}.jpg")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("-o", "--output", default="weights")
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    data = FolderDataModule(
        str(options.folder or toy_folder(Path("toy_birds"))),
        preprocess={"size": [80, 80]},
        augmentation="flip",
        batch_size=20,
        on_corrupt="skip",
    )
    print(f"{data.num_classes} classes: {', '.join(data.class_names[:5])}")

    pretrained = fgvczoo.load("st-protopnet-synthbirds")  # its trunk is the start
    settings = {key: pretrained.hparams[key] for key in ("backbone", "out_index", "backbone_options", "prototype_dim")}
    model = fgvczoo.create(
        "st-protopnet",
        num_classes=data.num_classes,
        class_names=data.class_names,
        preprocess=data.preprocess.to_dict(),
        plan=[{"warm": 1}, {"joint": options.epochs}, "project", {"last_layer": 1}],
        **settings,
    )
    print("\n".join(transfer(model, pretrained).lines(model)))

    # Epochs are those of the plan; our loaders share rows between processes themselves.
    quiet = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_epochs=-1, use_distributed_sampler=False, **quiet)
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data)
    print(f"top-1 on the pictures kept for testing: {metrics['test/top1']:.1%}")

    provenance = {"dataset": data.dataset_name, "metrics": metrics}
    print("written:", fgvczoo.save_weights(model, options.output, provenance=provenance, licences={}))


if __name__ == "__main__":
    main()
