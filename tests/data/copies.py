"""A tiny copy of each registered data set, and mistakes that its files can have: what the contract tests run over.

A new data set enters a line in `COPIES`; the tests need no other code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data.aircraft.make import make_aircraft
from tests.data.cars.make import make_cars
from tests.data.celeba.make import make_celeba
from tests.data.cifar.make import make_cifar10, make_cifar100
from tests.data.coco.make import make_coco
from tests.data.cub.make import make_cub
from tests.data.dogs.make import make_dogs
from tests.data.flowers.make import make_flowers
from tests.data.forgetme.make import make_forgetme
from tests.data.gtos.make import make_gtos
from tests.data.imagenet.make import make_imagenet
from tests.data.inat_birds.make import make_inat_birds
from tests.data.inaturalist.make import make_inaturalist
from tests.data.nabirds.make import make_nabirds
from tests.data.nus_wide.make import make_nus_wide
from tests.data.places.make import make_places
from tests.data.sop.make import make_sop
from tests.data.tiny_imagenet.make import make_tiny_imagenet
from tests.data.vggface2.make import make_vggface2
from tests.data.voc.make import make_voc
from tests.data.wsol.make import make_wsol

Edit = Callable[[str], str]


@dataclass(frozen=True)
class Mistake:
    """An edit of a text file of a copy, or of a file name, and what the message then says."""

    file: str
    edit: Edit
    message: str


@dataclass(frozen=True)
class Copy:
    """How a copy is written, the options that open it, and mistakes of these kinds: "class" (a label out of range),
    "twice" (an image or id), "missing" (a picture that a list names), "outside" (a path that leads out of the root)."""

    make: Callable[[Path], Any]
    options: dict[str, Any] = field(default_factory=dict)
    mistakes: dict[str, Mistake] = field(default_factory=dict)


def replace(old: str, new: str) -> Edit:
    """The first occurrence."""

    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


def again(line: int) -> Edit:
    """One line once more, at the end."""

    def edit(text: str) -> str:
        lines = text.splitlines()
        return "\n".join([*lines, lines[line]]) + "\n"

    return edit


_IMAGES = "CUB_200_2011/images.txt"
COPIES: dict[str, Copy] = {
    "aircraft": Copy(
        make_aircraft,
        mistakes={
            "class": Mistake(
                "fgvc-aircraft-2013b/data/images_variant_train.txt", replace("F/A-18", "F/A-19"), "has 'F/A-19'"
            ),
            "twice": Mistake("fgvc-aircraft-2013b/data/images_family_val.txt", again(0), "occurs twice"),
            "missing": Mistake(
                "fgvc-aircraft-2013b/data/images/1025794.jpg", lambda _: "", "1 of 8 listed images are missing"
            ),
        },
    ),
    "cars": Copy(
        lambda root: make_cars(root, "class-folders"),
        mistakes={
            "class": Mistake(
                "anno_train.csv",
                lambda text: text[: text.index("\n")].rpartition(",")[0] + ",9" + text[text.index("\n") :],
                "has class 9; expected 1..4",
            ),
            "twice": Mistake("anno_test.csv", again(0), "occurs twice"),
            "missing": Mistake("anno_test.csv", replace("000", "999"), "listed images are missing"),
            "outside": Mistake("anno_test.csv", lambda text: "../../../" + text, "outside the images folder"),
        },
    ),
    "celeba": Copy(
        make_celeba,
        mistakes={
            "class": Mistake(
                "list_eval_partition.txt", lambda text: text.replace("  2", "  3", 1), "class '3'; expected 0..2"
            ),
            "twice": Mistake("list_eval_partition.txt", again(0), "occurs twice"),
            "missing": Mistake("img_align_celeba/000003.jpg", lambda _: "", "1 of 16 listed images are missing"),
            "outside": Mistake(
                "list_eval_partition.txt", replace("000001.jpg", "../000001.jpg"), "no line for|outside the"
            ),
        },
    ),
    "cifar10": Copy(make_cifar10),
    "cifar100": Copy(make_cifar100),
    "coco": Copy(
        make_coco,
        mistakes={
            "class": Mistake(
                "annotations/instances_train2014.json",
                replace('"category_id": 3,', '"category_id": 4,'),
                "category 4 of image",
            ),
            "twice": Mistake(
                "annotations/instances_train2014.json", replace('"id": 20,', '"id": 31,'), "image id 31 occurs twice"
            ),
            "missing": Mistake(
                "val2014/COCO_val2014_000000005000.jpg", lambda _: "", "1 of 4 listed images are missing"
            ),
            "outside": Mistake(
                "annotations/instances_val2014.json",
                replace("COCO_val2014_000000005000", "../../x"),
                "outside the images folder",
            ),
        },
    ),
    "cross-view-birds": Copy(
        make_inat_birds,
        mistakes={
            "class": Mistake(
                "train_birds.csv",
                lambda text: text.replace(",", ",9", 1),
                "expected in the second column a place below",
            ),
            "twice": Mistake(
                "val_birds.csv",
                lambda text: text.splitlines()[1] + "\n" + text,
                "listed images are missing|occurs twice",
            ),
            "missing": Mistake("train_overhead/images_sentinel/1.jpeg", lambda _: "", "listed images are missing"),
            "outside": Mistake(
                "train.json", replace('"file_name": "train/', '"file_name": "../train/'), "outside the images folder"
            ),
        },
    ),
    "cub": Copy(
        make_cub,
        mistakes={
            "class": Mistake(
                "CUB_200_2011/image_class_labels.txt", replace(" 1\n", " 7\n"), "has class 7; expected 1..3"
            ),
            "twice": Mistake(_IMAGES, again(0), "occurs twice"),
            "missing": Mistake(_IMAGES, replace("_0000", "_9999"), "1 of 21 listed images are missing"),
            "outside": Mistake(_IMAGES, replace("001.Tiny", "../001.Tiny"), "outside the images folder"),
        },
    ),
    "dogs": Copy(
        make_dogs,
        mistakes={
            "missing": Mistake(
                "Images/n02085620-Chihuahua/n02085620_1000.jpg", lambda _: "", "1 of 12 listed images are missing"
            ),
        },
    ),
    "flowers": Copy(
        make_flowers, mistakes={"missing": Mistake("jpg/image_00001.jpg", lambda _: "", "listed images are missing")}
    ),
    "forgetme": Copy(
        lambda root: make_forgetme(root, table=True),
        mistakes={
            "class": Mistake("pairs.csv", replace(",even", ","), "expected lines of id, original"),
            "twice": Mistake("pairs.csv", again(1), "occurs twice"),
            "missing": Mistake("pairs.csv", replace("mask/0.png", "mask/99.png"), "1 of 16 listed images are missing"),
            "outside": Mistake("pairs.csv", replace("bird/edited/", "../bird/edited/"), "outside the images folder"),
        },
    ),
    "gtos-mobile": Copy(
        make_gtos,
        mistakes={
            "class": Mistake("test/painting/a.jpg", lambda _: "", "has the class 'painting', which train/ has not"),
        },
    ),
    "imagenet": Copy(
        make_imagenet,
        mistakes={
            "class": Mistake(
                "LOC_val_solution.csv",
                lambda text: text.replace("n01440764", "n99999999"),
                "which train/ does not have",
            ),
        },
    ),
    "inaturalist": Copy(
        make_inaturalist,
        mistakes={
            "class": Mistake(
                "train.json", replace('"category_id": 9}', '"category_id": 8}'), "category 8, which is none of 4"
            ),
            "twice": Mistake("train.json", replace('"id": 99993,', '"id": 100000,'), "occurs twice"),
            "missing": Mistake("val.json", replace("/00030_", "/99999_"), "listed images are missing"),
            "outside": Mistake("val.json", replace('"val/', '"/val/'), "outside the images folder"),
        },
    ),
    "nabirds": Copy(
        make_nabirds,
        mistakes={
            "class": Mistake("nabirds/image_class_labels.txt", replace(" 817\n", " 818\n"), "class 818 is not in"),
            "twice": Mistake("nabirds/images.txt", again(0), "occurs twice"),
            "missing": Mistake("nabirds/images.txt", replace("0817/", "0818/"), "listed images are missing"),
            "outside": Mistake("nabirds/images.txt", replace("0817/", "../0817/"), "outside the images folder"),
        },
    ),
    "nus-wide": Copy(
        lambda root: make_nus_wide(root, images=62, concepts=6),
        mistakes={
            "class": Mistake(
                "Groundtruth/AllLabels/Labels_concept3.txt", replace("0", "2"), "expected 0 or 1 for each of 62"
            ),
            "twice": Mistake("ImageList/Imagelist.txt", again(0), "occurs twice"),
            "outside": Mistake(
                "ImageList/Imagelist.txt", replace("folder0", "..\\folder0"), "outside the images folder"
            ),
        },
    ),
    "places365": Copy(
        make_places,
        mistakes={
            "class": Mistake("places365_val.txt", replace(" 2\n", " 3\n"), "class '3'; expected 0..2"),
            "twice": Mistake("places365_train_standard.txt", again(0), "occurs twice"),
            "missing": Mistake("places365_val.txt", replace("val_0", "val_9"), "1 of 6 listed images are missing"),
            "outside": Mistake("places365_train_standard.txt", replace("/a/", "/../a/"), "outside the images folder"),
        },
    ),
    "sop": Copy(
        make_sop,
        mistakes={
            "class": Mistake(
                "Stanford_Online_Products/Ebay_train.txt", replace(" 1 1 ", " 99 1 "), "its classes are not"
            ),
            "twice": Mistake("Stanford_Online_Products/Ebay_test.txt", again(1), "occurs twice"),
            "missing": Mistake(
                "Stanford_Online_Products/Ebay_train.txt", replace("_0.JPG", "_9.JPG"), "listed images are missing"
            ),
            "outside": Mistake(
                "Stanford_Online_Products/Ebay_train.txt",
                replace("bicycle_final", "../bicycle_final"),
                "outside|in two super",
            ),
        },
    ),
    "tiny-imagenet": Copy(
        make_tiny_imagenet,
        mistakes={
            "class": Mistake(
                "tiny-imagenet-200/val/val_annotations.txt",
                replace("n03126707", "n03126708"),
                "which wnids.txt has not",
            ),
            "twice": Mistake("tiny-imagenet-200/val/val_annotations.txt", again(0), "occurs twice"),
            "missing": Mistake(
                "tiny-imagenet-200/val/val_annotations.txt", replace("val_0", "val_9"), "listed images are missing"
            ),
            "outside": Mistake(
                "tiny-imagenet-200/val/val_annotations.txt", replace("val_0", "../val_0"), "outside the images"
            ),
        },
    ),
    "vggface2": Copy(
        make_vggface2,
        mistakes={
            "class": Mistake("test_list.txt", replace("n000001", "n000002"), "is in train and in test"),
            "twice": Mistake("train_list.txt", again(0), "occurs twice"),
            "missing": Mistake("train_list.txt", replace("0001_01", "0009_01"), "listed images are missing"),
            "outside": Mistake("train_list.txt", replace("n000002/", "../n000002/"), "outside the images folder"),
        },
    ),
    "voc": Copy(
        lambda root: make_voc(root, train=10, test=4),
        mistakes={
            "class": Mistake(
                "VOCdevkit/VOC2012/Annotations/2007_000039.xml",
                replace("tvmonitor", "television"),
                "one of the 20 classes",
            ),
            "missing": Mistake(
                "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", replace("2007", "1007"), "images are missing"
            ),
        },
    ),
    "wsol": Copy(
        make_wsol,
        mistakes={
            "class": Mistake(
                "metadata/OpenImages/val/class_labels.txt", replace(",2", ",x"), "class 'x'; expected 0..2"
            ),
            "twice": Mistake("metadata/OpenImages/train/image_ids.txt", again(0), "occurs twice"),
            "missing": Mistake("dataset/OpenImages/val/m0gj37/val0.jpg", lambda _: "", "listed images are missing"),
            "outside": Mistake(
                "metadata/OpenImages/test/localization.txt", replace(",test/", ",../test/"), "outside the images"
            ),
        },
    ),
}


def spoil(root: Path, mistake: Mistake) -> None:
    """Makes the mistake: edits a file, removes a picture, or adds one where there is none."""
    file = root / mistake.file
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    elif file.suffix in (".jpg", ".jpeg", ".JPEG"):
        file.unlink()
    else:
        file.write_text(mistake.edit(file.read_text("utf-8")), "utf-8")


def copy_of(root: Path, to: Path) -> Path:
    """A copy of a copy, to be spoilt."""
    shutil.copytree(root, to)
    return to
