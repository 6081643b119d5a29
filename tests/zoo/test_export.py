"""Exported files: equal numbers, any batch, without fgvczoo; what goes wrong is one line."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import fgvczoo
from fgvczoo import FgvczooError
from fgvczoo.tasks.base import StagedModule

# Runs a file on the images of another one, in a process where fgvczoo cannot be imported.
RUNNER = """
import json, sys
sys.modules["fgvczoo"] = None
import numpy
path, images = sys.argv[1], numpy.load(sys.argv[2])
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape[0] in ("batch", len(images))
    outputs = session.run(None, {"image": images})
    assert session.get_outputs()[0].name in ("logits", "embedding")
    metadata = session.get_modelmeta().custom_metadata_map["fgvczoo.json"]
    assert "torch" not in sys.modules
else:
    import torch
    files = {"fgvczoo.json": ""}
    program = torch.export.load(path, extra_files=files)
    outputs = program.module()(torch.from_numpy(images))
    outputs = [part.detach().numpy() for part in (outputs if isinstance(outputs, tuple) else [outputs])]
    metadata = files["fgvczoo.json"]
assert json.loads(metadata)["preprocess"]["size"] == list(images.shape[2:])
numpy.savez(sys.argv[3], *outputs)
print(metadata)
"""


def assert_runs_alone(path: Path, model: StagedModule, batch: int) -> dict[str, object]:
    """The file gives the model's outputs in a process without fgvczoo; its metadata.

    Judged by float64: the logarithm of a small distance makes of rounding 1e-5 and more, in the file as in the model.
    """
    import numpy as np

    images = torch.randn(batch, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(0))
    np.save(path.parent / "images.npy", images.numpy())
    files = [str(path), str(path.parent / "images.npy"), str(path.parent / "outputs.npz")]
    done = subprocess.run([sys.executable, "-I", "-c", RUNNER, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ours, exact = model.eval()(images), deepcopy(model).double()(images.double())
    found = tuple(torch.from_numpy(part) for part in np.load(files[2]).values())
    parts = [path.read_bytes()]
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
            assert path.parent.name not in " ".join(archive.namelist())
    for folder in (Path(fgvczoo.__file__).parent, Path(torch.__file__).parent, path.parent):
        assert not any(str(folder).encode() in part for part in parts)  # no path of the machine travels with it
    both = [outputs if isinstance(outputs, tuple) else (outputs,) for outputs in (ours, exact)]
    for part, expected, judge in zip(found, *both, strict=True):
        rounding = float((expected - judge).abs().max())
        torch.testing.assert_close(part, judge.float(), rtol=1e-5, atol=max(1e-5, 4 * rounding))
        assert rounding < 1e-3  # the bound above stays one of rounding
    return dict(json.loads(done.stdout))


@pytest.fixture
def model() -> StagedModule:
    torch.manual_seed(0)
    preprocess = {"size": [48, 64]}
    return fgvczoo.create("linear", num_classes=3, backbone="test_resnet", out_index=2, preprocess=preprocess).eval()


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_fixed_batch_and_the_metadata(model: StagedModule, tmp_path: Path, ending: str) -> None:
    if ending == "onnx":
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    path = fgvczoo.export(model, tmp_path / f"model.{ending}", batch=1)
    metadata = assert_runs_alone(path, model, 1)
    assert metadata["classes"] == ["0", "1", "2"] and metadata["paper"] == "linear"


def test_the_model_stays_as_it_was(model: StagedModule, tmp_path: Path) -> None:
    model.train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fgvczoo.export(model, tmp_path / "model.pt2")
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mistakes_are_one_line(model: StagedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FgvczooError, match=r"ends in \.onnx or \.pt2"):
        fgvczoo.export(model, tmp_path / "model.pth")
    with pytest.raises(FgvczooError, match="at least 1"):
        fgvczoo.export(model, tmp_path / "model.pt2", batch=0)
    monkeypatch.setattr("fgvczoo.zoo.export.find_spec", lambda name: None)
    with pytest.raises(FgvczooError, match=r"fgvczoo\[onnx\]"):
        fgvczoo.export(model, tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


def test_a_failed_export_leaves_the_old_file(
    model: StagedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("old")
    monkeypatch.setattr("torch.export.save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fgvczoo.export(model, path)
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"
