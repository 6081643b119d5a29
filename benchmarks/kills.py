"""Kills a training run at random moments and resumes it: `python benchmarks/kills.py [--kills 20]`.

Both papers' tiny test recipes, in turn: a run is killed with SIGKILL after a random time, resumed with --ckpt_path last
(from the start where no checkpoint was written yet), and its final weights are compared bit for bit with those of an
unbroken run. Writes results/kills.json and .md; exit status 1 when any run differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, write

from fgvczoo.data.synthbirds import make
from fgvczoo.zoo.load import load

ROOT = Path(__file__).parent.parent
PAPERS = ("st-protopnet", "protopnet")


def start(paper: str, run: Path, birds: Path, *more: str) -> subprocess.Popen[bytes]:
    recipe = ROOT / "tests" / "recipes" / f"{paper}-tiny.yaml"
    options = ["--config", str(recipe), "--run", str(run), "--data.root", str(birds), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "fgvczoo", "fit", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(error.decode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        birds = make(Path(folder) / "birds", "tiny", workers=1, progress=False)
        unbroken, seconds = {}, {}
        for paper in PAPERS:
            begin = time.monotonic()
            finish(start(paper, Path(folder) / paper, birds))
            seconds[paper] = time.monotonic() - begin
            unbroken[paper] = load(Path(folder) / paper).state_dict()
        for number in range(arguments.kills):
            paper = PAPERS[number % len(PAPERS)]
            run = Path(folder) / f"run-{number}"
            process = start(paper, run, birds)
            # Most of the time goes into imports, before which there is nothing to kill.
            moment = generator.uniform(0.5, 1.0) * seconds[paper]
            time.sleep(moment)
            process.kill()
            process.communicate()
            last = run / "checkpoints" / "last.ckpt"
            epoch = torch.load(last, map_location="cpu", weights_only=True)["epoch"] if last.exists() else None
            if epoch is None:
                shutil.rmtree(run, ignore_errors=True)
            finish(start(paper, run, birds, *(["--ckpt_path", "last"] if epoch is not None else [])))
            resumed = load(run).state_dict()
            equal = all(torch.equal(resumed[key], unbroken[paper][key]) for key in unbroken[paper])
            kills.append({"paper": paper, "seconds": round(moment, 2), "last_epoch": epoch, "equal": equal})
            print(kills[-1], flush=True)
    good = sum(kill["equal"] for kill in kills)
    before = sum(kill["last_epoch"] is None for kill in kills)
    lines = [
        "# Killed and resumed runs",
        "",
        f"{good} of {len(kills)} runs that were killed at random moments and resumed ended with weights equal to the",
        f"bit to those of an unbroken run; {before} of them were killed before their first checkpoint and began again.",
        f"`python benchmarks/kills.py --kills {arguments.kills}` writes this file.",
        f"Torch {torch.__version__}, CPU, 1 thread.",
        "",
    ]
    write(RESULTS, "kills", {"torch": torch.__version__, "kills": kills}, "\n".join(lines))
    return 0 if good == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
