"""Lists of papers beside the generated copies: what each dialect selects and gives, and its mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgvczoo.data.check import check_official
from fgvczoo.data.cub import CUBDataModule
from fgvczoo.data.imagenet import ImageNetDataModule
from fgvczoo.data.lists import Listed
from fgvczoo.data.vggface2 import VGGFace2DataModule
from fgvczoo.errors import FgvczooError
from fgvczoo.preprocess import image_size
from fgvczoo.zoo.registry import dataset_class
from tests.conftest import RECIPES
from tests.data.celeba.make import make_celeba
from tests.data.cub.make import make_cub
from tests.data.imagenet.make import WORDNET, make_imagenet
from tests.data.vggface2.make import make_vggface2

Box = list[int]


@dataclass(frozen=True)
class Image:
    """One image of a list, by what the copy's generator says. path: of the picture in the root. folder: official."""

    path: str
    folder: str
    label: int
    size: tuple[int, int]
    boxes: list[Box]

    @property
    def name(self) -> str:
        return Path(self.path).name


def cub(root: Path) -> list[Image]:
    birds = [bird for bird in make_cub(root) if not bird.is_train]
    base = "CUB_200_2011/images"
    boxes = [[int(x), int(y), int(x + w), int(y + h)] for x, y, w, h in (bird.box for bird in birds)]
    return [
        Image(f"{base}/{bird.path}", bird.path.split("/")[0], bird.label, bird.size, [box])
        for bird, box in zip(birds, boxes)
    ]


def imagenet(root: Path, layout: str = "kaggle") -> list[Image]:
    """Without official boxes: a list of boxes is all that there is."""
    truth = make_imagenet(root, layout=layout)
    base = "ILSVRC/Data/CLS-LOC/val" if layout == "kaggle" else "val"
    images = []
    for name, (wnid, boxes) in truth.items():
        path = f"{base}/{wnid}/{name}.JPEG" if layout == "folders" else f"{base}/{name}.JPEG"
        images.append(Image(path, wnid, list(WORDNET).index(wnid), image_size(root / path), boxes))
    for file in root.glob("bbox_val/*.xml"):
        file.unlink()
    if (root / "bbox_val").is_dir():
        (root / "bbox_val").rmdir()
    return images


def celeba(root: Path) -> list[Image]:
    make_celeba(root)  # identities 1, 2, 3, 1, ...; the first ten images are of training
    return [
        Image(f"img_align_celeba/{number + 1:06d}.jpg", "", number % 3, (54, 44), []) for number in (1, 4, 11, 12, 14)
    ]


def vggface2(root: Path) -> list[Image]:
    make_vggface2(root)
    people = ("n000002", "n000003")  # those of training: their images have equal names
    paths = [(label, f"{people[label]}/{number:04d}_01.jpg") for label, number in ((0, 1), (1, 1), (1, 3))]
    return [
        Image(f"train/{path}", path.split("/")[0], label, image_size(root / "train" / path), [])
        for label, path in paths
    ]


def smdl(image: Image) -> str:
    return f"{image.label}/{image.name} {image.label}"


def by_folder(image: Image) -> str:
    return f"{image.folder}/{image.name} {image.label}"


def genpromp(image: Image) -> str:
    return f"{by_folder(image)} {' '.join(str(side) for box in image.boxes for side in box)}"


def bas(image: Image) -> str:
    return f"{image.folder}/{image.name};{image.label}"


def bas_boxes(image: Image) -> str:
    boxes = " ".join(str(side) for box in image.boxes for side in box)
    return rf"{image.folder}\\{image.name} {image.size[1]} {image.size[0]} ; {boxes}"


def bas_cub_boxes(image: Image) -> str:
    return f"{' '.join(map(str, image.boxes[0]))} {image.size[0]} {image.size[1]}"


Write = Callable[[Image], str]
CASES: dict[str, tuple[str, Callable[[Path], list[Image]], Write, Write | None]] = {
    "cub-smdl": ("cub", cub, smdl, None),
    "cub-bas": ("cub", cub, bas, None),
    "cub-bas-boxes": ("cub", cub, bas, bas_cub_boxes),
    "imagenet-smdl": ("imagenet", imagenet, smdl, None),
    "imagenet-wnid": ("imagenet", imagenet, by_folder, None),
    "imagenet-genpromp": ("imagenet", imagenet, genpromp, None),
    "imagenet-genpromp-folders": ("imagenet", lambda root: imagenet(root, "folders"), genpromp, None),
    "imagenet-genpromp-devkit": ("imagenet", lambda root: imagenet(root, "devkit"), genpromp, None),
    "imagenet-bas": ("imagenet", imagenet, bas, None),
    "imagenet-bas-boxes": ("imagenet", imagenet, bas_boxes, None),
    "imagenet-bas-boxes-folders": ("imagenet", lambda root: imagenet(root, "folders"), bas_boxes, None),
    "celeba-smdl": ("celeba", celeba, smdl, None),
    "vggface2-smdl": ("vggface2", vggface2, smdl, None),
}
BOXED = [name for name, (*_, write, boxes) in CASES.items() if boxes or write in (genpromp, bas_boxes)]
LABELLED = [name for name, (_, _, write, _) in CASES.items() if write is not bas_boxes]


class Lists:
    """The files of a case, to be spoilt."""

    def __init__(self, case: str, folder: Path) -> None:
        self.dataset, make, write, boxes = CASES[case]
        self.root = folder / "set"
        self.root.mkdir()
        self.images = make(self.root)[::-1]  # another order than that of the rows
        if self.dataset in ("cub", "imagenet"):
            del self.images[1]  # a subset
        self.file, self.boxes_file = folder / "list.txt", folder / "boxes.txt" if boxes else None
        self.lines = [write(image) for image in self.images]
        self.boxes = [boxes(image) for image in self.images] if boxes else []

    def open(self, ends: str = "\n", **options: Any) -> Any:
        self.file.write_bytes("".join(f"{line}{ends}" for line in self.lines).encode())
        if self.boxes_file is not None:
            self.boxes_file.write_bytes("".join(f"{line}{ends}" for line in self.boxes).encode())
        return dataset_class(self.dataset)(str(self.root), subset=self.subset, **options)

    @property
    def subset(self) -> str | list[str]:
        return str(self.file) if self.boxes_file is None else [str(self.file), str(self.boxes_file)]

    def refused(self, message: str, **options: Any) -> None:
        with pytest.raises(FgvczooError, match=message) as error:
            self.open(**options)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500

    @property
    def boxed(self) -> list[str]:
        """The lines that have the boxes."""
        return self.boxes or self.lines

    @property
    def key(self) -> str:
        return "bbox" if self.dataset == "cub" else "boxes"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGVCZOO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=CASES)
def lists(request: pytest.FixtureRequest, tmp_path: Path) -> Lists:
    return Lists(request.param, tmp_path)


@pytest.fixture(params=BOXED)
def boxed(request: pytest.FixtureRequest, tmp_path: Path) -> Lists:
    return Lists(request.param, tmp_path)


def test_what_is_listed_is_tested_and_nothing_else_changes(lists: Lists) -> None:
    plain, data = dataset_class(lists.dataset)(str(lists.root)), lists.open(eval_batch_size=2)
    rows = data.splits["test"]
    assert data.class_names == plain.class_names and (data.reader.labels == plain.reader.labels).all()
    assert (np.diff(rows) > 0).all() and len(rows) == len(lists.images)
    found = {data.row(row)["path"]: (data.row(row)["label"], data.row(row)["split"]) for row in rows.tolist()}
    expected = {str((lists.root / image.path).absolute()): (image.label, "test") for image in lists.images}
    assert found == expected
    assert np.concatenate([batch["index"] for batch in data.loader("test")]).tolist() == rows.tolist()
    # What is listed is not trained on; all else stays.
    for name, others in plain.splits.items():
        if name not in ("test", "query", "gallery"):
            assert data.splits[name].tolist() == [row for row in others if row not in rows]
    assert not set(data.splits) & {"query", "gallery"}


def test_ends_of_lines_and_empty_lines_do_not_matter(lists: Lists) -> None:
    rows = lists.open().splits["test"].tolist()
    lists.lines = ["", *lists.lines, "  "]
    assert lists.open(ends="\r\n").splits["test"].tolist() == rows


def test_boxes_come_from_the_list(boxed: Lists) -> None:
    data = boxed.open(keys=[boxed.key], preprocess={"size": [20, 20]}, eval_batch_size=3)
    of_path = {str((boxed.root / image.path).absolute()): image for image in boxed.images}
    for batch in data.loader("test"):
        for row, boxes in zip(batch["index"].tolist(), batch[boxed.key]):
            image, known = of_path[data.row(row)["path"]], data.row(row)
            assert known[boxed.key] == (image.boxes[0] if boxed.key == "bbox" else image.boxes)
            height, width = image.size
            scaled = np.array(image.boxes) * [20 / width, 20 / height, 20 / width, 20 / height]
            assert np.allclose(boxes.reshape(-1, 4), scaled, atol=1e-4)


def test_check_reads_it(lists: Lists) -> None:
    lists.open()
    assert check_official(dataset_class(lists.dataset).reader_class, lists.root, progress=False, subset=lists.subset).ok


@pytest.mark.parametrize("case", LABELLED)
def test_another_class_than_the_official_one(case: str, tmp_path: Path) -> None:
    lists = Lists(case, tmp_path)
    image, write = lists.images[1], CASES[case][2]
    wrong = (image.label + 1) % (2 if lists.dataset == "vggface2" else 3)
    lists.lines[1] = write(Image(image.path, image.folder, wrong, image.size, image.boxes))
    if lists.dataset == "vggface2":  # names of files are equal: a folder tells which image is meant
        lists.lines[1] = f"{image.label}/{image.name} {wrong}"
    lists.refused(f"line 2: '.*{image.name}' has class {wrong}; expected {image.label}")


def test_a_folder_of_another_class(lists: Lists) -> None:
    image, line = lists.images[0], lists.lines[0]
    end = line.index(image.name)
    lists.lines[0] = "elsewhere/" + line[end:]
    said = "is none of" if lists.dataset == "vggface2" else "lies in 'elsewhere'; expected .*"
    lists.refused(f"line 1: 'elsewhere/{image.name}' .*{said}")


def test_an_image_that_is_not_there_or_not_of_the_test(lists: Lists) -> None:
    line, name = lists.lines[0], lists.images[0].name
    lists.lines[0] = line.replace(name, f"x{name}")
    lists.refused(f"line 1: '.*x{name}' is none of the [0-9]+ (test |validation )?images")
    if lists.dataset in ("cub", "imagenet"):
        plain = dataset_class(lists.dataset)(str(lists.root))
        training = Path(plain.row(plain.splits["train"][0])["path"]).name
        lists.lines[0] = line.replace(name, training)
        lists.refused(f"line 1: '.*{training}' is none of the [0-9]+ (test|validation) images")


@pytest.mark.parametrize("prefix", ["../", "/", "../../", "a/../../", "..\\\\", "\\\\"])
def test_no_path_leads_out(lists: Lists, prefix: str) -> None:
    lists.lines[1] = prefix + lists.lines[1]
    lists.refused("line 2: lists '.*', outside the images folder")


def test_an_image_twice(lists: Lists) -> None:
    lists.lines.append(lists.lines[0])
    lists.boxes += lists.boxes[:1]
    lists.refused(f"line {len(lists.lines)}: .* is listed twice, before in line 1")


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg",
        "a.jpg 1 2",
        "a.jpg x",
        "a.jpg -1",
        "a.jpg;1;2",
        "a.jpg;",
        "a 1 1 2 3",
        "a 9 9 ; 1 2 3",
        "a 1 1 2 3 4.5.6",
    ],
)
def test_lines_of_no_dialect(tmp_path: Path, line: str) -> None:
    lists = Lists("cub-smdl", tmp_path)
    lists.lines[1] = line
    lists.refused("line 2 is '.*'; expected PATH CLASS, with")


@given(st.text("aA.01 9;-/\\\t\n\r", max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    paths, labels = ["a/A.0", "a/1", "9/1"], np.array([0, 0, 9])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "list.txt"
        file.write_bytes(text.encode())
        try:
            rows = Listed(str(file), np.array([2, 5, 6]), paths, labels).rows.tolist()
        except FgvczooError as error:
            assert "\n" not in str(error)
            return
    assert rows and set(rows) <= {2, 5, 6}


def test_lists_that_are_none(lists: Lists, tmp_path: Path) -> None:
    lists.open()
    cls = dataset_class(lists.dataset)
    for subset in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(FgvczooError, match="is no file; expected a list with lines of PATH CLASS"):
            cls(str(lists.root), subset=str(subset))
    for wrong in ([], [1], 3, [str(lists.file)] * 3):
        with pytest.raises(FgvczooError, match=r"expected the file of a list, or \[LIST, BOXES\]"):
            cls(str(lists.root), subset=wrong)
    for content in (b"", b"\r\n\r\n"):
        lists.file.write_bytes(content)
        with pytest.raises(FgvczooError, match=r"list.txt: is empty; expected a list"):
            cls(str(lists.root), subset=lists.subset)
    lists.file.write_bytes(b"\xff\xfe<html>\x00")
    with pytest.raises(FgvczooError, match="cannot be read"):
        cls(str(lists.root), subset=lists.subset)


def test_boxes_that_leave_the_picture_or_have_no_area(boxed: Lists) -> None:
    image, line = boxed.images[0], boxed.boxed[0]
    old = " ".join(map(str, image.boxes[0]))
    at = f"{boxed.boxes_file or boxed.file}: line 1: box"
    for spoilt, said in (
        ((0, 0, image.size[1] + 9, 5), "leaves the picture; expected corners inside of height"),
        ((0, 0, 5, image.size[0] + 9), "leaves the picture"),
        ((-5, 0, 5, 5), "leaves the picture"),
        ((9, 3, 9, 8), "has no area; expected X0 Y0 X1 Y1"),
        ((3, 4, 20, 2), "has no area"),  # x, y, width, height
    ):
        boxed.boxed[0] = line.replace(old, " ".join(map(str, spoilt)))
        with pytest.raises(FgvczooError, match=f"{at} .*{said}") as error:
            list(boxed.open(keys=[boxed.key]).loader("test"))
        assert "\n" not in str(error.value)
        report = check_official(
            dataset_class(boxed.dataset).reader_class, boxed.root, progress=False, subset=boxed.subset
        )
        assert not report.ok and any(said in line for line in report.lines())


def test_a_box_on_the_border_is_inside(boxed: Lists) -> None:
    image = boxed.images[0]
    border = f"0 0 {image.size[1] + 1} {image.size[0]}"
    boxed.boxed[0] = boxed.boxed[0].replace(" ".join(map(str, image.boxes[0])), border)
    assert len(list(boxed.open(keys=[boxed.key]).loader("test"))) == 1


@pytest.mark.parametrize("case", ["cub-bas-boxes", "imagenet-bas-boxes"])
def test_sizes_in_the_other_order(case: str, tmp_path: Path) -> None:
    lists = Lists(case, tmp_path)
    height, width = lists.images[0].size
    assert height != width
    # The box lies in both: only the picture tells.
    lists.boxed[0] = (
        f"1 2 9 9 {width} {height}" if lists.boxes else rf"val\{lists.images[0].name} {height} {width} ; 1 2 9 9"
    )
    with pytest.raises(
        FgvczooError,
        match=f"line 1: height {width} and width {height}; the picture has height {height} and width {width}",
    ):
        list(lists.open(keys=[lists.key]).loader("test"))


def test_boxes_of_some_lines_alone(tmp_path: Path) -> None:
    lists = Lists("imagenet-genpromp", tmp_path)
    lists.lines[2] = by_folder(lists.images[2])
    lists.refused("line 3: 0 boxes, and [12] in the first line")


def test_several_boxes_by_semicolons(tmp_path: Path) -> None:
    lists = Lists("imagenet-bas-boxes", tmp_path)
    for place, image in enumerate(lists.images):
        head = lists.lines[place].split(" ; ")[0]
        lists.lines[place] = head + "".join(f" ; {' '.join(map(str, box))}" for box in image.boxes)
    data = lists.open(keys=["boxes"])
    found = sorted(data.row(row)["boxes"] for row in data.splits["test"].tolist())
    assert found == sorted(image.boxes for image in lists.images)


def test_boxes_of_cub_fit_their_list(tmp_path: Path) -> None:
    lists = Lists("cub-bas-boxes", tmp_path)
    boxes = list(lists.boxes)
    lists.boxes = boxes[:-1]
    lists.refused("boxes.txt: 7 lines; expected one for each of the 8 of .*list.txt")
    for line in ("1 2 3 4 50", "1 2 3 4 50 x", "a 2 3 4 50 60", "1 2 3 4 50 60 7"):
        lists.boxes = [boxes[0], line, *boxes[2:]]
        lists.refused("boxes.txt: line 2 is '.*'; expected X0 Y0 X1 Y1 HEIGHT WIDTH")
    lists.boxes = boxes
    lists.lines = [f"{bas(image).replace(';', ' ')} {' '.join(map(str, image.boxes[0]))}" for image in lists.images]
    lists.refused("list.txt: has boxes of its own; leave out .*boxes.txt")
    lists.lines[0] += " 1 2 3 4"
    lists.boxes_file = None
    lists.refused("line 1: 2 boxes; expected one")


def test_a_list_gives_the_crops_of_its_images(tmp_path: Path) -> None:
    lists = Lists("cub-bas-boxes", tmp_path)
    data = lists.open(cropped=True)
    crops = {data.row(row)["path"]: list(data.row(row)["crop"]) for row in data.splits["test"].tolist()}
    assert crops == {str((lists.root / image.path).absolute()): image.boxes[0] for image in lists.images}
    corners = CUBDataModule(str(lists.root), views="corners", subset=lists.subset)
    assert corners.reader.subset == lists.file and len(corners.splits["test"]) == len(lists.images)


def test_official_test_images_alone(tmp_path: Path) -> None:
    lists = Lists("cub-smdl", tmp_path)
    lists.refused("leave out protocol=metric-learning", protocol="metric-learning")


def test_boxes_of_a_list_go_before_official_ones(tmp_path: Path) -> None:
    truth = make_imagenet(tmp_path / "set")
    name, (wnid, boxes) = next(iter(truth.items()))
    (tmp_path / "list.txt").write_text(f"val/{name}.JPEG 0 1 2 13 14\n")
    data = ImageNetDataModule(str(tmp_path / "set"), subset=str(tmp_path / "list.txt"))
    assert data.row(data.splits["test"][0])["boxes"] == [[1, 2, 13, 14]] != boxes
    (tmp_path / "list.txt").write_text(f"{wnid}/{name}.JPEG 0\n")
    data = ImageNetDataModule(str(tmp_path / "set"), subset=str(tmp_path / "list.txt"))
    assert data.row(data.splits["test"][0])["boxes"] == boxes


def test_equal_names_need_a_class(tmp_path: Path) -> None:
    lists = Lists("vggface2-smdl", tmp_path)
    data = lists.open(keys=["bbox"])
    assert len(data.reader.table("bbox")) == len(data.reader)
    lists.lines[0] = lists.lines[0].partition("/")[2]
    assert lists.open().splits["test"].tolist() == data.splits["test"].tolist()
    (tmp_path / "list.txt").write_text(r"0001_01.jpg 40 40 ; 1 2 3 4")
    with pytest.raises(FgvczooError, match=r"line 1: '0001_01\.jpg' are 4 of the images; expected its class, too"):
        VGGFace2DataModule(str(lists.root), subset=lists.subset)


def test_a_list_of_all_that_is_trained_on(tmp_path: Path) -> None:
    lists = Lists("vggface2-smdl", tmp_path)
    lists.lines = [f"{label}/{number + 1:04d}_01.jpg {label}" for label in (0, 1) for number in range(5)]
    lists.refused("list.txt: lists all images of training; expected some that are left")


@pytest.mark.parametrize("case", ["cub-bas-boxes", "vggface2-smdl"])
def test_commands(case: str, tmp_path: Path, fgvczoo_in) -> None:
    lists = Lists(case, tmp_path)
    size = len(lists.open().splits["test"])
    given = str(lists.subset).replace("'", "")
    status, out, _ = fgvczoo_in("data", "check", lists.dataset, lists.root, f"subset={given}")
    assert status == 0 and f"{size} test)" in out
    status, out, err = fgvczoo_in("data", "show", lists.dataset, lists.root, f"subset={given}", "-o", "sheet.png")
    assert status == 0 and Path("sheet.png").is_file(), err
    options = ("--config", RECIPES / "linear-tiny.yaml", "--data", lists.dataset, "--data.root", lists.root,
               "--data.preprocess.size", "[32, 32]", "--data.batch_size", 4)  # fmt: skip
    assert fgvczoo_in("fit", *options)[0] == 0
    run = Path("runs/linear-tiny")
    if case == "cub-bas-boxes":
        assert fgvczoo_in("test", *options, "--ckpt_path", "last")[0] == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    status, _, err = fgvczoo_in("test", *options, "--ckpt_path", "last", "--data.subset", given)
    assert status == 0, err
    # A result of its own: neither the run's test.json nor the card of its weights changes.
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert set(after) - set(before) == {run / "test-list.json"}
    assert "test/top1" in json.loads((run / "test-list.json").read_text())
    assert {name: text for name, text in after.items() if name in before} == before
    # Weights that were trained beside a list do not tell where it lies on this machine.
    assert fgvczoo_in("fit", *options, "--data.subset", given, "--run", "runs/beside")[0] == 0
    assert str(tmp_path) not in Path("runs/beside/weights/config.json").read_text()
    status, _, err = fgvczoo_in("test", *options, "--ckpt_path", "last", "--data.subset", "nowhere.txt")
    assert status == 2 and "'nowhere.txt' is no file" in err and err.count("\n") == 1
