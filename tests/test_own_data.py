"""A user's own folder, with odd names and a broken picture: checked, trained on, tested, predicted, explained."""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path

import pytest
from PIL import Image

from fgvczoo.data.synthbirds import draw
from fgvczoo.zoo.load import load

NAMES = ["-dash first", "Barn owl", "Große Rohrdommel", 'it\'s "quoted"', "price $5 & <b>", "ミソサザイ"]
BROKEN = Path("my_birds/Barn owl/03 bird.jpg")
SMALL = (
    *("--data.preprocess", '{"size": [40, 40]}', "--data.num_workers", 0, "--data.batch_size", 8),
    *("--model.plan", '[{"warm": 1}, "project"]', "--trainer.enable_progress_bar", "false"),
)


@pytest.fixture
def my_birds(tmp_path: Path) -> Path:
    for class_id, name in enumerate(NAMES):
        folder = tmp_path / "my_birds" / name
        folder.mkdir(parents=True)
        for index in range(5):
            Image.fromarray(draw(0, class_id, index).image).save(folder / f"{index:02d} bird.jpg")
    broken = tmp_path / BROKEN
    broken.write_bytes(broken.read_bytes()[:700])
    return tmp_path / "my_birds"


def test_from_folder_to_explanation(my_birds: Path, fgvczoo_in) -> None:
    status, out, _ = fgvczoo_in("data", "check", "folder", "my_birds")
    assert status == 1 and "30 images of 6 classes" in out and str(BROKEN) in out

    fit = ("fit", "--config", "st-protopnet-synthbirds", "--data", "folder", "--data.root", "my_birds", *SMALL)
    status, _, err = fgvczoo_in(*fit)
    assert status == 2 and str(BROKEN) in err and err.count("\n") == 1
    assert not Path("runs/st-protopnet-synthbirds").exists()  # so that the command can be repeated

    status, out, err = fgvczoo_in(*fit, "--data.on_corrupt", "skip", "--weights", "st-protopnet-synthbirds")
    assert status == 0, err
    assert "new for 6 classes" in out and f"1 unreadable picture was skipped: {BROKEN}" in err
    run = Path("runs/st-protopnet-synthbirds")
    model = load(run)
    assert model.class_names == sorted(NAMES) and model.num_classes == 6

    status, out, err = fgvczoo_in("test", *fit[1:], "--data.on_corrupt", "skip", "--ckpt_path", "last")
    assert status == 0 and "test/top1" in out, err
    config = json.loads((run / "weights" / "config.json").read_text())
    assert config["provenance"]["metrics"] == json.loads((run / "test.json").read_text())
    assert config["provenance"]["dataset"] == "my_birds" and str(my_birds.parent) not in json.dumps(config)
    assert config["licence"] == {"code": "CC BY-NC 4.0 (not used here; this is an independent implementation)"}
    assert config["card"] is None and "| top1 |" in (run / "weights" / "README.md").read_text()

    status, out, err = fgvczoo_in("predict", run, "my_birds", "-o", "out.csv")
    assert status == 2 and "29 predictions" in out and str(BROKEN) in err and err.count("\n") == 1
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 29 and {row["label"] for row in rows} <= set(NAMES)
    status, out, err = fgvczoo_in("predict", run, "my_birds/-dash first/00 bird.jpg")
    assert status == 0 and out.startswith("my_birds/-dash first/00 bird.jpg  ") and not err

    pictures = [f"my_birds/{name}/00 bird.jpg" for name in NAMES]
    status, out, err = fgvczoo_in("explain", run, *pictures, "--data_root", "my_birds", "-o", "why.html")
    assert status == 0, err
    page = Path("why.html").read_text()
    assert page.count("data:image/jpeg") > 12  # prototypes are shown, from the user's own pictures
    for name in NAMES:
        status, _, err = fgvczoo_in("explain", run, pictures[0], f"--target={name}", "-o", "why.html")
        page = Path("why.html").read_text()
        assert status == 0 and html.escape(name) in page and "<b>" not in page, err

    status, out, _ = fgvczoo_in("info", run)
    assert status == 0 and "6: -dash first, Barn owl" in out and "test/top1" in out
    status, _, err = fgvczoo_in("push", run, "owner/name")
    assert status == 2 and "--licence" in err  # own data: only the user can say


def test_a_sheet_of_a_folder(my_birds: Path, fgvczoo_in) -> None:
    (my_birds.parent / BROKEN).unlink()
    status, _, err = fgvczoo_in("data", "show", "folder", "my_birds", "--split", "train", "-n", 6)
    assert status == 0 and Path("sheet.png").stat().st_size, err


def test_weights_of_other_data_are_not_evaluated_on_it(my_birds: Path, fgvczoo_in) -> None:
    """As many classes, but other ones."""
    from fgvczoo.data.synthbirds import Size, make

    birds = make(
        my_birds.parent / "birds", Size(pairs=3, train_per_class=2, test_per_class=1), workers=1, progress=False
    )
    fit = ("--config", "linear-synthbirds", "--model.plan", '[{"train": 1}]', *SMALL[:6])
    assert fgvczoo_in("fit", *fit, "--data", "cub", "--data.root", birds, "--run", "six")[0] == 0
    arguments = ("--data", "folder", "--data.root", "my_birds", "--data.on_corrupt", "skip", "--weights", "runs/six")
    status, _, err = fgvczoo_in("test", *fit, *arguments)
    assert status == 2 and "other classes than the data" in err and err.count("\n") == 1
