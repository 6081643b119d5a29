"""Names of papers and data sets, and the classes behind them. Importing this imports none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fgvczoo.errors import FgvczooError, did_you_mean

MODELS: dict[str, str] = {
    "bas": "fgvczoo.models.bas.BAS",
    "bas-segmentation": "fgvczoo.models.bas.BASSegmentation",
    "cam": "fgvczoo.models.cam.CAM",
    "dm2": "fgvczoo.models.dm2.DM2",
    "dsml": "fgvczoo.models.dsml.DSML",
    "linear": "fgvczoo.models.linear.LinearClassifier",
    "metaformer": "fgvczoo.models.metaformer.MetaFormer",
    "protopnet": "fgvczoo.models.protopnet.ProtoPNet",
    "prototree": "fgvczoo.models.prototree.ProtoTree",
    "st-protopnet": "fgvczoo.models.st_protopnet.STProtoPNet",
}

DATASETS: dict[str, str] = {
    "aircraft": "fgvczoo.data.aircraft.AircraftDataModule",
    "cars": "fgvczoo.data.cars.CarsDataModule",
    "celeba": "fgvczoo.data.celeba.CelebADataModule",
    "cifar10": "fgvczoo.data.cifar.CIFAR10DataModule",
    "cifar100": "fgvczoo.data.cifar.CIFAR100DataModule",
    "coco": "fgvczoo.data.coco.COCODataModule",
    "cross-view-birds": "fgvczoo.data.inat_birds.CrossViewBirdsDataModule",
    "cub": "fgvczoo.data.cub.CUBDataModule",
    "dogs": "fgvczoo.data.dogs.DogsDataModule",
    "flowers": "fgvczoo.data.flowers.FlowersDataModule",
    "folder": "fgvczoo.data.folder.FolderDataModule",
    "forgetme": "fgvczoo.data.forgetme.ForgetMeDataModule",
    "gtos-mobile": "fgvczoo.data.gtos.GTOSMobileDataModule",
    "hub": "fgvczoo.data.hub.HubDataModule",
    "imagenet": "fgvczoo.data.imagenet.ImageNetDataModule",
    "inaturalist": "fgvczoo.data.inaturalist.INaturalistDataModule",
    "nabirds": "fgvczoo.data.nabirds.NABirdsDataModule",
    "nus-wide": "fgvczoo.data.nus_wide.NUSWideDataModule",
    "places365": "fgvczoo.data.places.Places365DataModule",
    "sop": "fgvczoo.data.sop.SOPDataModule",
    "synthbirds": "fgvczoo.data.cub.SynthBirdsDataModule",
    "tiny-imagenet": "fgvczoo.data.tiny_imagenet.TinyImageNetDataModule",
    "vggface2": "fgvczoo.data.vggface2.VGGFace2DataModule",
    "voc": "fgvczoo.data.voc.VOCDataModule",
    "wsol": "fgvczoo.data.wsol.WSOLDataModule",
}


def list_models() -> list[str]:
    """Names of the papers, sorted."""
    return sorted(MODELS)


def list_datasets() -> list[str]:
    """Names of the data sets, sorted."""
    return sorted(DATASETS)


def model_class(name: str) -> Any:
    """The LightningModule class of a paper. Raises `FgvczooError` with the nearest names for an unknown one."""
    return _resolve(name, MODELS, "model")


def dataset_class(name: str) -> Any:
    """The LightningDataModule class of a data set. Raises `FgvczooError` with the nearest names for an unknown one."""
    return _resolve(name, DATASETS, "data set")


def _resolve(name: str, table: dict[str, str], what: str) -> Any:
    if name not in table:
        raise FgvczooError(f"no {what} {name!r}; known are {', '.join(sorted(table))}{did_you_mean(name, table)}")
    module, _, cls = table[name].rpartition(".")
    return getattr(import_module(module), cls)
