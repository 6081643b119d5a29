"""What tests share: a tiny copy of SynthBirds, drawn once, and the command line in process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Two processes share two cores: an example may wait. The examples are the same in every run.
settings.register_profile("fgvczoo", deadline=None, derandomize=True)
settings.load_profile("fgvczoo")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

RECIPES = Path(__file__).parent / "recipes"


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of SynthBirds, size tiny: 4 classes, 16 training and 16 test images."""
    from fgvczoo.data.synthbirds import make

    return make(tmp_path_factory.mktemp("birds"), "tiny", workers=1, progress=False)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two test processes share two cores; and results to the bit need a fixed number of threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def fgvczoo_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in a fresh folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        from fgvczoo.cli import main

        capsys.readouterr()
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return status, out, err

    return run
