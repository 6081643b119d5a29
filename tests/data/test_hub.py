import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import lightning
import numpy as np
import pytest
import torch

from fgvczoo.data.check import contact_sheet
from fgvczoo.data.hub import HubDataModule, HubStream, _reason
from fgvczoo.errors import FgvczooError
from fgvczoo.zoo.build import build_model
from fgvczoo.zoo.load import load
from fgvczoo.zoo.recipe import read_recipe
from tests.conftest import RECIPES
from tests.data.folder.make import make_folders
from tests.data.hub.make import NAMES, encoded, make_parquet
from tests.data.test_cub import Probe, order, same, trainer
from tests.hub_server import HubServer, Repository, files_of
from tests.test_distributed import TRUNKS

COUNTS = {"train": 22, "validation": 4, "test": 7}
STREAM = {"streaming": True, "lengths": {"train": 22, "val": 4, "test": 7}, "buffer_size": 5}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` writes of sets that it downloads goes to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return make_parquet(tmp_path_factory.mktemp("hub") / "my birds", COUNTS)


def module(root, **options) -> HubDataModule:
    small = {"preprocess": {"size": [8, 8]}, "batch_size": 4, "eval_batch_size": 3}
    return HubDataModule(root=str(root), **small | options)


def refused(message: str, root, **options) -> None:
    with pytest.raises(FgvczooError, match=message) as error:
        module(root, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The first row of every pass over a stream that is begun."""
    begun: list[int] = []
    rows = HubStream.rows

    def count(self, start):
        begun.append(start)
        return rows(self, start)

    monkeypatch.setattr(HubStream, "rows", count)
    return begun


# --- what is read


@pytest.mark.parametrize("options", [{}, STREAM], ids=["table", "stream"])
def test_splits_names_and_rows(shared, options):
    data = module(shared, **options)
    assert (data.dataset_name, data.class_names, data.num_classes) == ("my-birds", list(NAMES), 3)
    assert not data.licence_allows_pictures and len(data.reader) == 33
    assert {name: (int(rows[0]), len(rows)) for name, rows in data.splits.items()} == {
        "train": (0, 22), "val": (22, 4), "test": (26, 7), "train_plain": (0, 22), "projection": (0, 22),
    }  # fmt: skip
    assert data.row(28) == {
        "index": 28, "image_id": "test/2", "path": None, "label": 2, "class_name": "-dash", "split": "test",
        "height": 16, "width": 20, "crop": None,
    }  # fmt: skip
    assert data.row(23)["image_id"] == "validation/1" and data.find("validation/1") == 23
    assert data.reader.picture(28) == encoded(2002) and data.picture(28).shape == (16, 20, 3)
    for image_id in ("test/7", "val/1", "validation/-1", "x"):
        with pytest.raises(FgvczooError, match=f"no image '{image_id}'"):
            data.find(image_id)
    with pytest.raises(FgvczooError, match=r"row 33 of my-birds: expected 0\.\.32"):
        data.row(33)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_gives_what_the_table_gives(shared, workers):
    table, stream = module(shared), module(shared, num_workers=workers, **STREAM)
    for split in ("train_plain", "val", "test"):
        loader = stream.loader(split)
        expected = list(table.loader(split))
        assert same(list(loader), expected) and same(list(loader), expected)  # a second pass is like the first
    assert [stream.row(index) for index in (5, 30, 2)] == [table.row(index) for index in (5, 30, 2)]
    for index in (3, 1, 30):
        assert stream.sample(index)["image"].equal(table.sample(index)["image"])
    assert contact_sheet(stream, "test", 4).tobytes() == contact_sheet(table, "test", 4).tobytes()


@pytest.mark.parametrize("label", ["text", "numbers"])
def test_labels_without_names(tmp_path, label):
    root = make_parquet(tmp_path / "set", {"train": 9, "test": 3}, label=label)
    lengths = {"train": 9, "test": 3}
    names = sorted(NAMES) if label == "text" else ["0", "1", "2"]
    table = module(root)
    assert table.class_names == names
    refused(
        "the column 'label' of a stream does not name its classes; give class_names",
        root,
        streaming=True,
        lengths=lengths,
    )
    given = list(NAMES)
    for data in (module(root, class_names=given), module(root, class_names=given, streaming=True, lengths=lengths)):
        assert data.class_names == given
        assert [label for batch in data.loader("test") for label in batch["label"].tolist()] == [0, 1, 2]
    refused("row 2 of train: label .*", root, class_names=given[:2])
    short = module(root, class_names=given[:2], streaming=True, lengths=lengths)
    with pytest.raises(FgvczooError, match="row 2 of train: label"):
        list(short.loader("train"))


def test_names_of_the_set_may_be_replaced(shared):
    assert module(shared, class_names=["x", "y", "z"]).class_names == ["x", "y", "z"]
    refused("class_names: 2 names; my-birds has 3 classes", shared, class_names=["x", "y"])


def test_rows_without_a_label_are_refused(tmp_path):
    names = datasets.ClassLabel(names=list(NAMES))
    root = make_parquet(
        tmp_path / "set", {"train": 6, "test": 3}, name="real", more={"label": (names, [0, 1, 2, 0, 1, 2])}
    )
    unlabelled = make_parquet(
        tmp_path / "other", {"train": 6, "test": 3}, name="real", more={"label": (names, [0, -1, 2, 0, 1, 2])}
    )
    for file in root.glob("train*"):
        file.replace(unlabelled / file.name)
    refused(r"row 1 of test: label -1; expected 0\.\.2; -1 marks rows without a label", unlabelled)
    assert "test" in module(unlabelled, splits={"train": "train"}, test_fraction=0.4).splits  # cut from train


def test_splits_of_other_names(tmp_path):
    root = make_parquet(tmp_path / "set", {"train": 15, "validation": 3})
    data = module(root)
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 12, "val": 3, "test": 3, "train_plain": 12, "projection": 12,
    }  # fmt: skip
    assert np.bincount(data.reader.labels[data.splits["test"]]).tolist() == [1, 1, 1]
    assert {data.row(int(row))["split"] for row in data.splits["test"]} == {"test"}
    assert np.array_equal(module(root, seed=9).splits["test"], data.splits["test"])
    assert "test" not in module(root, test_fraction=0).splits
    other = module(root, splits={"train": "validation", "test": "train"})
    assert (len(other.splits["train"]), len(other.splits["test"]), "val" in other.splits) == (3, 15, False)
    refused("no split 'tran'; it has train, validation; did you mean train", root, splits={"train": "tran"})
    refused("splits: no 'dev'; expected train, val, test", root, splits={"dev": "validation"})
    refused(
        "no split train; it has train, validation; name one in splits as train", root, splits={"test": "validation"}
    )
    refused("one split for two of ours", root, splits={"train": "train", "test": "train"})
    refused("val_fraction=0.5, but set has a split val", root, val_fraction=0.5)


ANNOTATED = {
    "box": (datasets.List(datasets.Value("float32")), [[1, 1, 9 + row, 9] for row in range(6)]),
    "points": (datasets.List(datasets.List(datasets.Value("float32"))), [[[1, 2, 1], [3, 4, 0]]] * 6),
    "traits": (datasets.Array2D((1, 3), "float32"), [[[1, 2, 3]]] * 6),
    "seen": (datasets.Value("timestamp[s]"), [np.datetime64("2021-05-03T10:00:00", "s").item()] * 6),
    "regions": (datasets.Image(), [{"bytes": encoded(9), "path": None}] * 6),
    "depth": (datasets.Value("int16"), list(range(6))),
}
MAPPED = {"bbox": "box", "parts": "points", "date": "seen", "metadata.depth": "depth"}


def test_other_columns_become_annotations(tmp_path):
    root = make_parquet(tmp_path / "set", {"train": 6, "test": 3}, more=ANNOTATED)
    options = {"columns": MAPPED, "keys": ["bbox", "parts", "metadata"]}
    table = module(root, **options)
    stream = module(root, streaming=True, lengths={"train": 6, "test": 3}, **options)
    assert table.reader.keys == stream.reader.keys == ("bbox", "parts", "metadata")
    [batch] = module(root, eval_batch_size=6, **options).loader("train")
    assert torch.allclose(batch["bbox"][:, 2], torch.tensor([9.0 + row for row in range(6)]) * 8 / 20)
    assert batch["parts"].shape == (6, 2, 3) and np.array_equal(
        batch["metadata"]["date"].numpy(), [[5, np.nan, 3]] * 6, equal_nan=True
    )
    assert batch["metadata"]["depth"].flatten().tolist() == list(range(6))
    for split in ("train", "test"):
        assert same(list(table.loader(split)), list(stream.loader(split)))
    refused("keys: set has no 'attributes', only bbox, parts, metadata", root, **options | {"keys": ["attributes"]})
    refused("columns: no 'boxs'; did you mean boxes", root, columns={"boxs": "box"})
    refused("set: a column bbox_x0 without bbox_y0", root, columns={"bbox_x0": "depth"})
    refused("a column is given twice", root, columns={"bbox": "box", "parts": "box"})
    refused(
        "row 0 of train: attributes is .*expected a list of numbers",
        root,
        columns={"attributes": "traits"},
        keys=["attributes"],
    )


def test_masks_are_pictures_of_numbers(tmp_path):
    import io

    from PIL import Image

    mask = io.BytesIO()
    Image.fromarray(np.full((16, 20), 7, np.uint8)).save(mask, "PNG")
    more = {"regions": (datasets.Image(), [{"bytes": mask.getvalue(), "path": None}] * 6)}
    root = make_parquet(tmp_path / "set", {"train": 6, "test": 3}, more=more)
    for options in ({}, {"streaming": True, "lengths": {"train": 6, "test": 3}}):
        data = module(root, columns={"mask": "regions"}, keys=["mask"], **options)
        assert all((batch["mask"] == 7).all() for batch in data.loader("test"))


def test_rows_of_a_stream_must_be_alike(tmp_path):
    points = [[[1, 2, 1]], [[1, 2, 1]] * 2, None, [[1, 2, 1]], [[1, 2, 1]], [[1, 2, 1]]]
    more = {"parts": (ANNOTATED["points"][0], points)}
    root = make_parquet(tmp_path / "set", {"train": 6, "test": 1}, more=more)
    options = {"columns": {"parts": "parts"}, "keys": ["parts"]}
    refused("row 0 of train: parts does not hold 2 points as another row does", root, **options)
    data = module(root, streaming=True, lengths={"train": 6, "test": 1}, **options)
    with pytest.raises(FgvczooError, match=r"row 1 of train: parts is \(2, 3\), in other rows \(1, 3\)"):
        list(data.loader("train"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_pictures(tmp_path, streaming):
    make_folders(tmp_path / "set", {"train/b owl": 5, "train/a": 4, "test/a": 2})
    options = {"streaming": True, "lengths": {"train": 9, "test": 2}} if streaming else {}
    data = module(tmp_path / "set", **options)
    assert data.class_names == ["a", "b owl"]
    assert data.row(4)["path"] == str(tmp_path / "set/train/b owl/000.png")
    assert sum(len(batch["image"]) for batch in data.loader("train")) == 9
    (tmp_path / "set/train/a/001.png").unlink()
    with pytest.raises(FgvczooError, match=r"001\.png|broke off"):
        list(data.loader("train"))


@pytest.mark.parametrize("options", [{}, STREAM], ids=["table", "stream"])
def test_a_path_in_a_row_is_not_opened(tmp_path, options):
    """Of a stranger's data set it could name any file or address."""
    image = {"image": (datasets.Image(), [{"bytes": None, "path": "/etc/hostname"}] * 22)}
    root = make_parquet(tmp_path / "set", COUNTS, image="real", more=image)
    for file in root.glob("*.parquet"):  # as `to_parquet` writes bytes for paths
        table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "c"))
        table = table.cast_column("image", datasets.Image(decode=False))
        rows = [{"bytes": None, "path": "/etc/hostname"}] * len(table)
        features = datasets.Features(
            {
                "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                "label": table.features["label"],
            }
        )
        datasets.Dataset.from_dict({"image": rows, "label": table["label"]}, features=features).to_parquet(file)
    data = module(root, **options)
    with pytest.raises(
        FgvczooError, match="row 0 of train: expected the bytes of a picture in image, found only the path"
    ):
        data.sample(0)


# --- streams in training


def test_the_order_of_a_stream_comes_from_seed_and_epoch(shared):
    def epochs(**options):
        data = module(shared, **STREAM | options)
        loader = data.train_dataloader()
        seen = []
        for epoch in (0, 1, 0):
            data.set_epoch(epoch)
            seen.append(order(loader))
        return seen

    first, second, again = epochs()
    assert first == again != second
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
        assert sorted(row for batch in batches for row in batch) == list(range(22))
    assert epochs(num_workers=1) == [first, second, first] != epochs(seed=1)
    near = [row for batch in epochs(buffer_size=1)[0] for row in batch]
    assert near == list(range(22))  # a buffer of one row shuffles nothing
    far = [row for batch in epochs(buffer_size=100)[0] for row in batch]
    assert max(far[:5]) > 10


def test_augmentation_of_a_stream_comes_from_the_row(shared):
    seen = []
    for options in ({}, {"num_workers": 1}, {"buffer_size": 100}):
        batches = list(module(shared, augmentation="small-birds", **STREAM | options).train_dataloader())
        seen.append({row: image for batch in batches for row, image in zip(batch["index"].tolist(), batch["image"])})
    assert all(seen[0][row].equal(other[row]) for other in seen[1:] for row in range(22))
    table = module(shared, augmentation="small-birds").train_dataloader()
    images = {row: image for batch in table for row, image in zip(batch["index"].tolist(), batch["image"])}
    assert all(seen[0][row].equal(images[row]) for row in range(22))


def test_processes_share_the_batches_of_a_stream_and_decode_their_own(shared, monkeypatch):
    data = module(shared, **STREAM)
    alone, test = list(data.loader("train", augment=True, shard="train")), order(data.loader("test"))
    decoded: list[int] = []
    read = HubStream.read
    monkeypatch.setattr(HubStream, "read", lambda self, index: decoded.append(index) or read(self, index))
    shares, tests = [], []
    for rank in (0, 1):
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (2, rank))
        decoded.clear()
        shares.append(list(data.loader("train", augment=True, shard="train")))
        assert len(decoded) == 11
        tests.append(order(data.loader("test")))
    for whole, one, other in zip(alone, *shares, strict=True):
        assert same({k: torch.cat([one[k], other[k]]) for k in whole}, whole)
    assert [row for share in tests for rows in share for row in rows] == [row for rows in test for row in rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop_at", [2, 6, 9, 12])  # epochs have 6 steps
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_reads_on_where_it_stopped(shared, tmp_path, workers, stop_at, monkeypatch):
    def start(probe, **call):
        callback = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        data = module(shared, augmentation="flip", num_workers=workers, **STREAM)
        run = trainer(tmp_path, max_epochs=3, callbacks=[callback], num_sanity_val_steps=0)
        run.fit(probe, data, **call)
        return probe

    whole = start(Probe())
    assert [epoch for epoch, _ in whole.seen] == [0] * 6 + [1] * 6 + [2] * 6
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        start(killed := Probe(stop_at))
    decoded: list[int] = []
    read = HubStream.read
    monkeypatch.setattr(HubStream, "read", lambda self, index: decoded.append(index) or read(self, index))
    resumed = start(Probe(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert killed.seen[:stop_at] + resumed.seen == whole.seen
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    if not workers:  # those of the skipped batches were not decoded
        assert len([row for row in decoded if row < 22]) == sum(len(rows) for _, rows in resumed.seen)


def test_samples_in_order_are_one_pass(shared, passes):
    data = module(shared, **STREAM)
    for index, sample in zip((2, 5, 21), data.samples((2, 5, 21))):
        assert sample["index"] == index == data.row(index)["index"]
    assert passes == [0]
    data.row(3)
    assert passes == [0, 0]


def test_projection_over_a_stream_is_that_over_the_table(shared, passes):
    found = []
    for options in ({}, STREAM):
        torch.manual_seed(0)
        model = build_model(read_recipe(RECIPES / "protopnet-tiny.yaml"), num_classes=3, preprocess={"size": [32, 32]})
        model.project(module(shared, preprocess={"size": [32, 32]}, **options))
        found.append((model.state_values()["sources"], model.state_dict()))
    assert found[0][0] == found[1][0] and same(dict(found[0][1]), dict(found[1][1]))
    assert found[0][0]["part"][0]["image"].startswith("train/")
    assert passes == [0, 0]  # one to search, one to describe what was found


def test_streams_can_be_sent_to_processes(shared):
    for options in ({}, STREAM):
        data = module(shared, **options)
        data.row(3)
        assert same(list(pickle.loads(pickle.dumps(data)).train_dataloader()), list(data.train_dataloader()))
        rows = data.loader("test").dataset
        first = rows[0]["image"]
        assert pickle.loads(pickle.dumps(rows))[0]["image"].equal(first) and rows[0]["image"].equal(first)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, STREAM], ids=["table", "stream"])
def test_spawned_workers_give_the_same(shared, options):
    data = module(shared, augmentation="flip", num_workers=1, **options)
    loader = data.train_dataloader()
    loader.inner.multiprocessing_context = "spawn"
    assert same(list(loader), list(module(shared, augmentation="flip", **options).train_dataloader()))


def test_a_stream_in_the_order_of_classes_is_warned_of(tmp_path, shared):
    root = make_parquet(tmp_path / "set", {"train": 30, "test": 1}, by_class=True)
    data = module(root, streaming=True, lengths={"train": 30, "test": 1}, buffer_size=4)
    with pytest.warns(UserWarning, match="the first 4 rows hold 1 of 3 classes: the stream seems sorted by class"):
        list(data.train_dataloader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(data.loader("train"))
        list(module(shared, **STREAM).train_dataloader())


# --- unreadable pictures


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """A set of which rows 1 and 2 of train cannot be read, and one of test has no picture."""
    images = [{"bytes": encoded(row), "path": None} for row in range(8)]
    images[1]["bytes"], images[2]["bytes"] = b"junk", encoded(2)[:80]
    more = {"image": (datasets.Image(decode=False), images)}
    return make_parquet(tmp_path_factory.mktemp("damaged") / "set", {"train": 8, "test": 1}, image="real", more=more)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_row_is_named_or_skipped(damaged, streaming, workers):
    options = {"streaming": True, "lengths": {"train": 8, "test": 1}, "buffer_size": 3} if streaming else {}
    data = module(damaged, num_workers=workers, **options)
    for loader in (data.train_dataloader(), data.loader("train")):
        with pytest.raises(FgvczooError, match=r"^set, row [12] of train: (not an image|corrupt image)") as error:
            list(loader)
        assert "\n" not in str(error.value)
    data = module(damaged, num_workers=workers, on_corrupt="skip", **options)
    for loader in (data.train_dataloader(), data.loader("train")):
        with pytest.warns(UserWarning, match="2 unreadable pictures were skipped"):
            rows = [row for batch in order(loader) for row in batch]
        assert sorted(rows) == [0, 3, 4, 5, 6, 7]
    assert set(data.skipped) == {"set, row 1 of train", "set, row 2 of train"}


def test_a_batch_of_a_stream_that_is_lost_altogether(damaged):
    options = {"streaming": True, "lengths": {"train": 8, "test": 1}, "on_corrupt": "skip"}
    data = module(damaged, batch_size=1, buffer_size=1, **options)
    with pytest.warns(UserWarning, match="2 unreadable"):
        assert order(data.train_dataloader()) == [[0], [3], [3], [3], [4], [5], [6], [7]]


# --- mistakes


def test_what_is_given_must_fit(shared, tmp_path):
    with pytest.raises(FgvczooError, match="give repo, a data set of the Hub as owner/name, or root"):
        HubDataModule()
    with pytest.raises(FgvczooError, match=r"repo='\.\./birds'; expected a data set of the Hub as owner/name"):
        HubDataModule(repo="../birds")
    refused("test_fraction=1; expected a number", shared, test_fraction=1)
    refused("buffer_size=0; expected at least 1", shared, buffer_size=0)
    refused("num_workers=2; a stream has one reader: give 1, or 0", shared, num_workers=2, **STREAM)
    refused("val_fraction: nothing can be cut from a stream; name a split as val", shared, val_fraction=0.1, **STREAM)
    refused("lengths: of use to a stream only", shared, lengths={"train": 3})
    refused("lengths: no split 'dev', only train, val, test", shared, **STREAM | {"lengths": {"dev": 3}})
    refused("gone: no such folder; expected one of Parquet", tmp_path / "gone")
    refused("no data files in it; expected Parquet", tmp_path)
    refused("no config 'birds'; it has default", shared, config="birds")
    for name, message in (
        ("junk.parquet", "cannot be read"),
        ("notes.txt", "no column 'image' in train, which has text"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("neither")
        refused(message, folder)
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "saved")
    refused("saved: written by save_to_disk; write it with to_parquet", tmp_path / "saved")


def test_a_folder_here_is_not_taken_for_the_hub(tmp_path, monkeypatch):
    make_parquet(tmp_path / "owner/birds", {"train": 3})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FgvczooError, match="repo='owner/birds' is also a folder here; give it as root"):
        HubDataModule(repo="owner/birds")


def test_columns_that_are_not_there(tmp_path):
    root = make_parquet(tmp_path / "set", {"train": 6, "test": 3}, image="img", name="species")
    refused(r"no column 'image' in train, which has img, species; is it img\? Give columns: \{image: NAME\}", root)
    columns = {"image": "img"}
    refused(r"no column 'label' in train, which has img, species; is it species\?", root, columns=columns)
    refused("no column 'specis' in train, .*; is it species", root, columns=columns | {"label": "specis"})
    refused(
        "the column 'species' holds ClassLabel.*; expected pictures", root, columns={"image": "species", "label": "img"}
    )
    assert module(root, columns=columns | {"label": "species"}).num_classes == 3


def test_a_stream_must_be_as_long_as_it_says(tmp_path):
    root = make_parquet(tmp_path / "set", {"train": 6, "test": 3})
    refused("set: does not say how many rows train has; give lengths: {train: NUMBER}", root, streaming=True)
    short = module(root, streaming=True, lengths={"train": 4, "test": 3})
    assert order(short.loader("train")) == [[0, 1, 2], [3]] and short.splits["test"][0] == 4
    long = module(root, streaming=True, lengths={"train": 9, "test": 3})
    with pytest.raises(
        FgvczooError, match=r"set: train ended after 6 rows, 9 were expected; give lengths: \{train: 6\}"
    ):
        list(long.loader("train"))
    skipping = module(root, streaming=True, lengths={"train": 9, "test": 3}, on_corrupt="skip")
    for _ in range(2):  # it is not taken for an unreadable picture, and begins anew when it is asked again
        with pytest.raises(FgvczooError, match="ended after 6 rows"):
            list(skipping.loader("train"))
        with pytest.raises(FgvczooError, match="ended after 6 rows"):
            skipping.row(8)
    assert skipping.row(5)["image_id"] == "train/5"
    refused("lengths: 0 rows of train; expected 1", root, streaming=True, lengths={"train": 0, "test": 3})


def test_a_stream_without_test(tmp_path):
    root = make_parquet(tmp_path / "set", {"train": 6})
    data = module(root, streaming=True, lengths={"train": 6})
    with pytest.raises(FgvczooError, match="set has no split 'test', only train"):
        data.loader("test")


@pytest.mark.parametrize(
    "error, message",
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "cannot be reached, and there is no copy"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "a script of its own, which is not"),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"), "it has a, b"),
        (ValueError("BuilderConfig 'x' not found. Available: ['xy', 'z']"), "no config 'x'; .*; did you mean xy"),
        (OSError("two\nlines"), r"cannot be read \(OSError: two lines\)"),
    ],
)  # fmt: skip
def test_reasons_are_one_line(error, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FgvczooError, match=f"^hub:a/b: .*{message}") as caught:
        HubDataModule(repo="a/b", config="x")
    assert "\n" not in str(caught.value) and _reason(error, "x", None) in str(caught.value)


# --- the Hub and the command line

PROGRAM = """
import json, sys
from pathlib import Path
import datasets
datasets.disable_progress_bars()
from fgvczoo.data.hub import HubDataModule
from fgvczoo.errors import FgvczooError

def open_(**options):
    return HubDataModule(**{"batch_size": 4, "preprocess": {"size": [8, 8]}} | options)

def refusal(**options):
    try:
        open_(**options)
    except FgvczooError as error:
        return str(error)

def rows(data):
    return [batch["index"].tolist() for batch in data.train_dataloader()]

lengths = {"train": 12, "test": 3}
found = {}
for workers in (0, 1):
    stream = open_(repo="owner/birds", streaming=True, lengths=lengths, num_workers=workers, revision=sys.argv[1])
    found[f"stream {workers}"] = rows(stream)
pictures = open_(repo="owner/pictures", streaming=True, lengths={"train": 6})
found["pictures"] = [sum(len(b["image"]) for b in pictures.loader("train")), pictures.class_names]
found["kept"] = [path.name for path in Path(sys.argv[2]).rglob("*") if path.suffix in (".parquet", ".arrow", ".png")]
found["table"] = rows(open_(repo="owner/birds", num_workers=1))
found["files"] = [open_(repo="owner/pictures").row(3)["class_name"]]
found["refused"] = [
    refusal(repo="owner/gone"), refusal(repo="owner/gated"), refusal(repo="owner/birds", revision="v9"),
]
print(json.dumps(found))
"""


def test_sets_of_the_hub_through_the_real_client(tmp_path):
    make_parquet(tmp_path / "served/owner/birds", {"train": 12, "test": 3})
    make_folders(tmp_path / "served/owner/pictures", {"train/a": 3, "train/b owl": 3})
    home = tmp_path / "home"
    with HubServer() as hub:
        commit = hub.add("datasets/owner/birds", files_of(tmp_path / "served/owner/birds"))
        hub.add("datasets/owner/pictures", files_of(tmp_path / "served/owner/pictures"))
        hub.repositories["datasets/owner/gated"] = Repository(gated=True)
        environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HUB_OFFLINE"] = "0"
        command = [sys.executable, "-c", PROGRAM, commit, str(home)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["stream 0"] == found["stream 1"]
        assert sorted(row for batch in found["stream 0"] for row in batch) == list(range(12))
        assert found["pictures"] == [6, ["a", "b owl"]] and found["files"] == ["b owl"]
        assert found["kept"] == []  # nothing of a stream is kept
        assert sorted(row for batch in found["table"] for row in batch) == list(range(12))
        gone, gated, revision = found["refused"]
        assert gone.startswith("hub:owner/gone: not on the Hub, or private")
        assert gated.startswith("hub:owner/gated: gated on the Hub; accept its terms")
        assert revision.startswith("hub:owner/birds: no revision 'v9'")
        before = len(hub.requests)
        program = "import sys; sys.argv[1:] = []\n" + PROGRAM[: PROGRAM.index("lengths =")]
        program += "print(len(open_(repo='owner/birds').reader), refusal(repo='owner/other'))"
        environment["HF_HUB_OFFLINE"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(
            "15 hub:owner/other: the Hub cannot be reached, and there is no copy in the cache"
        )
        assert len(hub.requests) == before


def fit(paper: str, root: Path, run: Path, *more: object) -> list[str]:
    data = {"streaming": "true", "lengths": '{"train": 22, "val": 4, "test": 7}', "buffer_size": 5, "root": root}
    options = [word for name, value in data.items() for word in (f"--data.{name}", str(value))]
    recipe = RECIPES / f"{paper}-tiny.yaml"
    return [str(word) for word in ("--config", recipe, "--run", run, "--data", "hub", *options, *more)]


def test_a_recipe_trains_on_a_stream_and_resumes_to_the_bit(shared, tmp_path, fgvczoo_in, monkeypatch):
    from fgvczoo.zoo.registry import model_class

    assert fgvczoo_in("fit", *fit("protopnet", shared, tmp_path / "whole"))[0] == 0
    paper = model_class("protopnet")
    step = paper.training_step

    def press(self, batch, batch_idx):
        if self.trainer.global_step == 8:  # in the middle of the second epoch
            os.kill(os.getpid(), 2)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(paper, "training_step", press)
        assert fgvczoo_in("fit", *fit("protopnet", shared, tmp_path / "broken"))[0] == 130
    assert fgvczoo_in("fit", *fit("protopnet", shared, tmp_path / "broken", "--ckpt_path", "last"))[0] == 0
    whole, resumed = (load(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert same(dict(whole), dict(resumed))
    config = (tmp_path / "whole/weights/config.json").read_text()
    assert str(shared) not in config and '"my-birds"' in config  # no path of the machine travels with weights


def test_two_processes_read_a_stream_as_one(shared, tmp_path, fgvczoo_in):
    """22 rows: a last batch that is even, as several processes cut it to a multiple of their number."""
    one, two = (
        ["fit", *fit("linear", shared, tmp_path / str(number), *TRUNKS["linear"], "--trainer.devices", number)]
        for number in (1, 2)
    )
    status, _, err = fgvczoo_in(*one)
    assert status == 0, err
    command = [sys.executable, "-m", "fgvczoo", *two]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    states = [load(tmp_path / number).state_dict() for number in ("1", "2")]
    for key in states[0]:
        torch.testing.assert_close(states[1][key], states[0][key], rtol=1e-3, atol=1e-4, msg=key)


def test_options_reach_the_data_module(shared, fgvczoo_in):
    run = (
        "fit",
        "--config",
        RECIPES / "linear-tiny.yaml",
        "--data",
        "hub",
        "--data.root",
        shared,
    )
    status, _, err = fgvczoo_in(*run, "--data.columns", '{"label": "specis"}')
    assert status == 2 and "no column 'specis'" in err and len(err.strip().splitlines()) == 1
    status, _, err = fgvczoo_in(*run, "--data.config", "birds")
    assert status == 2 and "no config 'birds'" in err and len(err.strip().splitlines()) == 1
    status, _, err = fgvczoo_in(*run, "--data.class_names", '["x", "y"]')
    assert status == 2 and "class_names: 2 names" in err
