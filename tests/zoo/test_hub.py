"""Weights on a Hub of the tests' own, through the real client: found, checked, cached, pushed; failures are a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import fgvczoo
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo import hub as transport
from fgvczoo.zoo.hub import Repo, is_cached, parse_repo, push
from fgvczoo.zoo.load import load
from fgvczoo.zoo.weights import file_sha256, load_weights
from tests.hub_server import HubServer

PACKAGED = Path(fgvczoo.__file__).parent / "recipes" / "weights" / "st-protopnet-synthbirds"
NAME = "birders/st-protopnet"
FILES = ("config.json", "model.safetensors", "prototypes.safetensors", "README.md")


def packaged() -> dict[str, bytes]:
    return {name: (PACKAGED / name).read_bytes() for name in FILES}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with one repository of weights, and a client with an empty cache that knows no other."""
    with HubServer() as server:
        server.add(NAME, packaged())
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between tries
        yield server


def cached_files(tmp_path: Path) -> list[str]:
    """What a reader of the cache can meet: links of snapshots and the files behind them."""
    cache = tmp_path / "cache"
    return sorted(
        path.name for part in ("snapshots", "blobs") for path in cache.rglob(f"{part}/**/*") if not path.is_dir()
    )


def fails(call: object, *words: str) -> str:
    with pytest.raises(FgvczooError) as caught:
        call()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, message
    return message


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_by_repository_then_from_the_cache_alone(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(NAME)
    assert same(model, load_weights(PACKAGED)) and model.prototype_pictures
    hub.requests.clear()
    assert same(load(NAME), model)
    assert {request.split()[0] for request in hub.requests} <= {"HEAD"}  # only asks for the newest commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert same(load(NAME), model) and not hub.requests
    assert is_cached(Repo(NAME, None)) and not is_cached(Repo("birders/other", None))
    fails(lambda: load("birders/other"), "birders/other", "HF_HUB_OFFLINE")


def test_at_a_revision(hub: HubServer) -> None:
    first = hub.repositories[NAME].refs["main"]
    files = packaged()
    config = json.loads(files["config.json"])
    config["classes"] = [f"new {name}" for name in config["classes"]]
    second = hub.add(NAME, {**files, "config.json": json.dumps(config).encode()})
    hub.repositories[NAME].refs["v1"] = first
    assert load(NAME).class_names[0].startswith("new ")
    for old in (load(NAME, revision="v1"), load(f"{NAME}@v1"), load(NAME, revision=first)):
        assert old.class_names[0] == "001.Synthetic_Bird_A1"
    assert load(f"{NAME}@{second}").class_names[0].startswith("new ")
    fails(lambda: load(NAME, revision="v9"), NAME, "'v9'", "branch, tag or commit")
    fails(lambda: load(f"{NAME}@v1", revision="main"), "give one")
    fails(lambda: load("st-protopnet-synthbirds", revision="v1"), "owner/name")


def published_recipe(tmp_path: Path, hub: HubServer, sha256: str | None = None) -> Path:
    """A recipe whose card names weights on the Hub."""
    import yaml

    from fgvczoo.zoo.recipe import read_recipe

    config = read_recipe("st-protopnet-synthbirds").config
    config["card"]["weights"] = {
        "source": NAME,
        "revision": hub.repositories[NAME].refs["main"],
        "sha256": sha256 or file_sha256(PACKAGED / "config.json"),
    }
    path = tmp_path / "on-the-hub.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_by_the_name_of_a_recipe(hub: HubServer, tmp_path: Path) -> None:
    recipe = published_recipe(tmp_path, hub)
    hub.add(NAME, {})  # what comes later does not matter: the card names a commit
    assert same(load(recipe), load_weights(PACKAGED))
    assert same(
        load("st-protopnet-synthbirds", weights=f"{NAME}@{hub.repositories[NAME].commits and _first(hub)}"),
        load(recipe),
    )
    fails(lambda: load("linear-synthbirds", weights=f"{NAME}@{_first(hub)}"), "they are of st-protopnet")


def _first(hub: HubServer) -> str:
    return next(iter(hub.repositories[NAME].commits))


def test_weights_that_are_not_those_of_the_card(hub: HubServer, tmp_path: Path) -> None:
    recipe = published_recipe(tmp_path, hub, sha256="0" * 64)
    fails(lambda: load(recipe), "config.json", "altered or cut", NAME)
    assert cached_files(tmp_path) == []


# -- failures ----------------------------------------------------------------------------------------------------------


def test_what_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    fails(lambda: load("birders/gone"), "birders/gone", "no such repository", "hf auth login")
    hub.add("birders/readme", {"README.md": b"hello"})
    fails(lambda: load("birders/readme"), "birders/readme", "no weights of fgvczoo")
    hub.add("birders/bert", {"config.json": b'{"architectures": ["BertModel"]}'})
    fails(lambda: load("birders/bert"), "birders/bert", "not a config of fgvczoo")
    files = packaged()
    del files["model.safetensors"]
    hub.add("birders/half", files)
    fails(lambda: load("birders/half"), "birders/half", "model.safetensors")
    fails(lambda: load("birders//x"), "birders//x", "not found")


def test_what_may_not_be_read(hub: HubServer) -> None:
    hub.repositories[NAME].gated = True
    fails(lambda: load(NAME), NAME, "gated", "hf auth login")
    hub.repositories[NAME].gated = False
    hub.fail("HEAD", "config.json", status=401, times=9)
    fails(lambda: load(NAME), NAME, "hf auth login")


def test_a_server_that_recovers(hub: HubServer) -> None:
    hub.fail("HEAD", "config.json", times=3, status=500)
    hub.fail("GET", "model.safetensors", times=1, cut=100_000)
    assert same(load(NAME), load_weights(PACKAGED))
    assert any("model.safetensors" in request for request in hub.requests)


def test_a_server_that_does_not(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("HEAD", "config.json", times=99, status=500)
    fails(lambda: load(NAME), NAME, "cannot be reached", "500")
    assert cached_files(tmp_path) == []


def test_a_body_that_is_always_cut(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("GET", "model.safetensors", times=99, cut=0)
    fails(lambda: load(NAME), NAME, "try again")
    assert not any("incomplete" in name for name in cached_files(tmp_path))
    hub.faults.clear()
    assert same(load(NAME), load_weights(PACKAGED))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "prototypes.safetensors"])
def test_altered_bodies_never_become_a_model(hub: HubServer, tmp_path: Path, name: str) -> None:
    """Of the announced length and under the announced hash, which the client does not check."""
    altered = bytearray(packaged()[name])
    altered[len(altered) // 2] ^= 1
    recipe = published_recipe(tmp_path, hub)
    hub.fail("GET", name, times=99, content=bytes(altered))
    fails(lambda: load(recipe), name, "altered or cut", NAME)
    assert cached_files(tmp_path) == []
    hub.faults.clear()
    hub.fail("GET", name, times=1, content=bytes(altered))  # once: fetched again at once
    assert same(load(recipe), load_weights(PACKAGED))


def test_a_cache_that_rots_is_mended(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    load(NAME)
    file = next(Path(constants.HF_HUB_CACHE).rglob("model.safetensors")).resolve()
    file.write_bytes(file.read_bytes()[:1000])
    assert same(load(NAME), load_weights(PACKAGED))
    file = next(Path(constants.HF_HUB_CACHE).rglob("model.safetensors")).resolve()
    file.write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(lambda: load(NAME), "model.safetensors", "altered or cut")


def test_a_slow_server(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    # In a process of its own: the client reads its time limits when it is imported.
    hub.fail("HEAD", "config.json", times=99, delay=3.0)
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "slow"), "HF_HUB_OFFLINE": "0"},
        **{"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
    }
    program = (
        "import sys, time, fgvczoo.cli, huggingface_hub.file_download as client\n"
        "client._ETAG_RETRY_TIMEOUT, time.sleep = 1, lambda seconds: None\n"
        f"sys.exit(fgvczoo.cli.main(['predict', '{NAME}', 'bird.jpg']))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"fgvczoo: {NAME}: the Hub cannot be reached") and "timed out" in line.lower()


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert same(load(NAME), model)  # from the cache
    fails(lambda: load("birders/other"), "birders/other", "cannot be reached")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert parse_repo("owner/name") == Repo("owner/name", None)
    assert parse_repo("owner/name@v1.0") == Repo("owner/name", "v1.0")
    for text in ("runs/typo", "./owner/name", "../name", "st-protopnet-cub", "a/b/c", "/etc/passwd", "owner/", "-o/x"):
        assert parse_repo(text) is None, text
    fails(lambda: load("runs/typo"), "runs/typo")


# -- pushing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED, tmp_path / "weights"))


def test_push_then_load(hub: HubServer, folder: Path) -> None:
    pushed = push(folder, "birders/new", private=True)
    repository = hub.repositories["birders/new"]
    assert pushed == Repo("birders/new", repository.refs["main"])
    files = repository.commits[repository.refs["main"]]
    assert sorted(files) == sorted(FILES)
    card = files["README.md"].decode()
    assert 'fgvczoo.load("birders/new")' in card and "license: apache-2.0" in card and "bibtex" in card
    assert same(load("birders/new"), load(folder)) and same(load(str(pushed)), load(folder))
    assert push(folder, "birders/new").revision is not None  # again: nothing changes, nothing breaks


def test_push_to_a_branch_and_without_pictures(hub: HubServer, folder: Path) -> None:
    push(folder, "birders/new")
    (folder / "prototypes.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["files"]["prototypes.safetensors"]
    (folder / "config.json").write_text(json.dumps(config))
    push(folder, "birders/new", revision="plain")
    assert load("birders/new").prototype_pictures and not load("birders/new@plain").prototype_pictures
    files = hub.repositories["birders/new"]
    assert "prototypes.safetensors" not in files.commits[files.refs["plain"]]


def relicensed(folder: Path, **licence: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["licence"] |= licence
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_terms_decide(hub: HubServer, folder: Path) -> None:
    relicensed(folder, redistributable=False, weights="no licence stated")
    fails(lambda: push(folder, "birders/new", licence="mit"), "may not be passed on", "no licence stated")
    relicensed(folder, redistributable=None, weights="for who trains them to state")
    fails(lambda: push(folder, "birders/new"), "--licence")
    fails(lambda: push(folder, "birders/new", licence="CC BY"), "cc-by-nc-4.0")
    assert "birders/new" not in hub.repositories  # refused before anything is asked of the Hub
    push(folder, "birders/new", licence="cc-by-nc-4.0")
    files = hub.repositories["birders/new"]
    assert "license: cc-by-nc-4.0" in files.commits[files.refs["main"]]["README.md"].decode()


def test_nothing_of_others_is_overwritten(hub: HubServer, folder: Path) -> None:
    before = hub.add("birders/bert", {"config.json": b'{"architectures": ["BertModel"]}'})
    fails(lambda: push(folder, "birders/bert"), "other files", "another name")
    assert hub.repositories["birders/bert"].refs["main"] == before
    (folder / "model.safetensors").write_bytes(b"cut")
    fails(lambda: push(folder, "birders/new"), "altered or cut")
    assert "birders/new" not in hub.repositories
    for name in ("new", "birders/new@v1", "../new"):
        fails(lambda name=name: push(folder, name), "owner/name")


def test_pushes_that_fail(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    fails(lambda: push(folder, "birders/new"), "birders/new", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.fail("POST", "/commit/main", times=1, status=500)
    fails(lambda: push(folder, "birders/new"), "500")
    files = hub.repositories["birders/new"]
    assert files.commits[files.refs["main"]] == {}  # whole or not at all
    push(folder, "birders/new")
    assert same(load("birders/new"), load(folder))


def test_the_command(hub: HubServer, folder: Path, fgvczoo_in) -> None:
    status, out, err = fgvczoo_in("push", folder, "birders/new")
    assert status == 0 and "birders/new@" in out, err
    sha256 = file_sha256(folder / "config.json")
    assert sha256 in out  # what a recipe's card pins
    status, _, err = fgvczoo_in("push", relicensed(folder, redistributable=None), "birders/other")
    assert status == 2 and "--licence" in err and err.count("\n") == 1
    assert transport.is_cached(Repo("birders/other", None)) is False
