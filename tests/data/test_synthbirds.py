"""SynthBirds: a pure function of (seed, class, index), written in CUB-200-2011's layout."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgvczoo.data import synthbirds
from fgvczoo.data.synthbirds import SIZES, Size, draw, genotypes, make, sibling_pairs
from fgvczoo.errors import FgvczooError

TINY = SIZES["tiny"]
SMALL_SIDES = Size(4, 1, 1, 60, 60)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("synthbirds") / "tiny", "tiny", workers=1, progress=False)


def rows(root: Path, name: str) -> list[list[str]]:
    return [line.split(" ") for line in (root / "CUB_200_2011" / name).read_text().splitlines()]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- classes


def test_genotypes_are_distinct_and_far_apart() -> None:
    classes = genotypes(100)
    assert len(set(classes)) == 200
    bases = classes[::2]

    def nearest(some: tuple[synthbirds.Genotype, ...]) -> int:
        return min(sum(a != b for a, b in zip(one, other)) for one, other in combinations(some, 2))

    assert nearest(bases[:50]) >= 4
    assert nearest(bases) >= 3
    for genotype in classes:
        assert all(value in synthbirds.FACTORS[factor] for factor, value in genotype._asdict().items())


def test_a_longer_table_begins_with_the_shorter_one() -> None:
    assert genotypes(100, 3)[:20] == genotypes(10, 3)
    assert genotypes(10, 3) != genotypes(10, 4)


def test_siblings_differ_in_exactly_the_declared_factor() -> None:
    classes = genotypes(100)
    for number, pair in enumerate(sibling_pairs(100)):
        one, other = (classes[label]._asdict() for label in pair.classes)
        assert pair.classes == (2 * number, 2 * number + 1)
        assert [name for name in one if one[name] != other[name]] == [pair.factor]
    assert {pair.factor for pair in sibling_pairs(8)} == set(synthbirds.FACTORS)


def test_class_names() -> None:
    assert synthbirds.class_folder(0) == "001.Synthetic_Bird_A1"
    assert synthbirds.class_folder(51) == "052.Synthetic_Bird_Z2"
    assert synthbirds.class_folder(52) == "053.Synthetic_Bird_AA1"
    assert len({synthbirds.class_name(label) for label in range(200)}) == 200


# ---------------------------------------------------------------- drawings


def test_a_drawing_depends_on_nothing_but_its_arguments() -> None:
    one = draw(0, 5, 3)
    np.random.seed(1)  # noqa: NPY002 (the global generator must not matter)
    assert draw(0, 4, 3).image.any()
    other = draw(0, 5, 3)
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.parts, other.parts)
    for changed in (draw(1, 5, 3), draw(0, 4, 3), draw(0, 5, 4)):
        assert changed.image.shape != one.image.shape or not np.array_equal(changed.image, one.image)


def test_the_generator_is_frozen() -> None:
    """Not the bits, which may differ with Pillow and the processor, but where things lie and how they look."""
    drawing = draw(0, 13, 22, Size(10, 30, 30, 128, 128))
    assert drawing.factors == FROZEN_FACTORS
    assert drawing.box == FROZEN_BOX
    np.testing.assert_allclose(drawing.parts[1], FROZEN_BEAK, atol=0.01)
    np.testing.assert_allclose(drawing.image.mean(axis=(0, 1)), FROZEN_MEAN, atol=0.5)
    np.testing.assert_allclose(drawing.image[drawing.mask].mean(axis=0), FROZEN_BIRD_MEAN, atol=0.5)


FROZEN_FACTORS = {
    "beak_color": "red",
    "beak_shape": "hooked",
    "eye_ring": "white",
    "cap": "black",
    "wing": "spots",
    "belly": "plain",
    "tail": "pointed",
    "leg_color": "pink",
}
FROZEN_BOX = (13, 58, 101, 105)
FROZEN_BEAK = (93.348, 74.736, 1.0)
FROZEN_MEAN = (137.80, 124.50, 130.54)
FROZEN_BIRD_MEAN = (171.21, 146.73, 138.60)


def test_nuisances_cover_their_ranges() -> None:
    scenes = [draw(0, label, index, TINY).scene for label in range(4) for index in range(100)]
    assert {scene.width for scene in scenes} == {scene.height for scene in scenes} == set(range(60, 69))
    assert 0.4 < np.mean([scene.flipped for scene in scenes]) < 0.6
    assert 0.09 < np.mean([scene.occluder is not None for scene in scenes]) < 0.21
    for scene in scenes:
        assert (np.linalg.det(scene.matrix) < 0) == scene.flipped


def test_the_whole_bird_is_in_the_frame() -> None:
    for label in range(20):
        for index in range(10):
            mask = draw(0, label, index).mask
            assert mask.any()
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def test_box_and_masks_are_exact() -> None:
    hidden = 0
    for label in range(20):
        for index in range(10):
            drawing = draw(0, label, index)
            assert drawing.image.shape == (drawing.scene.height, drawing.scene.width, 3)
            assert drawing.mask.shape == drawing.visible_mask.shape == drawing.image.shape[:2]
            x0, y0, x1, y1 = drawing.box
            inside = np.zeros_like(drawing.visible_mask)
            inside[y0:y1, x0:x1] = True
            seen = drawing.visible_mask
            assert not (seen & ~inside).any()
            assert seen[y0].any() and seen[y1 - 1].any() and seen[:, x0].any() and seen[:, x1 - 1].any()
            assert not (seen & ~drawing.mask).any()
            if drawing.scene.occluder is None:
                assert np.array_equal(seen, drawing.mask)
            hidden += bool((drawing.mask & ~seen).any())
    assert hidden > 10


def test_the_mask_is_where_the_bird_changes_the_picture() -> None:
    for index in range(10):
        bird, scenery = draw(0, 3, index), draw(0, 3, index, without_part="bird")
        differs = (bird.image != scenery.image).any(axis=2)
        assert np.array_equal(differs & ~scenery.removed, np.zeros_like(differs))
        # A pixel that the bird covers at all is removed; the mask holds those that it covers to a half.
        assert not (bird.visible_mask & ~scenery.removed).any()
        assert scenery.removed.sum() < 1.35 * bird.visible_mask.sum()
        assert not scenery.mask.any()
        assert scenery.box == (0, 0, 0, 0)
        assert not scenery.parts.any()


@pytest.mark.parametrize("part", sorted(synthbirds.PARTS))
def test_a_drawing_without_a_part_differs_only_there(part: str) -> None:
    for label, index in ((0, 0), (3, 1), (9, 2), (14, 3), (19, 4)):
        whole, edited = draw(0, label, index), draw(0, label, index, without_part=part)
        differs = (whole.image != edited.image).any(axis=2)
        assert not (differs & ~edited.removed).any()
        shown = part != "cap" or whole.factors["cap"] != "none"
        if shown and whole.region(part).any():
            assert differs.any()
        if not shown:
            assert not edited.removed.any()
        assert not edited.region(part).any()


def test_siblings_differ_only_in_the_part_of_their_factor() -> None:
    """In the same scene, that is; `draw` gives every class its own."""
    for pair in sibling_pairs(10):
        one = draw(0, pair.classes[0], 0)
        other = replace(one, scene=replace(one.scene, genotype=genotypes(10)[pair.classes[1]]))
        differs = (one.image != other.image).any(axis=2)
        part = replace(one, without_part=pair.part).removed | replace(other, without_part=pair.part).removed
        assert differs.any()
        assert not (differs & ~part).any()


def test_the_visible_side_follows_the_flip() -> None:
    seen_flipped = set()
    for index in range(40):
        drawing = draw(0, 2, index)
        x = dict(zip(synthbirds.CUB_PART_NAMES, drawing.parts))
        near, far = ("left", "right") if drawing.scene.flipped else ("right", "left")
        seen_flipped.add(drawing.scene.flipped)
        assert not x[f"{far} eye"].any() and not x[f"{far} wing"].any()
        if drawing.scene.occluder is None:
            assert x[f"{near} eye"][2] == x[f"{near} wing"][2] == x["left leg"][2] == x["right leg"][2] == 1
            assert drawing.parts[:, 2].sum() == 13
            facing_left = x["beak"][0] < x["tail"][0]
            assert facing_left == drawing.scene.flipped
        for part in drawing.parts:
            assert part[2] == 1 or not part.any()
    assert seen_flipped == {True, False}


def test_visible_parts_lie_on_their_regions() -> None:
    for label in range(20):
        for index in range(5):
            drawing = draw(0, label, index)
            for part, ids in synthbirds.CUB_PARTS_OF.items():
                near = np.pad(drawing.region(part), 2)
                for x, y, visible in drawing.parts[np.array(ids) - 1]:
                    if visible:
                        assert near[int(y) : int(y) + 5, int(x) : int(x) + 5].any(), (label, index, part)


def test_parts_under_the_occluder_are_invisible() -> None:
    hidden = 0
    for index in range(150):
        drawing = draw(0, 1, index)
        count = drawing.parts[:, 2].sum()
        assert count == 13 or drawing.scene.occluder is not None
        hidden += int(13 - count)
    assert hidden > 10


# ---------------------------------------------------------------- files


def test_layout(root: Path) -> None:
    assert {path.name for path in root.iterdir()} == {"attributes.txt", "CUB_200_2011", "synthbirds.json"}
    assert {path.name for path in (root / "CUB_200_2011").iterdir()} == {
        *("README", "images", "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"),
        *("bounding_boxes.txt", "parts", "attributes", "segmentations", "satellite", "metadata.csv"),
        *("train.json", "val.json", "sibling_pairs.csv"),
    }
    stamp = json.loads((root / "synthbirds.json").read_text())
    assert stamp["version"] == synthbirds.VERSION and stamp["seed"] == 0 and Size(**stamp["size"]) == TINY


def test_counts_and_joins(root: Path) -> None:
    ids = [str(number) for number in range(1, 33)]
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"):
        assert [row[0] for row in rows(root, name)] == ids
    labels = [int(label) for _, label in rows(root, "image_class_labels.txt")]
    assert labels == [label for label in (1, 2, 3, 4) for _ in range(8)]
    folders = dict(rows(root, "classes.txt"))
    for (_, image), label in zip(rows(root, "images.txt"), labels):
        assert image.split("/")[0] == folders[str(label)]
        assert (root / "CUB_200_2011" / "images" / image).is_file()
    split = np.array([int(flag) for _, flag in rows(root, "train_test_split.txt")]).reshape(4, 8)
    assert split[0, 0] == 0
    assert (split.sum(axis=1) == 4).all()
    assert [row[:2] for row in rows(root, "parts/part_locs.txt")] == [[i, str(p)] for i in ids for p in range(1, 16)]
    assert len(rows(root, "parts/parts.txt")) == 15
    clicked = rows(root, "parts/part_click_locs.txt")
    assert len(clicked) == 32 * 15 * 3 and all(len(row) == 6 for row in clicked)
    assert len(list((root / "CUB_200_2011" / "images").rglob("*.jpg"))) == 32
    assert {path.stem for path in (root / "CUB_200_2011" / "satellite").iterdir()} == set(ids)


@pytest.mark.parametrize("size", [Size(1, 3, 5), Size(1, 5, 3), Size(1, 7, 0), Size(1, 30, 30), Size(1, 1, 4)])
def test_splits_have_their_sizes(size: Size) -> None:
    flags = [size.is_train(index) for index in range(size.per_class)]
    assert sum(flags) == size.train_per_class
    assert flags[0] == (size.test_per_class == 0)


def test_files_hold_the_drawings(root: Path) -> None:
    folder = root / "CUB_200_2011"
    boxes = {row[0]: [float(value) for value in row[1:]] for row in rows(root, "bounding_boxes.txt")}
    parts = np.array([[float(value) for value in row[2:]] for row in rows(root, "parts/part_locs.txt")])
    for number, (image_id, name) in enumerate(rows(root, "images.txt")):
        label, index = divmod(number, 8)
        assert name.split("_")[-2:] == [f"{index:04d}", f"{image_id}.jpg"]
        drawing = draw(0, label, index, "tiny")
        picture = Image.open(folder / "images" / name)
        assert picture.mode == ("L" if image_id == "25" else "RGB")
        error = np.abs(np.asarray(picture.convert("RGB")).astype(int) - drawing.image)
        assert picture.mode == "L" or error.mean() < 8
        mask = Image.open(folder / "segmentations" / Path(name).with_suffix(".png"))
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), np.where(drawing.visible_mask, 255, 0))
        x, y, width, height = boxes[image_id]
        assert (x, y, x + width, y + height) == drawing.box
        np.testing.assert_allclose(parts[15 * number : 15 * number + 15], drawing.parts, atol=0.051)


def test_attribute_names_are_those_of_cub(root: Path) -> None:
    names = [line.split(" ", 1) for line in (root / "attributes.txt").read_text().splitlines()]
    assert [number for number, _ in names] == [str(number) for number in range(1, 313)]
    assert names[0][1] == "has_bill_shape::curved_(up_or_down)"
    # The first attribute of each of the 28 groups.
    firsts = (
        *(1, 10, 25, 40, 55, 59, 74, 80, 95, 106, 121, 136, 150, 153, 168, 183, 198, 213, 218, 223, 237, 241),
        *(245, 249, 264, 279, 294, 309),
    )
    groups = [name.split("::")[0] for _, name in names]
    assert [i + 1 for i in range(312) if i == 0 or groups[i] != groups[i - 1]] == list(firsts)
    assert names[216][1] == "has_wing_shape::long-wings" and names[235][1] == "has_shape::perching-like"


def test_attributes(root: Path) -> None:
    labels = rows(root, "attributes/image_attribute_labels.txt")
    assert len(labels) == 32 * 312
    assert [len(row) for row in labels].count(6) == 1 and {len(row) for row in labels} == {5, 6}
    table = np.array([[int(value) for value in row[:4]] for row in labels]).reshape(32, 312, 4)
    assert (table[:, :, 0] == np.arange(1, 33)[:, None]).all() and (table[:, :, 1] == np.arange(1, 313)).all()
    present, certainty = table[:, :, 2], table[:, :, 3]
    assert not present[certainty == 1].any()
    assert 0.06 < np.isin(certainty, (2, 3)).mean() < 0.10
    names = list(synthbirds.ATTRIBUTE_NAMES)
    for number in range(32):
        look = genotypes(2)[number // 8]
        implied = {
            f"has_bill_color::{look.beak_color}",
            f"has_bill_shape::{look.beak_shape}",
            f"has_leg_color::{look.leg_color}",
            "has_tail_shape::" + {"square": "squared"}.get(look.tail, look.tail) + "_tail",
            "has_wing_pattern::" + {"plain": "solid", "bars": "striped", "spots": "spotted"}[look.wing],
            "has_belly_pattern::" + {"plain": "solid", "streaks": "striped", "spots": "spotted"}[look.belly],
            *(["has_head_pattern::eyering"] if look.eye_ring != "none" else []),
            *(["has_head_pattern::capped", f"has_crown_color::{look.cap}"] if look.cap != "none" else []),
        }
        for name in implied:
            column = names.index(name)
            if certainty[number, column] != 1:
                assert present[number, column] == (certainty[number, column] == 4)
    means = np.array([[float(value) for value in row] for row in rows(root, CONTINUOUS)])
    np.testing.assert_allclose(means, 100 * present.reshape(4, 8, 312).mean(axis=1), atol=1e-3)


CONTINUOUS = "attributes/class_attribute_labels_continuous.txt"


def test_every_factor_shows_in_the_attributes() -> None:
    from fgvczoo.data.synthbirds.annotations import true_attributes

    for factor, values in synthbirds.FACTORS.items():
        base = genotypes(1)[0]
        seen = {true_attributes(base._replace(**{factor: value}), "green").tobytes() for value in values}
        assert len(seen) == len(values)


def test_place_and_date(root: Path) -> None:
    with (root / "CUB_200_2011" / "metadata.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["image_id", "latitude", "longitude", "date", "hour", "location_uncertainty"]
    assert [row["image_id"] for row in table] == [str(number) for number in range(1, 33)]
    images, classes = {}, {}
    for name, flag in (("train.json", "1"), ("val.json", "0")):
        content = json.loads((root / "CUB_200_2011" / name).read_text())
        assert {str(image["id"]) for image in content["images"]} == {
            image for image, split in rows(root, "train_test_split.txt") if split == flag
        }
        assert [category["id"] for category in content["categories"]] == list(range(4))
        images |= {str(image["id"]): image for image in content["images"]}
        classes |= {str(entry["image_id"]): entry["category_id"] for entry in content["annotations"]}
    labels = {image: int(label) - 1 for image, label in rows(root, "image_class_labels.txt")}
    paths = dict(rows(root, "images.txt"))
    assert classes == labels
    for row in table:
        image = images[row["image_id"]]
        assert image["file_name"] == "images/" + paths[row["image_id"]]
        with Image.open(root / "CUB_200_2011" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        if not row["latitude"]:
            assert set(row.values()) == {row["image_id"], ""}
            assert image["latitude"] is image["longitude"] is image["date"] is image["location_uncertainty"] is None
            continue
        assert float(row["latitude"]) == image["latitude"] and float(row["longitude"]) == image["longitude"]
        assert image["date"] == f"{row['date']} {int(row['hour']):02d}:00:00+00:00"
        assert int(row["location_uncertainty"]) == image["location_uncertainty"]


def test_place_and_date_tell_what_the_pair_type_says() -> None:
    for pair in sibling_pairs(30):
        one, other = (synthbirds.niche(0, label) for label in pair.classes)
        assert (one.region != other.region) == (pair.type == "allopatric")
        assert (one.habitat != other.habitat) == (pair.type == "allopatric")
        assert (one.peak, other.peak) == (2, 8) if pair.type == "allochronic" else one.peak == other.peak
    found = [synthbirds.sighting(0, 2, index) for index in range(500)]
    seen = [sighting for sighting in found if sighting is not None]
    assert 0.05 < 1 - len(seen) / len(found) < 0.12
    latitude, longitude = synthbirds.REGIONS[synthbirds.niche(0, 2).region]
    assert abs(np.median([sighting.latitude for sighting in seen]) - latitude) < 2
    assert abs(np.median([sighting.longitude for sighting in seen]) - longitude) < 2
    for sighting in seen:
        assert -90 <= sighting.latitude <= 90 and -180 <= sighting.longitude < 180
        assert 1 <= sighting.date[1] <= 12 and 1 <= sighting.date[2] <= 31 and 0 <= sighting.hour < 24


def test_most_of_a_tile_is_the_habitat_of_the_class() -> None:
    from fgvczoo.data.synthbirds.habitats import _HABITAT_COLORS

    for label in range(6):
        pixels = synthbirds.tile(0, label, 0).reshape(-1, 1, 3).astype(int)
        nearest = np.abs(pixels - _HABITAT_COLORS.astype(int)).sum(axis=2).argmin(axis=1)
        assert (nearest == synthbirds.niche(0, label).habitat).mean() > 0.5


def test_sibling_table(root: Path) -> None:
    with (root / "CUB_200_2011" / "sibling_pairs.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["class"], row["sibling"]) for row in table] == [("1", "2"), ("3", "4")]
    for row, pair in zip(table, sibling_pairs(2)):
        assert (row["factor"], row["part"], row["pair_type"]) == (pair.factor, pair.part, pair.type)
        assert tuple(map(int, row["part_ids"].split())) == synthbirds.CUB_PARTS_OF[pair.part]
        assert row["class_value"] == getattr(genotypes(2)[pair.classes[0]], pair.factor)


# ---------------------------------------------------------------- making


def test_equal_to_the_byte_with_any_number_of_workers(root: Path, tmp_path: Path) -> None:
    assert contents(make(tmp_path / "two", "tiny", workers=2, progress=False)) == contents(root)


def test_a_finished_copy_is_returned_at_once(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert make(root, "tiny", progress=False) == root
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_goes_on_where_it_was_interrupted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fgvczoo.data.synthbirds import writer

    drawn = 0
    whole_class = writer._write_class

    def interrupted(copy: writer._Copy, class_id: int) -> writer._ClassFiles:
        if class_id == 2:
            raise KeyboardInterrupt
        return whole_class(copy, class_id)

    monkeypatch.setattr(writer, "_write_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "half", "tiny", workers=1, progress=False)
    assert not (tmp_path / "half" / "synthbirds.json").exists()
    monkeypatch.undo()

    kept = sorted((tmp_path / "half").rglob("*.jpg"))
    before = [path.stat().st_mtime_ns for path in kept]
    kept[0].unlink()
    photograph = synthbirds.drawing._photograph  # type: ignore[attr-defined]

    def counted(*arguments: object) -> np.ndarray:
        nonlocal drawn
        drawn += 1
        return photograph(*arguments)

    monkeypatch.setattr(synthbirds.drawing, "_photograph", counted)  # type: ignore[attr-defined]
    make(tmp_path / "half", "tiny", workers=1, progress=False)
    assert drawn == 17  # two classes and the one that was lost
    assert [path.stat().st_mtime_ns for path in kept[1:]] == before[1:]
    assert contents(tmp_path / "half") == contents(root)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_survives_kill(tmp_path: Path) -> None:
    target, size = tmp_path / "killed", Size(4, 10, 10, 60, 68)
    code = (
        "from fgvczoo.data.synthbirds import Size, make\n"
        f"make({str(target)!r}, Size(4, 10, 10, 60, 68), workers=1, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    images = target / "CUB_200_2011" / "images"
    deadline = time.monotonic() + 60
    while not (images.exists() and sum(1 for _ in images.rglob("*.jpg")) > 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (target / "synthbirds.json").exists()
    for path in target.rglob("*.jpg"):
        Image.open(path).load()
    make(target, size, progress=False)
    make(tmp_path / "whole", size, progress=False)
    assert contents(target) == contents(tmp_path / "whole")


def test_two_may_make_the_same_copy_at_once(root: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(make, tmp_path / "both", "tiny", workers=1, progress=False) for _ in range(2)]
        assert {future.result() for future in made} == {tmp_path / "both"}
    assert contents(tmp_path / "both") == contents(root)


def test_image_folder_view(root: Path, tmp_path: Path) -> None:
    copy = make(tmp_path / "view", Size(1, 2, 1, 60, 60), workers=1, progress=False, image_folder_view=True)
    view = copy / "image_folder"
    assert sorted(path.name for path in view.iterdir()) == ["test", "train"]
    for split, count in (("train", 2), ("test", 1)):
        assert [len(list(folder.iterdir())) for folder in sorted((view / split).iterdir())] == [count, count]
    assert {path.read_bytes() for path in view.rglob("*.jpg")} == {
        path.read_bytes() for path in (copy / "CUB_200_2011" / "images").rglob("*.jpg")
    }


def test_default_root_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path))
    assert synthbirds.default_root("small") == tmp_path / f"synthbirds-{synthbirds.VERSION}-small-0"
    assert synthbirds.default_root(Size(1, 1, 1, 60, 60), 7).name == f"synthbirds-{synthbirds.VERSION}-1x1+1x60-60-7"
    made = make(size=Size(1, 1, 1, 60, 60), workers=1, progress=False)
    assert made.parent == tmp_path and (made / "synthbirds.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "smal"}, "did you mean small"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"workers": 0}, "workers=0"),
        ({"size": Size(1000, 1, 1, 60, 60)}, "ask for at most"),
    ],
)
def test_bad_arguments_of_make(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FgvczooError, match=message) as caught:
        make(tmp_path / "new", progress=False, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (1, 1, 1, 8), (1, 1, 1, 60, 59), (1.5, 1, 1)])
def test_bad_sizes(numbers: tuple[int, ...]) -> None:
    with pytest.raises(FgvczooError, match="size"):
        Size(*numbers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_id": 20}, "expected 0 to 19"),
        ({"class_id": -1}, "expected 0 to 19"),
        ({"index": -1}, "index=-1"),
        ({"without_part": "beek"}, "did you mean beak"),
        ({"size": "huge"}, "size='huge'"),
    ],
)
def test_bad_arguments_of_draw(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FgvczooError, match=message):
        draw(**({"seed": 0, "class_id": 0, "index": 0} | arguments))  # type: ignore[arg-type]


def test_a_root_with_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvczooError, match=r"of seed 0 .* not .* of seed 1"):
        make(root, "tiny", seed=1, progress=False)
    with pytest.raises(FgvczooError, match=r"pairs 2.* not .*pairs 10"):
        make(root, "small", progress=False)
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(FgvczooError, match="holds other files") as caught:
        make(tmp_path, "tiny", progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(FgvczooError, match="holds other files"):
        make(tmp_path / "photo.jpg", "tiny", progress=False)
    with pytest.raises(FgvczooError, match="cannot be written"):
        make(tmp_path / "photo.jpg" / "below", "tiny", progress=False)


def test_another_version_is_refused_finished_or_not(root: Path, tmp_path: Path) -> None:
    stamp = (root / "synthbirds.json").read_text()
    for folder, text in (("a", stamp.replace('"1.0"', '"0.9"')), ("b/.unfinished", stamp.replace('"1.0"', '"0.9"'))):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "synthbirds.json").write_text(text)
        with pytest.raises(FgvczooError, match=r"holds SynthBirds 0\.9"):
            make(tmp_path / folder.split("/")[0], "tiny", progress=False)
    (tmp_path / "a" / "synthbirds.json").write_bytes(b"\xff not json")
    with pytest.raises(FgvczooError, match="unreadable"):
        make(tmp_path / "a", "tiny", progress=False)


def test_makes_no_use_of_torch() -> None:
    code = "import sys, fgvczoo.data.synthbirds; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
