import math
import pickle
import shutil
import warnings
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from fgvczoo.data import cub
from fgvczoo.data.check import check_official, contact_sheet
from fgvczoo.data.cub import CUB, CUBDataModule, SynthBirdsDataModule
from fgvczoo.data.transforms import AUGMENTATIONS
from fgvczoo.errors import FgvczooError
from fgvczoo.nn.metadata import MetadataEncoder
from tests.data.cub.make import ATTRIBUTES, PARTS, make_cub

KEYS = ["bbox", "parts", "attributes", "mask", "size"]
SMALL = {"size": [32, 32]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A copy that tests only read, and what is in it."""
    root = tmp_path_factory.mktemp("cub")
    return root, make_cub(root)


@pytest.fixture
def copy(shared, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(shared[0], tmp_path / "cub")
    return tmp_path / "cub"


def module(root, **options) -> CUBDataModule:
    return CUBDataModule(str(root), **{"preprocess": SMALL, "batch_size": 4, "eval_batch_size": 5} | options)


def order(loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def same(one, other) -> bool:
    """Equal batches, to the bit; NaN is NaN."""
    if isinstance(one, torch.Tensor):
        nan = one.is_floating_point()
        return one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy(), equal_nan=nan)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))


# --- what is read


def test_counts_classes_and_order(shared):
    root, birds = shared
    data = module(root)
    assert (data.num_classes, data.dataset_name, data.licence_allows_pictures) == (3, "cub", False)
    assert data.class_names == ["001.Tiny_Bird_A", "002.Tiny_Bird_B", "003.Tiny_Bird_C"]
    assert data.reader.image_ids.tolist() == [bird.image_id for bird in birds]
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 12, "test": 9, "train_plain": 12, "projection": 12,
    }  # fmt: skip
    assert [birds[row].is_train for row in data.splits["train"]] == [True] * 12
    batches = list(data.loader("test"))
    assert [len(batch["image"]) for batch in batches] == [5, 4]
    rows = torch.cat([batch["index"] for batch in batches]).tolist()
    assert rows == [row for row, bird in enumerate(birds) if not bird.is_train]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [birds[row].label for row in rows]


@pytest.mark.parametrize("segmentations", ["inside", "beside"])
@pytest.mark.parametrize("attributes_at", ["beside", "inside", "attributes"])
@pytest.mark.parametrize("inner", [False, True])
def test_every_place_of_files_is_found(tmp_path, segmentations, attributes_at, inner):
    make_cub(tmp_path, classes=2, train=2, test=2, segmentations=segmentations, attributes_at=attributes_at)
    data = module(tmp_path / "CUB_200_2011" if inner else tmp_path, keys=KEYS)
    assert set(next(iter(data.loader("test")))) == {"image", "index", "label", "attribute_certainty", *KEYS}


def test_annotations_are_joined_by_image_id(shared):
    root, birds = shared
    data = module(root, keys=KEYS)
    for split in ("train_plain", "test"):
        for batch in data.loader(split):
            assert batch["image"].dtype == torch.float32 and batch["image"].shape[1:] == (3, 32, 32)
            assert batch["mask"].shape[1:] == (32, 32) and batch["bbox"].dtype == batch["parts"].dtype == torch.float32
            for place, row in enumerate(batch["index"].tolist()):
                bird = birds[row]
                height, width = bird.size
                assert batch["size"][place].tolist() == [height, width]
                assert batch["attributes"][place].tolist() == bird.attributes.tolist()
                assert batch["attribute_certainty"][place].tolist() == bird.certainty.tolist()
                x, y, w, h = bird.box
                scale = np.array([32 / width, 32 / height])
                expected = np.array([x, y, x + w, y + h]) * [*scale, *scale]
                assert np.allclose(batch["bbox"][place], expected, atol=1e-4)
                assert np.allclose(batch["parts"][place], bird.parts * [*scale, 1], atol=1e-4)
                # The mask is where the picture is bright, and the box around it.
                bright = data.preprocess.invert(batch["image"][place])[..., 0] > 125
                assert ((batch["mask"][place].numpy() == 1) == bright).mean() > 0.9
                rows, columns = np.nonzero(bright)
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.abs(found - expected).max() < 1.5


def test_names_groups_and_class_attributes(shared):
    root, birds = shared
    reader = module(root).reader
    assert reader.part_names == list(PARTS) and reader.attribute_names == list(ATTRIBUTES)
    assert reader.flip_pairs == ((6, 10), (7, 11), (8, 12))
    expected = [100 * np.mean([b.attributes for b in birds if b.label == label], axis=0) for label in range(3)]
    assert np.allclose(reader.class_attributes, expected)


def test_a_row_tells_the_original_coordinates(shared):
    root, birds = shared
    data = module(root, cropped=True)
    row = data.row(5)
    x, y, w, h = birds[5].box
    assert row["bbox"] == pytest.approx([x, y, x + w, y + h])
    assert row["crop"] == (round(x), round(y), round(x + w), round(y + h))
    assert (row["height"], row["width"]) == birds[5].size and row["image_id"] == birds[5].image_id
    assert Path(row["path"]).is_file() and row["class_name"] == "001.Tiny_Bird_A"
    with pytest.raises(FgvczooError, match=r"row 21 .* 0\.\.20"):
        data.row(21)


def test_cropped_pictures_are_what_pillow_crops(shared):
    root, birds = shared
    data = module(root, cropped=True, keys=KEYS, preprocess={"size": [32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]})
    for split in ("train_plain", "test"):
        for batch in data.loader(split):
            for place, row in enumerate(batch["index"].tolist()):
                bird = birds[row]
                x, y, w, h = bird.box
                with Image.open(root / "CUB_200_2011/images" / bird.path) as image:
                    crop = image.convert("RGB").crop((x, y, x + w, y + h))
                resized = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR))
                assert np.abs(data.preprocess.invert(batch["image"][place]).astype(int) - resized).max() <= 6
                assert batch["size"][place].tolist() == list(bird.size)
                assert np.allclose(batch["bbox"][place], [0, 0, 32, 32], atol=1.5)
                assert (batch["mask"][place] == 1).float().mean() > 0.9
                moved = (bird.parts[:, :2] - [round(x), round(y)]) * [32 / crop.width, 32 / crop.height]
                inside = (bird.parts[:, 2] > 0) & (moved >= 0).all(axis=1) & (moved < 32).all(axis=1)
                assert np.allclose(batch["parts"][place], np.column_stack([moved, inside]) * inside[:, None], atol=1e-4)


def test_metric_learning_splits_by_class(shared):
    data = module(shared[0], protocol="metric-learning", val_fraction=0.3)
    labels = data.reader.labels
    assert data.num_classes == 1 and data.class_names == ["001.Tiny_Bird_A"]
    assert set(labels[data.splits["train"]]) == set(labels[data.splits["val"]]) == {0}
    assert len(data.splits["train"]) + len(data.splits["val"]) == 7
    for name in ("test", "query", "gallery"):
        assert set(labels[data.splits[name]]) == {1, 2} and len(data.splits[name]) == 14
    row = data.row(20)  # its label is none of those that are trained on, its official split is train
    assert (row["label"], row["class_name"], row["split"]) == (2, "003.Tiny_Bird_C", "test")
    assert {label for batch in data.loader("query") for label in batch["label"].tolist()} == {1, 2}


def test_the_real_set_must_have_its_counts(copy, monkeypatch):
    """A set whose classes are the real 200 is counted; one of another size is not."""
    base = copy / "CUB_200_2011"
    names = ["1 001.Black_footed_Albatross", *(f"{number} {number:03d}.Bird" for number in range(2, 201))]
    (base / "classes.txt").write_text("\n".join(names) + "\n")
    with pytest.raises(
        FgvczooError, match=r"21 images, 12 for training and 9 for testing; expected 11,788, 5,994 and 5"
    ):
        module(copy)
    monkeypatch.setattr(cub, "_IMAGES", 21)
    monkeypatch.setattr(cub, "_TRAIN", 12)
    monkeypatch.setattr(cub, "_TEST", 9)
    assert module(copy).num_classes == 200


# --- splits and loaders


def test_validation_is_cut_from_every_class_of_train(shared):
    root = shared[0]
    whole, cut, other = module(root), module(root, val_fraction=0.5), module(root, val_fraction=0.5, seed=7)
    train, val = cut.splits["train"], cut.splits["val"]
    assert sorted([*train, *val]) == whole.splits["train"].tolist()
    assert np.bincount(cut.reader.labels[val]).tolist() == [2, 2, 2]
    assert np.array_equal(cut.splits["test"], whole.splits["test"])
    assert np.array_equal(other.splits["val"], val)  # the same for every seed
    assert np.array_equal(cut.splits["projection"], train) and np.array_equal(cut.splits["train_plain"], train)
    assert order(cut.val_dataloader()) == [val.tolist()[:5], val.tolist()[5:]]
    assert whole.val_dataloader() == []
    nearly_all = module(root, val_fraction=0.99)
    assert np.bincount(nearly_all.reader.labels[nearly_all.splits["train"]]).tolist() == [1, 1, 1]
    with pytest.raises(FgvczooError, match="leaves no val image"):
        module(root, val_fraction=0.01)


def test_projection_is_ordered_and_not_augmented(shared):
    data = module(shared[0], augmentation="protopnet")
    plain = module(shared[0])
    for name in ("projection", "train_plain", "train"):
        batches = list(data.loader(name))
        assert [row for batch in batches for row in batch["index"].tolist()] == data.splits["train"].tolist()
        assert all(map(same, batches, plain.loader("projection")))


@pytest.mark.parametrize("augmentation", [name for name in AUGMENTATIONS if name != "none"])
def test_batches_do_not_depend_on_workers(shared, augmentation):
    keys = ["attributes"] if augmentation == "timm-imagenet" else KEYS  # it does not move boxes and masks along
    options = {"augmentation": augmentation, "keys": keys}
    alone, helped = (module(shared[0], num_workers=n, **options) for n in (0, 2))
    loaders = [data.loader("train", augment=True, shard="train") for data in (alone, helped)]
    seen = []
    for epoch in (0, 1):
        for data in (alone, helped):
            data.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        assert same(*batches)
        seen.append(batches[0])
    assert not same(seen[0], seen[1])
    images = [dict(zip(b["index"].tolist(), b["image"])) for epoch in seen for b in epoch]
    first, second = images[0] | images[1] | images[2], images[3] | images[4] | images[5]
    assert sum(first[row].equal(second[row]) for row in first) < 12  # each epoch draws anew


def test_augmentation_depends_on_the_seed_alone(shared):
    batches = [list(module(shared[0], augmentation="protopnet", seed=seed).train_dataloader()) for seed in (0, 0, 1)]
    assert same(batches[0], batches[1]) and not same(batches[0], batches[2])


def test_processes_share_global_batches(shared, monkeypatch):
    data = module(shared[0], augmentation="flip")
    alone = list(data.loader("train", augment=True, shard="train"))
    test = order(data.loader("test"))
    shares, tests = [], []
    for rank in (0, 1):
        monkeypatch.setattr(data, "_processes", lambda rank=rank: (2, rank))
        shares.append(list(data.loader("train", augment=True, shard="train")))
        tests.append(order(data.loader("test")))
    for whole, one, other in zip(alone, *shares, strict=True):
        assert torch.cat([one["index"], other["index"]]).equal(whole["index"])
        assert torch.cat([one["image"], other["image"]]).equal(whole["image"])
    assert [row for rows in tests[0] + tests[1] for row in rows] == [row for rows in test for row in rows]
    data.batch_size = 3
    with pytest.raises(FgvczooError, match="multiple of 2"):
        data.loader("train", shard="train")


def test_data_modules_and_loaders_can_be_sent_to_processes(shared):
    data = module(shared[0], augmentation="protopnet", keys=KEYS)
    first = list(data.train_dataloader())
    assert same(first, list(pickle.loads(pickle.dumps(data)).train_dataloader()))
    rows = pickle.loads(pickle.dumps(data.loader("test").dataset))
    assert len(rows) == 9 and "image" in rows[0]


@pytest.mark.slow
def test_spawned_workers_give_the_same(shared):
    data = module(shared[0], augmentation="protopnet", num_workers=1)
    loader = data.train_dataloader()
    loader.inner.multiprocessing_context = "spawn"
    assert same(list(loader), list(module(shared[0], augmentation="protopnet").train_dataloader()))


# --- in a Lightning trainer


class Probe(lightning.LightningModule):
    """Learns something from every image, and remembers the batches it was given."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3)
        self.seen: list[tuple[int, list[int]]] = []
        self.evaluated: list[int] = []
        self.stop_at = stop_at

    def on_train_epoch_start(self) -> None:
        self.trainer.datamodule.set_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].mean(dim=(2, 3))), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch["index"].tolist()

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def trainer(folder, **options) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, use_distributed_sampler=False, **(quiet | options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop_at", [2, 3, 5, 6])  # epochs have 3 steps
@pytest.mark.parametrize("saving, workers", [("step", 0), ("step", 2), ("epoch", 0), ("validation", 0)])
def test_a_resumed_run_goes_on_with_the_same_pictures(shared, tmp_path, workers, stop_at, saving):
    def start(probe, **call):
        options = {"step": {"every_n_train_steps": 1}, "epoch": {"save_on_train_epoch_end": True}, "validation": {}}
        callback = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, **options[saving])
        data = module(shared[0], augmentation="protopnet", num_workers=workers, batch_size=3, val_fraction=0.25)
        trainer(tmp_path, max_epochs=3, callbacks=[callback]).fit(probe, data, **call)
        return probe

    whole = start(Probe())
    assert [epoch for epoch, _ in whole.seen] == [0] * 3 + [1] * 3 + [2] * 3
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        start(killed := Probe(stop_at))
    if not (tmp_path / "last.ckpt").exists():
        assert stop_at < 3
        return
    steps = torch.load(tmp_path / "last.ckpt")["global_step"]
    assert steps == (stop_at if saving == "step" else stop_at // 3 * 3)
    resumed = start(Probe(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert killed.seen[:steps] + resumed.seen == whole.seen
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop_at", [2, 5, 6])  # epochs have 5 steps
def test_a_resumed_run_goes_on_with_the_same_classes(shared, tmp_path, stop_at):
    def start(probe, **call):
        callback = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        data = module(shared[0], augmentation="flip", images_per_class=2, batches_per_epoch=5)
        trainer(tmp_path, max_epochs=2, callbacks=[callback]).fit(probe, data, **call)
        return probe

    whole = start(Probe())
    assert [epoch for epoch, _ in whole.seen] == [0] * 5 + [1] * 5
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        start(killed := Probe(stop_at))
    resumed = start(Probe(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert killed.seen + resumed.seen == whole.seen
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_a_limited_epoch_resumes_at_its_end(shared, tmp_path):
    whole = Probe()
    quiet = {"limit_train_batches": 2, "enable_checkpointing": False}
    trainer(tmp_path, max_epochs=2, **quiet).fit(whole, module(shared[0]))
    run = trainer(tmp_path, max_epochs=1, **quiet)
    run.fit(first := Probe(), module(shared[0]))
    run.save_checkpoint(tmp_path / "one.ckpt")
    second = Probe()
    trainer(tmp_path, max_epochs=2, **quiet).fit(second, module(shared[0]), ckpt_path=str(tmp_path / "one.ckpt"))
    assert first.seen + second.seen == whole.seen


@pytest.mark.filterwarnings("ignore")
def test_validation_testing_and_prediction_see_their_split_once(shared, tmp_path):
    data = module(shared[0], val_fraction=0.25)
    probe = Probe()
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0)
    run.fit(probe, data)
    assert probe.evaluated == data.splits["val"].tolist()
    for call in (run.test, run.predict):
        probe.evaluated.clear()
        call(probe, data)
        assert probe.evaluated == data.splits["test"].tolist()
    run.fit(Probe(), module(shared[0]))  # no validation split: none is run


def test_options_reach_the_data_module_from_a_config(shared):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    init = {
        "root": str(shared[0]),
        "cropped": True,
        "batch_size": 4,
        "keys": ["bbox"],
        "preprocess": {"size": [16, 16]},
    }
    config = parser.parse_object({"data": {"class_path": "fgvczoo.data.cub.CUBDataModule", "init_args": init}})
    data = parser.instantiate_classes(config).data
    assert data.batch_size == 4 and data.keys == ("bbox",) and data.reader.cropped and data.preprocess.size == (16, 16)
    with pytest.raises(Exception, match="bach_size"):
        parser.parse_object({"data": {"class_path": "fgvczoo.data.cub.CUBDataModule", "init_args": {"bach_size": 4}}})


# --- unreadable pictures


def damage(root: Path, birds, rows) -> list[str]:
    paths = [root / "CUB_200_2011/images" / birds[row].path for row in rows]
    for path in paths:
        path.write_bytes(path.read_bytes()[:300])
    return [str(path) for path in paths]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_one_line_that_names_it(shared, copy, workers):
    data = module(copy, num_workers=workers)
    [path] = damage(copy, shared[1], data.splits["train"][:1])
    for loader in (data.train_dataloader(), data.loader("train")):
        with pytest.raises(FgvczooError) as error:
            list(loader)
        assert str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_skipped_counted_and_reported(shared, copy, workers):
    data = module(copy, num_workers=workers, on_corrupt="skip", augmentation="flip")
    train = data.splits["train"].tolist()
    paths = damage(copy, shared[1], train[1:3])
    for loader in (data.train_dataloader(), data.loader("train")):
        with pytest.warns(UserWarning, match="2 unreadable pictures were skipped") as caught:
            batches = list(loader)
        assert all(any(path in str(warning.message) for warning in caught) for path in paths)
        rows = sorted(row for batch in batches for row in batch["index"].tolist())
        assert rows == sorted(set(train) - set(train[1:3]))
        assert all(len(batch["image"]) == len(batch["label"]) for batch in batches)
    assert set(data.skipped) == set(paths) and all("corrupt" in reason for reason in data.skipped.values())


def test_a_batch_that_is_lost_altogether(shared, copy):
    data = module(copy, on_corrupt="skip", eval_batch_size=2)
    rows = data.splits["test"][:2]
    damage(copy, shared[1], rows)
    with pytest.warns(UserWarning, match="2 unreadable"):
        batches = order(data.loader("test"))
    assert batches == [[2, 7], [8, 9], [14, 15], [16]]
    # A training batch is filled from the rows that follow: the number of steps stays.
    lost = data.loader("train", shard="train").batch_sampler
    damage(copy, shared[1], data.splits["train"][[place for _, place in next(iter(lost))]])
    with pytest.warns(UserWarning, match="unreadable"):
        batches = order(data.train_dataloader())
    assert len(batches) == 3 and all(batches)
    with pytest.warns(UserWarning, match="unreadable"):
        assert order(data.train_dataloader()) == batches


def test_a_split_without_a_readable_picture_is_an_error(shared, copy):
    data = module(copy, on_corrupt="skip")
    damage(copy, shared[1], data.splits["train"])
    with pytest.raises(FgvczooError, match="no picture of the split can be read"):
        list(data.train_dataloader())


# --- mistakes


def test_a_missing_or_wrong_root_says_what_was_looked_for(tmp_path):
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FgvczooError, match=r"get CUB_200_2011\.tgz from https://data\.caltech\.edu") as error:
            CUBDataModule(root if root is None else str(root))
        assert "\n" not in str(error.value)
    (tmp_path / "CUB_200_2011.tgz").write_bytes(b"")
    with pytest.raises(FgvczooError, match=r"CUB_200_2011\.tgz is not unpacked; run: tar -xzf"):
        module(tmp_path)


FILES = [
    "image_class_labels.txt",
    "train_test_split.txt",
    "classes.txt",
    "bounding_boxes.txt",
    "parts/parts.txt",
    "parts/part_locs.txt",
    "attributes/image_attribute_labels.txt",
    "../attributes.txt",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / "CUB_200_2011" / name).unlink()
    with pytest.raises(FgvczooError, match=Path(name).name):
        module(copy, keys=KEYS, cropped=True)


@pytest.mark.parametrize("name", ["images.txt", *FILES])
@pytest.mark.parametrize("content", ["", "1 x\x00y\n", "1\n", "nothing to see here\n", "99999 1 1 1 1\n"])
def test_a_file_with_something_else_is_named(copy, name, content):
    (copy / "CUB_200_2011" / name).write_text(content)
    with pytest.raises(FgvczooError) as error:
        module(copy, keys=KEYS, cropped=True)
    assert "\n" not in str(error.value) and (".txt" in str(error.value) or "images are missing" in str(error.value))


def edit(root: Path, name: str, change) -> None:
    path = root / "CUB_200_2011" / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


def without(lines: list[str], image_id: int) -> list[str]:
    return [line for line in lines if line.split()[0] != str(image_id)]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("images.txt", lambda lines: [*lines, lines[0]], "occurs twice"),
        ("images.txt", lambda lines: [*lines, "999 ../../secret.jpg"], "outside the images folder"),
        ("images.txt", lambda lines: [*lines, "999 /etc/secret.jpg"], "outside the images folder"),
        ("images.txt", lambda lines: [*lines, "999 001.Bird/gone.jpg"], r"1 of 22 listed images are missing.*gone"),
        ("images.txt", lambda lines: lines[1:], "is not in images.txt"),
        ("train_test_split.txt", lambda lines: [*lines, "999 1"], r"split\.txt: image 999 is not in images\.txt"),
        ("train_test_split.txt", lambda lines: lines[1:], r"split\.txt: 0 lines for image"),
        ("train_test_split.txt", lambda lines: [*lines, lines[0]], r"split\.txt: 2 lines for image"),
        ("train_test_split.txt", lambda lines: [line[:-1] + "2" for line in lines], "expected 0 or 1"),
        ("train_test_split.txt", lambda lines: [line[:-1] + "0" for line in lines], "no training image"),
        ("image_class_labels.txt", lambda lines: [*without(lines, 2), "2 4"], r"image 2 has class 4; expected 1\.\.3"),
        ("image_class_labels.txt", lambda lines: [*without(lines, 2), "2 0"], r"image 2 has class 0; expected 1\.\.3"),
        ("classes.txt", lambda lines: lines[1:], r"not 1\.\.2, each once"),
        ("bounding_boxes.txt", lambda lines: [*without(lines, 2), "2 1 1 0 5"], "'2' has no area"),
        ("bounding_boxes.txt", lambda lines: [*without(lines, 2), "2 1 1 nan 5"], "'2' has no area"),
        ("parts/part_locs.txt", lambda lines: lines[1:], "0 lines for part"),
        ("parts/part_locs.txt", lambda lines: [*lines, lines[0]], "2 lines for part"),
        ("parts/part_locs.txt", lambda lines: [*lines, "2 16 1 1 1"], r"part 16 of image 2; expected 1\.\.15"),
        ("attributes/image_attribute_labels.txt", lambda lines: lines[1:], "0 lines for attribute"),
        ("attributes/image_attribute_labels.txt", lambda lines: [*lines, "2 4 1 1 1"], "attribute 4 of image 2"),
    ],
)
def test_files_that_do_not_fit_together(copy, name, change, message):
    edit(copy, name, change)
    with pytest.raises(FgvczooError, match=message) as error:
        module(copy, keys=KEYS)
    assert "\n" not in str(error.value)


def test_missing_segmentations_matter_only_where_asked_for(tmp_path):
    make_cub(tmp_path, classes=2, train=2, test=1, segmentations=None)
    module(tmp_path, keys=["bbox", "parts", "attributes"])
    with pytest.raises(FgvczooError, match=r"segmentations\.tgz from https"):
        module(tmp_path, keys=["mask"])


def test_a_mask_that_does_not_fit_is_named(shared, copy):
    path = (copy / "CUB_200_2011/segmentations" / shared[1][0].path).with_suffix(".png")
    Image.new("L", (5, 5)).save(path)
    with pytest.raises(FgvczooError, match=r"0000\.jpg: picture of .* mask of \(5, 5\)"):
        list(module(copy, keys=["mask"]).loader("test"))
    path.unlink()
    with pytest.raises(FgvczooError, match=r"0000\.png: cannot be read"):
        list(module(copy, keys=["mask"]).loader("test"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore'"),
        ({"keys": ["boxs"]}, "has no 'boxs', only bbox"),
        ({"keys": ["metadata"]}, "has no 'metadata'"),
        ({"augmentation": "flipp"}, "did you mean flip"),
        ({"preprocess": {"sizes": 3}}, "did you mean size"),
        ({"protocol": "retrieval"}, "expected 'standard'"),
        ({"images_per_class": 0}, "images_per_class=0"),
        ({"images_per_class": 2, "batches_per_epoch": 0}, "batches_per_epoch=0"),
        ({"batches_per_epoch": 5}, "without images_per_class"),
    ],
)
def test_options_out_of_range(shared, options, message):
    with pytest.raises(FgvczooError, match=message):
        module(shared[0], **options)


def test_unknown_splits_and_shards(shared):
    data = module(shared[0])
    with pytest.raises(FgvczooError, match="give val_fraction"):
        data.loader("val")
    with pytest.raises(FgvczooError, match="did you mean train"):
        data.loader("trian")
    with pytest.raises(FgvczooError, match="shard='padded'"):
        data.loader("test", shard="padded")


# --- looking at a set


def test_the_check_passes_a_whole_copy_and_changes_nothing(shared):
    root = shared[0]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    report = check_official(CUB, root, progress=False)
    assert report.ok and report.lines()[-1] == "nothing is wrong"
    assert any("21 images of 3 classes (12 train, 9 test)" in line for line in report.lines())
    assert any("1 pictures are grey" in line for line in report.lines())
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_the_check_names_all_that_is_wrong(shared, copy):
    paths = damage(copy, shared[1], [3, 8])
    edit(copy, "bounding_boxes.txt", lambda lines: lines[1:])
    Image.new("L", (5, 5)).save((copy / "CUB_200_2011/segmentations" / shared[1][0].path).with_suffix(".png"))
    report = check_official(CUB, copy, progress=False)
    text = "\n".join(report.lines())
    assert not report.ok and text.endswith("4 things are wrong")
    assert all(path in text for path in paths) and "bounding_boxes.txt: 0 lines" in text and "has (5, 5)" in text
    assert not check_official(CUB, copy / "nowhere", progress=False).ok


def test_the_check_allows_a_copy_without_segmentations(tmp_path):
    make_cub(tmp_path, segmentations=None)
    report = check_official(CUB, tmp_path, progress=False)
    assert report.ok and any(line.startswith("note") and "segmentations.tgz" in line for line in report.lines())


@pytest.mark.parametrize("augment", [False, True])
def test_a_contact_sheet_shows_the_split(shared, augment):
    data = module(shared[0], keys=["bbox", "parts"], augmentation="protopnet")
    assert contact_sheet(data, "test", 6, columns=3, augment=augment).size == (3 * 36 + 4, 2 * 50 + 4)
    assert contact_sheet(data, "test", 100).size == (6 * 36 + 4, 2 * 50 + 4)
    assert contact_sheet(module(shared[0]), "train", 1).size == (40, 54)


# --- SynthBirds


def test_synthetic_birds_are_read_by_the_same_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = SynthBirdsDataModule(size="tiny", keys=[*KEYS, "metadata"], preprocess=SMALL, augmentation="small-birds")
    assert isinstance(data, CUBDataModule)
    assert (data.num_classes, data.dataset_name, data.licence_allows_pictures) == (4, "synthbirds", True)
    [batch] = data.train_dataloader()
    assert batch["image"].shape == (16, 3, 32, 32) and batch["attributes"].shape == (16, 312)
    place, date = batch["metadata"]["place"], batch["metadata"]["date"]
    valid = batch["metadata_valid"]
    assert place.shape == (16, 2) and date.shape == (16, 3) and place.dtype == date.dtype == torch.float32
    assert valid["place"].dtype == torch.bool and valid["place"].any()
    assert (
        place[valid["place"]].abs().amax(0).le(torch.tensor([90.0, 180.0])).all() and not place[~valid["place"]].any()
    )
    assert date[valid["date"]][:, 0].ge(1).all() and date[valid["date"]][:, 0].le(12).all()
    again = SynthBirdsDataModule(size="tiny", root=str(data.reader.folder.parent), preprocess=SMALL)
    assert np.array_equal(again.splits["train"], data.splits["train"])
    assert check_official(CUB, data.reader.folder.parent, progress=False).ok


def test_absent_metadata_is_zero_and_invalid(copy, monkeypatch):
    rows = ["image_id,latitude,longitude,date,hour,location_uncertainty"]
    rows += [f"{3 * number + 2},0.0,-12.5,2015-07-09,6,30" for number in range(1, 21)] + ["2,,,,,"]
    (copy / "metadata.csv").write_text("\n".join(rows) + "\n")
    data = module(copy, keys=["metadata"])
    batch = next(iter(data.loader("test")))
    assert batch["metadata"]["place"][:2].tolist() == [[0, 0], [0, -12.5]]
    assert batch["metadata"]["date"][:2].tolist() == [[0, 0, 0], [7, 6, 9]]
    assert batch["metadata_valid"]["place"].tolist() == [False, True, True, True, True]
    (encoded,) = MetadataEncoder({"date": "month-day"}).encode(batch["metadata"], batch["metadata_valid"])
    month, day = 2 * math.pi * 7 / 12, 2 * math.pi * 9 / 31  # BirdSAT's circles
    truth = [math.sin(month), math.cos(month), math.sin(day), math.cos(day)]
    torch.testing.assert_close(encoded[:2], torch.tensor([[0.0] * 4, truth]))
    (copy / "metadata.csv").write_text("\n".join(rows).replace("2015-07-09", "July") + "\n")
    with pytest.raises(FgvczooError, match=r"metadata\.csv"):
        module(copy, keys=["metadata"])


def test_views_are_further_augmentations_of_a_picture(shared) -> None:
    data = module(shared[0], view_augmentations=["flip", "random-crop", "none"], batch_size=4)
    batch = next(iter(data.loader("train", augment=True, shard="train")))
    assert len(batch["views"]) == 3 and all(view.shape == batch["image"].shape for view in batch["views"])
    assert torch.equal(batch["views"][2], batch["image"]) and not torch.equal(batch["views"][1], batch["image"])
    again = next(iter(data.loader("train", augment=True, shard="train")))
    assert all(torch.equal(a, b) for a, b in zip(batch["views"], again["views"]))
    assert "views" not in next(iter(data.loader("test")))
    with pytest.raises(FgvczooError, match="augmentation='blur'"):
        module(shared[0], view_augmentations=["blur"])


# -- copies cut from the corners ---------------------------------------------------------------------------------------


def test_corner_views_are_cut_as_prototree_cuts_them(birds: Path) -> None:
    data = SynthBirdsDataModule(root=str(birds), size="tiny", views="corners", preprocess={"size": [32, 32]})
    plain = SynthBirdsDataModule(root=str(birds), size="tiny")
    count = len(plain.splits["train"])
    assert len(data.splits["train"]) == 5 * count and (data.splits["train_plain"] == plain.splits["train"]).all()
    assert (data.splits["test"] == plain.splits["test"]).all() and len(data.splits["projection"]) == count
    first = int(plain.splits["train"][0])
    x0, y0, x1, y1 = (int(value) for value in plain.row(first)["bbox"])
    height, width = plain.row(first)["height"], plain.row(first)["width"]
    dx, dy = int(0.1 * (x1 - x0)), int(0.1 * (y1 - y0))
    right, lower, left, upper = min(x1 + dx, width), min(y1 + dy, height), max(x0 - dx, 0), max(y0 - dy, 0)
    expected = [(0, 0, right, lower), (0, upper, right, height), (left, 0, width, lower), (left, upper, width, height)]
    corners = [int(row) for row in data.splits["train"][count : count + 4]]
    assert [data.row(row)["crop"] for row in corners] == expected
    assert {data.row(row)["image_id"] for row in corners} == {plain.row(first)["image_id"]}
    box = data.row(int(data.splits["projection"][0]))
    assert box["crop"] == (x0, y0, x1, y1) and data.find(str(box["image_id"])) == first
    batch = next(iter(data.loader("projection")))
    assert (
        len(batch["image"]) == count and batch["label"].tolist() == plain.reader.labels[plain.splits["train"]].tolist()
    )
    for options, words in (({"views": "cuts"}, "views"), ({"views": "corners", "cropped": True}, "cropped")):
        with pytest.raises(FgvczooError, match=words):
            SynthBirdsDataModule(root=str(birds), size="tiny", **options)
