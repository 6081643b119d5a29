"""What holds for every registered data set, without new test code for a new one but a tiny copy of it."""

import inspect
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from fgvczoo.batch import Batch
from fgvczoo.data.base import FGVCDataModule
from fgvczoo.errors import FgvczooError
from fgvczoo.tasks.base import DataSource
from fgvczoo.zoo.registry import DATASETS, dataset_class
from tests.data.copies import COPIES
from tests.data.folder.make import make_table, write_table
from tests.data.hub.make import make_parquet
from tests.data.test_cub import same

DOCS = Path(__file__).parents[2] / "docs"
ROW = {"index", "image_id", "path", "label", "class_name", "split", "height", "width", "crop"}
COUNTS = {"train": 12, "test": 5}
VARIANTS = [*sorted(DATASETS), "hub, as a stream"]


@pytest.fixture(scope="module")
def copies(birds, tmp_path_factory):
    """The options that open a tiny copy of each data set."""
    roots = {name: tmp_path_factory.mktemp(name) for name in (*COPIES, "folder", "hub")}
    for name, copy in COPIES.items():
        copy.make(roots[name])
    write_table(roots["folder"] / "metadata.csv", make_table(roots["folder"]))
    make_parquet(roots["hub"], COUNTS)
    options = {
        name: {"root": str(root), **(COPIES[name].options if name in COPIES else {})} for name, root in roots.items()
    } | {"synthbirds": {"root": str(birds), "size": "tiny"}}
    assert options.keys() == DATASETS.keys(), "give the new data set a tiny copy"
    options["hub, as a stream"] = options["hub"] | {"streaming": True, "lengths": COUNTS, "buffer_size": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FGVCZOO_CACHE", str(tmp_path_factory.mktemp("own_cache")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield options


@pytest.fixture(params=VARIANTS)
def open_(request, copies):
    """Opens a data set with more options."""
    cls = dataset_class(request.param.partition(",")[0])
    small = {"preprocess": {"size": [16, 16]}, "batch_size": 4, "eval_batch_size": 3}
    return lambda **more: cls(**copies[request.param], **small | more)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_options_are_documented(name):
    cls = dataset_class(name)
    assert issubclass(cls, FGVCDataModule) and {"root", "repo"} & inspect.signature(cls).parameters.keys()
    parents = " ".join(base.__doc__ or "" for base in cls.__mro__ if issubclass(base, FGVCDataModule))
    words = set(parents.replace(",", " ").replace(":", " ").replace("`", " ").split())
    assert {option for option in inspect.signature(cls).parameters if option != "options"} <= words
    assert (DOCS / f"data/{name}.md").is_file()
    assert (
        f"{name}.md" in (DOCS / "data/index.md").read_text()
        and f"data/{name}.md" in (DOCS.parent / "mkdocs.yml").read_text()
    )
    assert f"::: {DATASETS[name]}\n" in (DOCS / "reference.md").read_text()


def test_it_is_a_source_of_data(open_):
    data = open_(keys=[])
    assert isinstance(data, DataSource) and data.num_classes == len(data.class_names) > 1
    assert {"train", "train_plain", "projection", "test"} <= data.splits.keys()
    for batch in data.train_dataloader():
        assert set(batch) == {"image", "index", "label"} and batch["image"].shape[1:] == (3, 16, 16)
        assert (batch["label"] < data.num_classes).all()


def test_rows_and_samples_agree_with_batches(open_):
    data = open_()
    indices = data.splits["test"][:4].tolist()
    batches = [
        row for batch in data.loader("test") for row in zip(batch["index"].tolist(), batch["image"], batch["label"])
    ]
    for (index, image, label), sample in zip(batches, data.samples(indices), strict=False):
        row = data.row(index)
        assert row.keys() >= ROW and row["index"] == sample["index"] == index and row["split"] == "test"
        assert data.find(str(row["image_id"])) == index
        assert sample["image"].equal(image) and sample["label"] == row["label"] == label
        assert row["class_name"] == data.reader.all_class_names[label]
        assert data.picture(index).shape == (row["height"], row["width"], 3)
        assert row["path"] is None or Path(row["path"]).is_absolute()
    assert [index for index, *_ in batches] == data.splits["test"].tolist()


def test_every_annotation_can_be_asked_for(open_):
    keys = [*open_().reader.keys, "size"]
    for batch in open_(keys=keys).loader("test"):
        assert set(keys) <= set(batch) <= set(Batch.__annotations__)
        assert all(len(batch[key]) == len(batch["index"]) for key in keys if key != "metadata")


def test_batches_come_from_seed_and_epoch_alone(open_):
    whole = list(open_(augmentation="small-birds").train_dataloader())
    assert same(whole, list(open_(augmentation="small-birds", num_workers=1).train_dataloader()))
    assert same(whole, list(pickle.loads(pickle.dumps(open_(augmentation="small-birds"))).train_dataloader()))
    assert not same(whole, list(open_(augmentation="small-birds", seed=1).train_dataloader()))


def test_two_processes_share_what_one_has(open_, monkeypatch):
    data = open_()
    whole, test = list(data.train_dataloader()), list(data.loader("test"))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (2, rank))
        shares.append((list(data.train_dataloader()), list(data.loader("test"))))
    for batch, one, other in zip(whole, shares[0][0], shares[1][0]):
        assert torch.cat([one["image"], other["image"]]).equal(batch["image"])
    joined = [batch["index"] for _, batches in shares for batch in batches]
    assert np.array_equal(torch.cat(joined), torch.cat([batch["index"] for batch in test]))


def test_the_middle_of_an_epoch_is_found_again(open_):
    whole = list(open_().train_dataloader())
    loader = open_().train_dataloader()
    loader.batch_sampler.skip = 2
    assert same(list(loader), whole[2:])


def test_batches_of_p_classes_with_k_images(open_, monkeypatch):
    options = {"images_per_class": 2, "batches_per_epoch": 5, "augmentation": "small-birds"}
    try:
        data = open_(**options)
    except FgvczooError as error:
        assert "a stream" in str(error)
        return
    whole = list(data.train_dataloader())
    assert len(whole) == 5
    for batch in whole:
        assert batch["label"].unique(return_counts=True)[1].tolist() == [2, 2]
    assert same(whole, list(open_(**options, num_workers=1).train_dataloader()))
    loader = open_(**options).train_dataloader()
    loader.batch_sampler.skip = 2
    assert same(list(loader), whole[2:])
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (2, rank))
        shares.append(list(data.train_dataloader()))
    for batch, one, other in zip(whole, *shares, strict=True):
        assert torch.cat([one["image"], other["image"]]).equal(batch["image"])
