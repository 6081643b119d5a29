"""The data that trees of these tests see."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvczoo.data.cub import SynthBirdsDataModule


@pytest.fixture(scope="module")
def data(birds: Path) -> SynthBirdsDataModule:
    return SynthBirdsDataModule(root=str(birds), size="tiny", preprocess={"size": [48, 48]}, eval_batch_size=5)
