"""Each mistake is one line on stderr and exit status 2; nothing of a run is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import RECIPES
from tests.data.cars.make import make_cars

TINY = RECIPES / "st-protopnet-tiny.yaml"


def fails(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    assert status == 2, err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err, err


def edited(tmp_path: Path, **changes: object) -> Path:
    """The tiny recipe with keys (dots as __) set."""
    recipe = yaml.safe_load(TINY.read_text())
    for key, value in changes.items():
        node = recipe
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    file = tmp_path / "edited.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_unknown_recipe_names_the_nearest(fgvczoo_in) -> None:
    fails(fgvczoo_in("fit", "--config", "st-protopnt-cub"), "st-protopnt-cub", "did you mean st-protopnet-cub")
    fails(fgvczoo_in("info", "st-protopnt-cub"), "did you mean st-protopnet-cub")


def test_missing_root_says_where_to_get_the_data(fgvczoo_in) -> None:
    fails(fgvczoo_in("fit", "--config", "st-protopnet-cub"), "root", "data.caltech.edu")
    fails(fgvczoo_in("fit", "--config", "st-protopnet-cub", "--data.root", "nowhere"), "nowhere", "data.caltech.edu")


def test_wrong_layout_names_the_missing_file(fgvczoo_in, birds: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(birds, tmp_path / "copy")
    (copy / "CUB_200_2011" / "train_test_split.txt").unlink()
    fails(fgvczoo_in("fit", "--config", "st-protopnet-cub", "--data.root", copy), "train_test_split.txt")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(fgvczoo_in, birds: Path, tmp_path: Path, workers: int) -> None:
    copy = shutil.copytree(birds, tmp_path / "copy")
    from fgvczoo.data.cub import CUBDataModule

    data = CUBDataModule(str(copy))
    broken = Path(data.row(data.splits["train"][0])["path"])
    broken.write_bytes(broken.read_bytes()[:200])
    fails(
        fgvczoo_in("fit", "--config", TINY, "--data.root", copy, "--data.num_workers", workers),
        broken.name,
    )


def test_misspelt_keys_name_the_nearest(fgvczoo_in, birds: Path, tmp_path: Path) -> None:
    recipe = edited(tmp_path, model__init_args__prototype_dims=8)
    fails(fgvczoo_in("fit", "--config", recipe), "prototype_dims", "did you mean prototype_dim")
    recipe = edited(tmp_path, modle={})
    fails(fgvczoo_in("fit", "--config", recipe), "modle", "did you mean model")
    recipe = edited(tmp_path, model__init_args__stages__warm__groups__add_on={"lrr": 1.0})
    fails(fgvczoo_in("fit", "--config", recipe), "lrr", "did you mean lr")
    recipe = edited(tmp_path, model__init_args__plan=[{"wram": 1}])
    fails(fgvczoo_in("fit", "--config", recipe, "--data.root", birds), "wram", "did you mean warm")
    fails(fgvczoo_in("fit", "--config", TINY, "--trainer.max_epoch", 3), "did you mean trainer.max_epochs")
    fails(fgvczoo_in("fit", "--config", TINY, "--data.rot", birds), "rot", "root")


def test_class_count_must_match(fgvczoo_in, birds: Path, tmp_path: Path) -> None:
    fails(fgvczoo_in("fit", "--config", TINY, "--data.root", birds, "--model.num_classes", 5), "num_classes")
    from fgvczoo.data.synthbirds import Size, make

    other = make(tmp_path / "other", Size(pairs=3, train_per_class=1, test_per_class=1), workers=1, progress=False)
    assert fgvczoo_in("fit", "--config", TINY, "--data.root", birds, "--run", "four")[0] == 0
    recipe = edited(tmp_path, data__class_path="fgvczoo.data.cub.CUBDataModule")
    config = yaml.safe_load(recipe.read_text())
    config["data"]["init_args"].pop("size")
    recipe.write_text(yaml.safe_dump(config))
    arguments = ("test", "--config", recipe, "--data.root", other)
    fails(fgvczoo_in(*arguments, "--weights", "runs/four"), "4 classes", "6")
    fails(fgvczoo_in(*arguments, "--ckpt_path", "runs/four/checkpoints/last.ckpt"), "4 classes", "6")


def test_validation_images_come_from_the_training_part(fgvczoo_in, birds: Path) -> None:
    arguments = ("--config", TINY, "--data.root", birds)
    assert fgvczoo_in("fit", *arguments, "--data.val_fraction", 0.25)[0] == 0
    assert "val/top1" in Path("runs/st-protopnet-tiny/metrics.csv").read_text().splitlines()[0]
    status, out, _ = fgvczoo_in("validate", *arguments, "--data.val_fraction", 0.25, "--ckpt_path", "last")
    assert status == 0 and "val/top1" in out
    fails(fgvczoo_in("validate", *arguments, "--ckpt_path", "last"), "val_fraction")


def test_a_run_folder_in_use_is_refused(fgvczoo_in, birds: Path) -> None:
    arguments = ("fit", "--config", TINY, "--data.root", birds)
    assert fgvczoo_in(*arguments, "--trainer.max_epochs", 1)[0] == 0
    run = Path("runs") / "st-protopnet-tiny"
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    fails(fgvczoo_in(*arguments), str(run), "--ckpt_path last", "--run")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert fgvczoo_in(*arguments, "--run", "another", "--trainer.max_epochs", 1)[0] == 0
    fails(fgvczoo_in(*arguments, "--run", "third", "--ckpt_path", "last"), "no checkpoint")


def test_a_resumed_run_keeps_its_settings(fgvczoo_in, birds: Path) -> None:
    arguments = ("fit", "--config", TINY, "--data.root", birds)
    assert fgvczoo_in(*arguments, "--trainer.max_epochs", 1)[0] == 0
    changed = fgvczoo_in(*arguments, "--ckpt_path", "last", "--data.batch_size", 2)
    fails(changed, "batch_size=4", "not 2", "config.yaml")
    config = Path("runs/st-protopnet-tiny/config.yaml")
    resumed = ("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", 2, "--data.decoded", "kept")
    assert fgvczoo_in(*resumed)[0] == 0  # where pictures lie decoded changes nothing
    assert not Path("runs/config").exists() and any(path.is_file() for path in Path("kept").rglob("*"))
    saved = json.loads(Path("runs/st-protopnet-tiny/weights/config.json").read_text())
    assert "decoded" not in saved["provenance"]["data"]["init_args"]


def test_what_is_not_an_image_is_named(fgvczoo_in, birds: Path, tmp_path: Path) -> None:
    assert fgvczoo_in("fit", "--config", TINY, "--data.root", birds, "--trainer.max_epochs", 1)[0] == 0
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    run = "runs/st-protopnet-tiny"
    fails(fgvczoo_in("explain", run, text), "notes.jpg", "not an image")
    fails(fgvczoo_in("explain", run, "gone.jpg"), "gone.jpg")
    good = sorted((birds / "CUB_200_2011" / "images").rglob("*.jpg"))[0]
    status, out, err = fgvczoo_in("predict", run, text, good, "-o", "out.csv")
    assert status == 2 and "notes.jpg" in err and "1 predictions" in out
    assert good.name in Path("out.csv").read_text()
    fails(fgvczoo_in("predict", run, good, "--box", "1,2,3"), "four numbers")
    fails(fgvczoo_in("predict", run, good, "-o", "out.xlsx"), ".csv")


def test_more_mistakes_are_one_line(fgvczoo_in, birds: Path) -> None:
    Path("junk.ckpt").write_text("junk")
    arguments = ("--config", TINY, "--data.root", birds)
    fails(fgvczoo_in("test", *arguments, "--ckpt_path", "junk.ckpt"), "junk.ckpt", "not a whole checkpoint")
    fails(fgvczoo_in("fit", *arguments, "--model.backbone_options", '{"foo": 1}'), "backbone_options", "foo")
    image = sorted((birds / "CUB_200_2011" / "images").rglob("*.jpg"))[0]
    fails(fgvczoo_in("explain", "st-protopnet-synthbirds", image, "--target", "20"), "0..19")
    assert fgvczoo_in("explain", "st-protopnet-synthbirds", image, "--target", "3")[0] == 0


def test_explanations_are_scored(fgvczoo_in, birds: Path) -> None:
    assert fgvczoo_in("fit", "--config", TINY, "--data.root", birds)[0] == 0
    run = "runs/st-protopnet-tiny"
    status, out, err = fgvczoo_in("evaluate", run, "--data_root", birds, "--limit", 4, "-o", "scores.json")
    assert status == 0 and "deletion_auc" in out, err
    assert json.loads(Path("scores.json").read_text())["images"] == 4
    linear = RECIPES / "linear-tiny.yaml"
    assert fgvczoo_in("fit", "--config", linear, "--data.root", birds, "--trainer.max_epochs", 1)[0] == 0
    fails(fgvczoo_in("evaluate", "runs/linear-tiny", "--data_root", birds), "linear", "prototype network")


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_predict_writes_tables(fgvczoo_in, birds: Path, ending: str) -> None:
    from fgvczoo import build_data, save_weights
    from fgvczoo.zoo.build import build_model
    from fgvczoo.zoo.recipe import read_recipe

    assert build_data(read_recipe(TINY), root=str(birds)).num_classes == 4
    save_weights(build_model(read_recipe(TINY)), "weights", provenance={}, licences={})
    status, _, err = fgvczoo_in("predict", "weights", birds / "CUB_200_2011" / "images", "-o", f"out.{ending}")
    assert status == 0, err
    if ending == "json":
        assert len(json.loads(Path("out.json").read_text())) == 32
    elif ending == "csv":
        assert len(Path("out.csv").read_text().splitlines()) == 33
    else:
        from datasets import Dataset

        assert len(Dataset.from_parquet("out.parquet")) == 32


def test_a_recipe_can_be_copied_out(fgvczoo_in) -> None:
    status, out, _ = fgvczoo_in("recipe", "st-protopnet-cub")
    assert status == 0 and yaml.safe_load(out)["card"]["paper"] == "st-protopnet"
    assert "st-protopnet-cub" in fgvczoo_in("list", "*-cub")[1]
    assert "83.57" in fgvczoo_in("info", "st-protopnet-cub")[1]
    assert fgvczoo_in()[0] == 0
    fails(fgvczoo_in("lst"), "did you mean list")
    fails(fgvczoo_in("list", "x*"), "no recipe matches")


def test_data_commands(fgvczoo_in, birds: Path, tmp_path: Path) -> None:
    assert fgvczoo_in("data", "check", "cub", birds)[0] == 0
    assert fgvczoo_in("data", "show", "synthbirds", birds, "-n", 4)[0] == 0 and Path("sheet.png").stat().st_size
    status, out, _ = fgvczoo_in("data", "make", "synthbirds", "made", "--size", "1x1x1", "--workers", 1)
    assert status == 0 and "made" in out
    fails(fgvczoo_in("data", "make", "synthbirds", "made2", "--size", "huge"), "huge", "small")
    fails(fgvczoo_in("data", "make", "cub", "x"), "cub")
    copy = shutil.copytree(birds, tmp_path / "copy")
    sorted((copy / "CUB_200_2011" / "images").rglob("*.jpg"))[0].unlink()
    assert fgvczoo_in("data", "check", "cub", copy)[0] == 1
    make_cars(tmp_path / "cars")
    assert fgvczoo_in("data", "check", "cars", tmp_path / "cars")[0] == 0
    assert fgvczoo_in("data", "check", "cars", copy)[0] == 1
    assert fgvczoo_in("data", "show", "cars", tmp_path / "cars", "-n", 4, "-o", "cars.png")[0] == 0


HEAVY = ("torch", "lightning", "timm", "albumentations", "datasets", "torchvision", "cv2", "numpy", "huggingface_hub")


@pytest.mark.parametrize("code", ["import fgvczoo", "from fgvczoo.cli import main; main(['list'])"])
def test_imports_nothing_heavy_and_opens_no_socket(code: str) -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        f"{code}\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
