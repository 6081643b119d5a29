"""ProtoTree: evaluation, pages of trees and paths, ensembles."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.data.cub import SynthBirdsDataModule
from fgvczoo.explain.page import render, write
from fgvczoo.metrics.routing import RoutingScores
from fgvczoo.models.ensemble import ProbabilityEnsemble
from fgvczoo.nn.prototypes import PrototypeSource
from tests.metrics.processes import in_two_processes
from tests.prototree.small import learned, picture, prototree

# -- evaluation --------------------------------------------------------------------------------------------------------


def some_scores(seed: int, images: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(images, 4, generator=generator) for name in ("distributed", "sample_max", "greedy")}
    depth = {name: torch.randint(1, 9, (images,), generator=generator) for name in ("sample_max", "greedy")}
    return torch.randint(4, (images,), generator=generator), scores, depth


def assert_scores(
    found: dict[str, Tensor], labels: Tensor, scores: dict[str, Tensor], depth: dict[str, Tensor]
) -> None:
    chosen = {name: values.argmax(1) for name, values in scores.items()}
    assert float(found["top1"]) == pytest.approx(float((chosen["distributed"] == labels).double().mean()))
    for name, lengths in depth.items():
        expected = {
            f"top1_{name}": (chosen[name] == labels).double().mean(),
            f"fidelity_{name}": (chosen[name] == chosen["distributed"]).double().mean(),
            f"path_length_{name}": lengths.double().mean(),
            f"path_length_{name}_std": lengths.double().std(correction=0),
            f"path_length_{name}_min": lengths.min(),
            f"path_length_{name}_max": lengths.max(),
        }
        for key, value in expected.items():
            assert float(found[key]) == pytest.approx(float(value), abs=1e-6), key


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 10**6))
def test_routing_scores_are_their_definitions(images: int, batch: int, seed: int) -> None:
    labels, scores, depth = some_scores(seed, images)
    metric = RoutingScores()
    for part in torch.arange(images).split(batch):
        each = [{name: values[part] for name, values in table.items()} for table in (scores, depth)]
        metric.update(labels[part], *each)
    assert_scores(metric.compute(), labels, scores, depth)


def _shared_scores(rank: int) -> dict[str, Tensor]:
    labels, scores, depth = some_scores(3, 11)
    rows = [slice(0, 7), slice(7, 11)][rank]
    metric = RoutingScores()
    metric.update(labels[rows], *({k: v[rows] for k, v in table.items()} for table in (scores, depth)))
    return metric.compute()


def test_routing_scores_over_two_processes(tmp_path: Path) -> None:
    for found in in_two_processes(_shared_scores, tmp_path):
        assert_scores(found, *some_scores(3, 11))


def test_no_images_have_no_scores() -> None:
    assert all(math.isnan(float(value)) for value in RoutingScores().compute().values())


def test_a_model_classifies_by_the_routing_that_it_is_told(data: SynthBirdsDataModule) -> None:
    model = learned()
    scores = model.evaluate(data)
    assert set(scores) == set(RoutingScores().compute())
    model.routing = "greedy"
    prediction = model.predict(picture())
    why = model.explain(picture())
    assert why.class_name == prediction.label == why.predicted
    assert prediction.score == pytest.approx(why.leaf.classes[0][1], rel=1e-5)
    with pytest.raises(FgvczooError, match="routing"):
        prototree(routing="random")


# -- pages -------------------------------------------------------------------------------------------------------------


def test_the_path_is_the_greedy_one(data: SynthBirdsDataModule) -> None:
    model = learned()
    model.project(data)
    why = model.explain(picture())
    head = model.network.head
    output = head.head(head.features(model.network.backbone(model.preprocess(picture())[None])))
    leaf = head.tree.leaves[int(head.leaf(output, "greedy"))]
    assert why.leaf.number == leaf and why.followed
    assert [(step.node.number, step.present) for step in why.steps] == head.tree.path(leaf)
    for step in why.steps:
        assert step.present == (step.similarity > 0.5)
        y, x = np.unravel_index(step.map.argmax(), step.map.shape)
        x0, y0, x1, y1 = step.box
        assert x0 - 6 <= x <= x1 + 6 and y0 - 6 <= y <= y1 + 6
        assert step.node.source is not None
    assert json.loads(json.dumps(why.to_dict()))["leaf"] == leaf
    other = model.explain(picture(), target=1)
    assert other.class_name == "1" and 0 < other.probability < 1
    assert sum(share for _, share in other.leaf.classes) == pytest.approx(1, abs=1e-5)


def test_pages_hold_the_tree_once_and_escape_names(tmp_path: Path, data: SynthBirdsDataModule) -> None:
    from fgvczoo.explain.pictures import prototype_pictures

    names = ["a", "<script>alert(1)</script>", '"><img src=x>', "d"]
    model = learned(class_names=names)
    model.project(data)
    model.prototype_pictures = prototype_pictures(model.sources, data)
    why = [model.explain(picture(seed), target=1) for seed in (0, 1)]
    why[0].steps[0] = replace(
        why[0].steps[0],
        node=replace(
            why[0].steps[0].node, picture=None, source=PrototypeSource("<b>", (0, 0), (1, 1), 0.5, (0, 0, 1, 1))
        ),
    )
    page = write(why, tmp_path / "two.html", names=["<i>.jpg", "two.jpg"]).read_text()
    # Words of the files and classes are text; the script is ours and fetches nothing.
    assert page.count("<script") == 1 and "<img src=x" not in page and "<b>" not in page and "<i>" not in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert page.count("<svg") == 1 and page.count("data-path=") == 2
    assert page.count('class="branch"') == 7 and page.count('class="end"') == 8 and page.count("data-to=") == 14
    assert page.count("<image") == 14  # a patch and its picture in each node
    whole = render([model.explain_model()], [""])
    assert whole.count("<svg") == 1 and "7 prototypes" in whole
    for name in ("w.html", "w.png", "w.json"):
        assert why[1].save(tmp_path / name).stat().st_size > 300
    assert len(json.loads(model.explain_model().save(tmp_path / "t.json").read_text())["nodes"]) == 15
    with pytest.raises(FgvczooError, match=r"\.html"):
        model.explain_model().save(tmp_path / "t.png")
    assert "&lt;script&gt;" in why[1]._repr_html_() or "&amp;lt;script" in why[1]._repr_html_()


def test_the_command_draws_the_tree(tmp_path: Path, fgvczoo_in) -> None:
    folder = fgvczoo.save_weights(learned(), tmp_path / "w", provenance={}, licences={})
    status, out, err = fgvczoo_in("explain", folder, "-o", "tree.html")
    assert status == 0 and "tree.html" in out, err
    assert 'class="branch"' in Path("tree.html").read_text()
    assert "name at least one" in fgvczoo_in("explain", "st-protopnet-synthbirds")[2]


# -- ensembles ---------------------------------------------------------------------------------------------------------


def test_an_ensemble_averages_probabilities() -> None:
    models = [learned(0), learned(1, height=2), learned(2)]
    ensemble = ProbabilityEnsemble(models).eval()
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        expected = torch.stack([model(images).exp() for model in models]).mean(0)
        torch.testing.assert_close(ensemble(images).exp(), expected)
    label = ensemble.predict(picture()).label
    explanations = ensemble.explain(picture())
    assert [why.class_name for why in explanations] == [label] * 3
    assert render(explanations, [""] * 3).count("<svg") == 3
    with pytest.raises(FgvczooError, match="class_names of model 1"):
        ProbabilityEnsemble([learned(), learned(class_names=["a", "b", "c", "d"])])
    with pytest.raises(FgvczooError, match="at least one"):
        ProbabilityEnsemble([])
