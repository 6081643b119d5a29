"""Every example runs as its text says, in a folder of its own, and leaves what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# What each one prints or writes; every script in the folder has its line.
PROMISES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "explain_a_prediction": ([], ["005.Synthetic_Bird_C1", "prototypes together"], ["why.html"]),
    "import_an_authors_checkpoint": ([], ["loaded", "resnet18", "Prediction("], ["imported/config.json"]),
    "train_on_your_folder": (
        ["--epochs", "1"],
        ["4 classes: bird 0, bird 1", "new for 4 classes", "top-1 on the pictures"],
        ["weights/model.safetensors"],
    ),
    "use_an_op_alone": (["crown"], ["are found within one cell"], []),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example(name: str, tmp_path: Path) -> None:
    arguments, words, files = PROMISES[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout, done.stdout
    for file in files:
        assert (tmp_path / file).stat().st_size
