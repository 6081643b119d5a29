"""Explanations: sums, escaping, maps that lie where the evidence is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fgvczoo
from fgvczoo.explain.overlay import heat, overlay
from fgvczoo.explain.page import render, write
from fgvczoo.models.st_protopnet import STProtoPNet
from fgvczoo.nn.prototypes import PrototypeSource, high_activation_box


@pytest.fixture(scope="module")
def model() -> STProtoPNet:
    torch.manual_seed(0)
    model = STProtoPNet(
        num_classes=3,
        class_names=["a", "b <i>", "c"],
        backbone="test_resnet",
        out_index=2,
        prototypes_per_class=2,
        prototype_dim=8,
    )
    return model.eval()


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize("target", [None, 0, "c"])
def test_contributions_sum_to_the_logit(model: STProtoPNet, target: int | str | None) -> None:
    why = model.explain(picture(), target=target)
    logits = model(model.preprocess(picture())[None])[0]
    explained = model.class_names.index(why.class_name)
    assert len(why.evidence) == 2 * 3 * 2
    assert sum(e.contribution for e in why.evidence) == pytest.approx(float(logits[explained]), abs=1e-4)
    assert why.logit == pytest.approx(float(logits[explained]), abs=1e-4)
    assert sum(e.advantage for e in why.evidence) == pytest.approx(why.logit - why.rival_logit, abs=1e-4)
    assert why.predicted == model.class_names[int(logits.argmax())]
    assert [e.contribution for e in why.evidence] == sorted((e.contribution for e in why.evidence), reverse=True)
    assert json.loads(json.dumps(why.to_dict()))["logit"] == why.logit


def test_the_map_peaks_where_the_similarity_is(model: STProtoPNet) -> None:
    why = model.explain(picture(), top=4)
    assert sum(e.map is not None for e in why.evidence) == why.shown == 4
    for entry in why.evidence[:4]:
        assert entry.map is not None and entry.map.shape == (50, 70)
        branch = model.network.branches[entry.kind]
        features = branch.features(model.network.backbone(model.preprocess(picture())[None]))
        cells = branch.evidence_map(features)[0, entry.prototype]
        assert entry.similarity == pytest.approx(float(cells.max()), abs=1e-5)
        row, column = divmod(int(cells.argmax()), cells.shape[1])
        y, x = np.unravel_index(entry.map.argmax(), entry.map.shape)
        assert abs(y / 50 - (row + 0.5) / cells.shape[0]) <= 1 / cells.shape[0]
        assert abs(x / 70 - (column + 0.5) / cells.shape[1]) <= 1 / cells.shape[1]


def test_pages_escape_what_comes_from_files(model: STProtoPNet) -> None:
    why = model.explain(picture(), target="b <i>")
    source = PrototypeSource("<script>1</script>", (0, 0), (1, 1), 0.5, (0, 0, 1, 1))
    why.evidence[0] = replace(why.evidence[0], source=source)
    page = render([why], ["<script>alert(1)</script>.jpg"])
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;" in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)


def test_saved_by_ending(model: STProtoPNet, tmp_path: Path) -> None:
    why = model.explain(picture())
    for name in ("w.html", "w.png", "w.json", "w.pdf"):
        assert why.save(tmp_path / name).stat().st_size > 500
    with pytest.raises(fgvczoo.FgvczooError, match=r"\.html"):
        why.save(tmp_path / "w.docx")
    with pytest.raises(fgvczoo.FgvczooError, match="one explanation"):
        write([why, why], tmp_path / "two.png")
    assert write([why, why], tmp_path / "two.html").read_text().count("<section>") == 2
    assert not list(tmp_path.glob(".*"))  # nothing half written stays


def test_wrong_targets_and_boxes(model: STProtoPNet) -> None:
    for target in (3, -1, "d"):
        with pytest.raises(fgvczoo.FgvczooError, match="class"):
            model.explain(picture(), target=target)
    with pytest.raises(fgvczoo.FgvczooError, match="no pixel"):
        model.explain(picture(), box=(80, 0, 90, 10))


def test_constant_maps_and_images(model: STProtoPNet) -> None:
    flat = np.full((20, 30), 0.5, np.float32)
    assert (heat(flat) == 0).all()
    assert high_activation_box(torch.from_numpy(flat)) == (0, 0, 30, 20)
    assert overlay(np.zeros((20, 30, 3), np.uint8), flat, 60).shape == (40, 60, 3)
    assert np.isfinite(model.explain(np.zeros((9, 9, 3), np.uint8)).logit)


def test_high_activation_box_holds_the_peak() -> None:
    map_ = torch.zeros(20, 30)
    map_[5:8, 10:20] = 1.0
    assert high_activation_box(map_) == (10, 5, 20, 8)


def test_notebooks_show_results(model: STProtoPNet) -> None:
    prediction = replace(model.predict(picture()), source="<b>.jpg")
    shown = prediction._repr_html_()
    assert "b &lt;i&gt;" in shown and "&lt;b&gt;.jpg" in shown and shown.count("<tr>") == 3
    frame = model.explain(picture(), target=1)._repr_html_()
    assert frame.startswith("<iframe") and "<script" not in frame and "b &amp;lt;i&amp;gt;" in frame
