"""What a run records of its images: those that could not be read, and those that were there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgvczoo.data.folder import FolderDataModule
from tests.conftest import RECIPES
from tests.data.nus_wide.make import make_nus_wide
from tests.data.pictures import damage, save_picture

TINY = ("--config", RECIPES / "linear-tiny.yaml", "--data.preprocess.size", "[32, 32]")
NUS = (*TINY, "--data", "nus-wide", "--data.root", "nus")


@pytest.mark.parametrize("processes", [1, 2])
def test_one_per_cent_of_a_folder_is_spoilt(tmp_path: Path, fgvczoo_in, processes: int) -> None:
    for number in range(300):
        save_picture(tmp_path / "mine" / f"class {number % 5}" / f"{number:03d}.jpg", number, size=(32, 32))
    data = FolderDataModule("mine", batch_size=32)
    train, test = data.splits["train"], data.splits["test"]
    lost = [str(data.reader.picture(int(row))) for row in (train[0], train[100], train[-1])]
    for path, kind in zip(lost, ("truncated", "page", "empty")):
        damage(Path(path), kind)
    arguments = (*TINY, "--data", "folder", "--data.root", "mine", "--data.batch_size", 32)
    status, _, err = fgvczoo_in("fit", *arguments)
    assert status == 2 and any(path in err for path in lost) and err.count("\n") == 1

    arguments = (*arguments, "--data.on_corrupt", "skip", "--data.num_workers", 2, "--trainer.devices", processes)
    status, out, err = _in_processes(processes, fgvczoo_in, "fit", *arguments)
    assert status == 0, err
    assert f"skipped unreadable pictures: 3, by name in {Path('runs/linear-tiny/data.json')}" in out
    assert "3 unreadable pictures were skipped" in err or processes == 2  # each process says its own
    told = json.loads(Path("runs/linear-tiny/data.json").read_text())
    assert told["splits"]["train"] == len(train) and told["skipped"]["count"] == 3
    assert sorted(told["skipped"]["pictures"]) == sorted(lost)
    assert all(path in reason for path, reason in told["skipped"]["pictures"].items())
    assert "3 unreadable pictures" in fgvczoo_in("info", "runs/linear-tiny")[1]
    card = Path("runs/linear-tiny/weights/README.md").read_text()
    assert "skipped: 3" in card and lost[0] not in card  # paths stay here

    # A resumed run keeps the names of its first part, a test adds its own.
    status, _, err = fgvczoo_in("fit", *arguments[:-2], "--ckpt_path", "last")
    assert status == 0 and json.loads(Path("runs/linear-tiny/data.json").read_text()) == told, err
    damage(data.reader.picture(int(test[0])), "noise")
    status, _, err = fgvczoo_in("test", *arguments[:-2], "--ckpt_path", "last")
    assert status == 0 and f"1 unreadable picture was skipped: {data.reader.picture(int(test[0]))}" in err
    assert json.loads(Path("runs/linear-tiny/data.json").read_text())["skipped"]["count"] == 4


def _in_processes(processes: int, fgvczoo_in, *arguments: object) -> tuple[int, str, str]:
    if processes == 1:
        return fgvczoo_in(*arguments)
    command = [sys.executable, "-m", "fgvczoo", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_run_keeps_the_list_of_the_images_that_were_there(tmp_path: Path, fgvczoo_in) -> None:
    paths, labels, _ = make_nus_wide(tmp_path / "nus")
    listed = [path for path, own in zip(paths, labels) if own.any()]
    there = [path for path in listed if (tmp_path / "nus" / "Flickr" / path).is_file()]
    assert len(there) < len(listed)
    status, out, err = fgvczoo_in("fit", *NUS)
    assert status == 0, err
    said = f"nus-wide: {len(there)} of {len(listed)} listed images are there"
    run = Path("runs/linear-tiny")
    told = json.loads((run / "data.json").read_text())
    assert said in out and told["listed"] == len(listed) and told["missing"] == len(listed) - len(there)
    assert (run / "images.txt").read_text().splitlines() == there
    status, out, _ = fgvczoo_in("test", *NUS, "--ckpt_path", "last")
    assert status == 0 and said in out and told["fingerprint"] in out
    status, out, _ = fgvczoo_in("info", run)
    assert status == 0 and f"{told['missing']} of {len(listed)} listed images; fingerprint of the others" in out
    config = json.loads((run / "weights/config.json").read_text())
    config["provenance"] |= {"missing": "some", "listed": None}  # weights are whatever a stranger wrote
    (run / "weights/config.json").write_text(json.dumps(config))
    status, out, err = fgvczoo_in("info", run)
    assert status == 0 and "some of None" in out, err

    # Another subset is another set: a run does not go on with it, and a test says that it is one.
    (tmp_path / "nus" / "Flickr" / there[0]).unlink()
    status, _, err = fgvczoo_in("fit", *NUS, "--ckpt_path", "last")
    assert status == 2 and "was started with other images of nus-wide" in err and err.count("\n") == 1
    status, _, err = fgvczoo_in("test", *NUS, "--ckpt_path", "last")
    assert status == 0 and "was trained with another list of images" in err
