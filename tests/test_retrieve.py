"""Retrieval from the command line: neighbours of files, saved indexes, embeddings as tables, pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.explain.contact_sheet import Gallery, explain_retrieval
from fgvczoo.explain.page import render
from fgvczoo.tasks.retrieval import Index
from tests.conftest import RECIPES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, birds: Path) -> Path:
    from fgvczoo.cli import main

    run = tmp_path_factory.mktemp("runs") / "dm2"
    recipe = RECIPES / "dm2-tiny.yaml"
    assert main(["fit", "--config", str(recipe), "--run", str(run), "--data.root", str(birds)]) == 0
    return run


@pytest.fixture(scope="module")
def pictures(birds: Path) -> Path:
    return birds / "CUB_200_2011" / "images"


def test_neighbours_of_files_with_a_saved_index(trained: Path, pictures: Path, fgvczoo_in: Run) -> None:
    query = sorted(pictures.rglob("*.jpg"))[5]
    command = ("retrieve", trained, "--gallery", pictures, query, "--index", "i.safetensors", "-k", 3)
    status, _, err = fgvczoo_in(*command, "-o", "sheet.json")
    assert status == 0, err
    first = json.loads(Path("sheet.json").read_text())
    assert set(first["neighbours"]) == {"all", "member0", "member1"} and first["label"] == query.parent.name
    names = [item["name"] for item in first["neighbours"]["all"]]
    assert len(names) == 3 and str(query.relative_to(pictures)) not in names
    assert all(item["right"] == (item["label"] == query.parent.name) for item in first["neighbours"]["all"])
    written = Path("i.safetensors").stat().st_mtime_ns
    assert fgvczoo_in(*command, "-o", "again.json")[0] == 0
    assert json.loads(Path("again.json").read_text()) == first
    assert Path("i.safetensors").stat().st_mtime_ns == written
    assert fgvczoo_in(*command, "-o", "sheet.html")[0] == 0
    page = Path("sheet.html").read_text()
    assert page.count("<li") == 9 and "http" not in page.replace("http-equiv", "")


def test_mistakes_are_one_line(trained: Path, pictures: Path, fgvczoo_in: Run, tmp_path: Path) -> None:
    query = next(pictures.rglob("*.jpg"))
    for arguments, message in (
        (["--gallery", "nowhere", query], "no such folder"),
        (["--gallery", pictures, query, "--index", "i.npy"], "ends in .safetensors"),
        (["--gallery", pictures, query, "-k", "0"], "top=0"),
        (["--gallery", pictures, "none.jpg"], "none.jpg"),
        (["--gallery", pictures, query, "-o", "sheet.txt"], "expected a name ending in"),
    ):
        status, _, err = fgvczoo_in("retrieve", trained, *arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
    status, _, err = fgvczoo_in("retrieve", "st-protopnet-synthbirds", "--gallery", pictures, query)
    assert status == 2 and "classifies" in err
    Path("broken.safetensors").write_bytes(b"not an index")
    status, _, err = fgvczoo_in("retrieve", trained, "--gallery", pictures, query, "--index", "broken.safetensors")
    assert status == 2 and "not an index" in err
    part = tmp_path / "part"
    part.mkdir()
    (part / "a.jpg").write_bytes(query.read_bytes())
    assert fgvczoo_in("retrieve", trained, "--gallery", part, query, "--index", "part.safetensors")[0] == 0
    status, _, err = fgvczoo_in("retrieve", trained, "--gallery", pictures, query, "--index", "part.safetensors")
    assert status == 2 and "delete the index" in err


def test_an_index_of_other_weights_is_refused(trained: Path, pictures: Path) -> None:
    model = fgvczoo.load(trained)
    files = sorted(pictures.rglob("*.jpg"))[:4]
    gallery = Gallery.of_files(model, files, pictures)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(FgvczooError, match="or other weights"):
        explain_retrieval(model, files[:1], gallery)


@pytest.mark.parametrize("ending", ["csv", "json", "parquet", "safetensors"])
def test_predict_writes_embeddings(ending: str, trained: Path, pictures: Path, fgvczoo_in: Run) -> None:
    bad = Path("bad.jpg")
    folder = sorted(pictures.iterdir())[0]
    bad.write_bytes(b"no picture")
    status, out, err = fgvczoo_in("predict", trained, folder, bad, "-o", f"e.{ending}")
    count = len(list(folder.glob("*.jpg")))
    assert status == 2 and f"{count} embeddings" in out and "bad.jpg" in err
    if ending == "safetensors":
        index = Index.load(f"e.{ending}")
        assert len(index) == count and index.embeddings.shape == (count, 16)
    elif ending == "json":
        rows = json.loads(Path("e.json").read_text())
        assert len(rows) == count and len(rows[0]["vector"]) == 16
    elif ending == "csv":
        assert len(Path("e.csv").read_text().splitlines()) == 1 + count


def test_what_comes_from_files_is_escaped(trained: Path, pictures: Path) -> None:
    model = fgvczoo.load(trained)
    files = sorted(pictures.rglob("*.jpg"))[:3]
    made = Gallery.of_files(model, files, pictures)
    evil = "<script>alert(1)</script>"
    index = Index(made.index.embeddings, made.index.names, (evil,) * 3, made.index.model)
    (sheet,) = explain_retrieval(model, files[:1], Gallery(index, made.picture), labels=[evil], own=[0])
    page = render([sheet], [evil])
    assert "<script" not in page and "&lt;script" in page
    assert sheet.rows[""][0].right and sheet._repr_html_().startswith("<iframe")
