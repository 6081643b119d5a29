"""What a shell gets when it asks how a line goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def candidates(line: str, folder: Path) -> list[str]:
    """As bash asks: the line in the environment, the answer in a file."""
    answer = folder / "answer"
    environment = {
        **os.environ,
        **{"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"},
        **{"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"},
    }
    program = (
        "import sys; from fgvczoo.cli import main\n"
        "try: main([])\n"
        "finally: assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=folder, check=False, stderr=subprocess.DEVNULL)
    return [word.strip() for word in answer.read_text().split("\n") if word.strip()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fgvczoo ex", {"explain", "export"}),
        ("fgvczoo info st-protopnet-s", {"st-protopnet-synthbirds"}),
        ("fgvczoo fit --config linear", {"linear-synthbirds"}),
        (
            "fgvczoo fit --config st-protopnet-cub --model.prot",
            {"--model.prototypes_per_class", "--model.prototype_dim"},
        ),
        ("fgvczoo fit --config st-protopnet-cub --data.ba", {"--data.batch_size"}),
        ("fgvczoo data ch", {"check"}),
        ("fgvczoo data check c", {"cub"}),
        ("fgvczoo predict runs/my", {"runs/my-run"}),
    ],
)
def test_words(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "my-run").mkdir(parents=True)
    assert expected <= set(candidates(line, tmp_path))


def test_code_for_shells(fgvczoo_in) -> None:
    for shell in ("bash", "zsh", "fish"):
        status, out, _ = fgvczoo_in("completion", shell)
        assert status == 0 and "fgvczoo" in out
    assert fgvczoo_in("completion", "tcsh")[0] == 2
