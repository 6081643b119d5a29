"""`fgvczoo fit | validate | test`: the Lightning CLI with recipe names and one folder a run."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from fgvczoo.checkpoints import read_safetensors
from fgvczoo.cli.run import RunCheckpoint, RunData, RunFolder, of_subset, read_data, subset, write_data
from fgvczoo.data.base import FGVCDataModule
from fgvczoo.errors import FgvczooError, FgvczooWarning, did_you_mean
from fgvczoo.explain.pictures import prototype_pictures
from fgvczoo.files import write_text
from fgvczoo.tasks.base import StagedModule
from fgvczoo.zoo.config import TENSORS
from fgvczoo.zoo.load import PUBLISHED, load, read_run_checkpoint
from fgvczoo.zoo.recipe import Card, allowed_packages, read_sections, resolve_recipe
from fgvczoo.zoo.registry import DATASETS, MODELS
from fgvczoo.zoo.transfer import transfer
from fgvczoo.zoo.weights import record_metrics, save_weights

SUBCOMMANDS = ("fit", "validate", "test")


class RecipeFile(ActionConfigFile):
    """--config takes a recipe's name as well as a file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = resolve_recipe(values)
        read_sections(path)  # the parser takes an empty section of any name
        super().__call__(parser, cfg, str(path), option_string)


class RecipeParser(LightningArgumentParser):
    """Raises instead of exiting, takes names of recipes, data sets and papers, and no abbreviated options: a misspelt
    one must not train."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = RecipeFile
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        return super().parse_args(_class_paths(sys.argv[1:] if args is None else args), *more, **options)


def _class_paths(args: Sequence[str]) -> list[str]:
    """--data NAME and --model NAME with the classes that the registry has for these names."""
    found = list(args)
    for option, table in (("--data", DATASETS), ("--model", MODELS)):
        for place, word in enumerate(args):
            name = word.removeprefix(f"{option}=") if word.startswith(f"{option}=") else None
            if name is None and place and args[place - 1] == option:
                name = word
            if name is None or "." in name:
                continue
            if name not in table:
                raise FgvczooError(f"{option} {name}: known are {', '.join(table)}{did_you_mean(name, table)}")
            found[place] = f"{option}={table[name]}" if word != name else table[name]
    return found


class ZooCLI(LightningCLI):
    """One recipe, one run folder. Refuses to train over a run and to evaluate random weights."""

    run: RunFolder

    def __init__(self, args: ArgsType) -> None:
        # A bare string, too, can name a class to import.
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=allowed_packages(),
            instantiate_subclass_spec_in_any=False,
        )
        super().__init__(
            StagedModule,
            FGVCDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=RecipeParser,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "use_distributed_sampler": False,  # our samplers are exact; Lightning's pads
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {
            "model",
            "dataloaders",
            "datamodule",
            "train_dataloaders",
            "val_dataloaders",
            "verbose",
            "weights_only",
        }
        return {name: set(hidden) for name in SUBCOMMANDS}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        given = self.config[self.config.subcommand].get("ckpt_path")
        if given and Path(given).is_file():  # Lightning opens it next
            read_run_checkpoint(Path(given))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--card", type=Card | None, default=None, help="what the recipe is")
        parser.add_argument("--run", type=str | None, default=None, help="name of the run folder in runs/, or a path")
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="fit: start from these; validate, test: evaluate these. A folder, a Hub repository, a recipe's name",
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")
        parser.link_arguments(
            "data.preprocess",
            "model.init_args.preprocess",
            compute_fn=lambda preprocess: preprocess.to_dict(),
            apply_on="instantiate",
        )

    # -- before anything is built ---------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.get("model") is None or config.get("data") is None:
            raise FgvczooError(
                f"{self.subcommand}: no model or no data given; name a recipe: --config st-protopnet-synthbirds"
            )
        for linked in ("num_classes", "class_names", "preprocess"):
            if config.model.init_args.get(linked) is not None:
                raise FgvczooError(f"model.{linked} comes from the data; leave it out")
        self.recipe = recipe_name(config)
        self.run = RunFolder.of(config.get("run"), config.config)
        self.resume = self.run.checkpoint(config.get("ckpt_path")) if config.get("ckpt_path") else None
        if self.subcommand == "fit" and _is_first_process():
            self.run.check_free(resume=self.resume is not None)
        self.start: StagedModule | None = None
        if self.subcommand == "fit" and config.get("weights") and self.resume is None:
            self.start = load(config.weights)
        if config.trainer.strategy == "auto" and _several_devices(config.trainer):
            # Stages freeze parts after DDP was built; without this their gradients differ silently between ranks.
            config.trainer.strategy = "ddp_find_unused_parameters_true"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        training = self.subcommand == "fit"
        callbacks: list[L.Callback] = [RunCheckpoint(self.run), RunData(self.run)] if training else []
        if self.config[self.subcommand].trainer.get("enable_progress_bar") is not False:
            callbacks.append(RichProgressBar())
        self.trainer_defaults["callbacks"] = callbacks
        if training and _is_first_process():
            self.run.prepare()
        logger = CSVLogger(str(self.run.path), name="", version="") if training else False
        return super().instantiate_trainer(logger=logger, default_root_dir=str(self.run.path), **kwargs)

    # -- subcommands ----------------------------------------------------------------------------------------------

    def fit(self, model: StagedModule, datamodule: FGVCDataModule, **_: Any) -> None:
        """Trains, then writes the weights folder."""
        if self.start is not None:
            self._start_from(model, self.start)
        if self.trainer.is_global_zero:
            config = self.config[self.subcommand].clone()
            for key in ("config", "ckpt_path"):
                config.pop(key, None)
            self.run.write_config(self._parser(self.subcommand).dump(config, skip_link_targets=True))
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=self.resume, weights_only=True)
        except BaseException:
            if self.trainer.is_global_zero and self.resume is None:
                self.run.discard()
            raise
        if self.trainer.is_global_zero:
            self._save(model, datamodule)

    def _start_from(self, model: StagedModule, trained: StagedModule) -> None:
        """What trained weights have for the model, in place of `backbone_weights`."""
        weights = self.config[self.subcommand].weights
        try:
            report = transfer(model, trained)
        except FgvczooError as error:
            raise FgvczooError(f"--weights {weights}: {error}") from None
        model.backbone_weights = None
        if self.trainer.is_global_zero:
            print("\n".join([f"starting from {weights}", *report.lines(model)]))

    def _save(self, model: StagedModule, datamodule: FGVCDataModule) -> None:
        config = self.config["fit"]
        finished = self.trainer.current_epoch >= model.plan.epochs
        provenance = {
            "recipe": self.recipe,
            "dataset": datamodule.dataset_name,
            "data": data_section(config.data),
            "seed": config.seed_everything,
            "epochs": self.trainer.current_epoch,
            "finished": finished,
            "torch": torch.__version__,
        }
        told = read_data(self.run.data)
        if skipped := len(told["skipped"]["pictures"]):
            provenance["skipped"] = skipped
            print(f"skipped unreadable pictures: {skipped}, by name in {self.run.data}")
        provenance |= of_subset(datamodule)
        sources: Any = getattr(model, "sources", None)
        if datamodule.licence_allows_pictures and sources:
            model.prototype_pictures = prototype_pictures(sources, datamodule)
        card: Card | None = config.get("card")
        own_data = card is None or card.dataset != datamodule.dataset_name
        licences = {"code": card.licences.code} if card and own_data else vars(card.licences) if card else {}
        folder = save_weights(
            model,
            self.run.path / "weights",
            provenance=provenance,
            licences=licences,
            card=None if own_data else card,  # its title and published numbers are of other data
        )
        state = "trained" if finished else f"stopped after {self.trainer.current_epoch} of {model.plan.epochs} epochs"
        print(f"{self.recipe}: {state}; weights in {folder}")

    def validate(self, model: StagedModule, datamodule: FGVCDataModule, **_: Any) -> None:
        """Evaluates on the validation part that was cut from the training images."""
        if "val" not in datamodule.splits:
            raise FgvczooError("validate: no validation images; give --data.val_fraction 0.1 to fit and validate")
        self._fill(model)
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=self.resume, weights_only=True)

    def test(self, model: StagedModule, datamodule: FGVCDataModule, **_: Any) -> None:
        """Evaluates on the official test split; a run's own checkpoint leaves test.json in its folder, or
        test-LIST.json where only what a paper lists was tested: that is not the result of its weights."""
        self._fill(model)
        if datamodule.reader.missing and self.trainer.is_global_zero:
            print(subset(datamodule))
        (metrics,) = self.trainer.test(model, datamodule=datamodule, ckpt_path=self.resume, weights_only=True)
        if self.resume is not None and self.run.path.is_dir() and self.trainer.is_global_zero:
            listed = datamodule.reader.subset
            name = "test.json" if listed is None else f"test-{listed.stem}.json"
            write_text(self.run.path / name, json.dumps(metrics, indent=1) + "\n")
            if listed is None:
                self._record(model, metrics)
                self._record_data(datamodule)

    def _record_data(self, datamodule: FGVCDataModule) -> None:
        """What the test had to skip joins data.json; a warning where it had other images than the training."""
        if not self.run.data.is_file():
            return
        told, now = read_data(self.run.data), of_subset(datamodule)
        if told.get("fingerprint") != now.get("fingerprint"):
            was, here = told.get("fingerprint", "of the whole set"), now.get("fingerprint", "of the whole set")
            text = f"{self.run.path} was trained with another list of images ({was}) than it is tested with ({here})"
            warnings.warn(text, FgvczooWarning, stacklevel=2)
        elif datamodule.skipped:
            write_data(self.run.data, datamodule, told["skipped"]["pictures"] | datamodule.skipped)

    def _record(self, model: StagedModule, metrics: Mapping[str, float]) -> None:
        """Where the run's weights are those that were tested, their card says the result."""
        folder = self.run.path / "weights"
        if (folder / TENSORS).is_file():
            saved, tested = read_safetensors(folder / TENSORS), model.state_dict()
            if saved.keys() == tested.keys() and all(torch.equal(saved[key], tested[key].cpu()) for key in saved):
                record_metrics(folder, metrics)

    def _fill(self, model: StagedModule) -> None:
        """Without a checkpoint: the weights asked for, or the recipe's published ones; never random ones."""
        if self.resume is not None:
            return
        config = self.config[self.subcommand]
        trained = load(str(config.config[0]) if config.config else self.recipe, weights=config.weights or PUBLISHED)
        if trained.num_classes != model.num_classes:
            raise FgvczooError(
                f"the weights have {trained.num_classes} classes and the data {model.num_classes}; use the data that "
                "they were trained on, or train on these: fit --weights"
            )
        unnamed = [str(number) for number in range(trained.num_classes)]  # of checkpoints that hold no names
        if trained.class_names not in (model.class_names, unnamed):
            theirs, ours = next(pair for pair in zip(trained.class_names, model.class_names) if pair[0] != pair[1])
            raise FgvczooError(
                f"the weights have other classes than the data, such as {theirs!r} in place of {ours!r}; use the data "
                "that they were trained on, or train on these: fit --weights"
            )
        model.restore_state_values(trained.state_values())
        model.load_state_dict(trained.state_dict())


def recipe_name(config: Namespace) -> str:
    """The name of the first recipe given; that of its run for a run's own config.yaml."""
    files = config.config or []
    if not files:
        return "unnamed"
    path = Path(str(files[0]))
    return path.resolve().parent.name if path.name == "config.yaml" else path.stem


def data_section(data: Namespace) -> dict[str, Any]:
    """The data section as plain values, without the folders of one machine, which do not travel."""
    section = yaml.safe_load(yaml.safe_dump(data.as_dict()))
    arguments = section.get("init_args", {})
    for folder in ("root", "decoded"):
        arguments.pop(folder, None)
    for files in ("table", "subset"):
        given = arguments.get(files) or []
        if any(Path(file).is_absolute() for file in (given if isinstance(given, list) else [given])):
            arguments.pop(files)
    return section


def _several_devices(trainer: Namespace) -> bool:
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    if devices in ("auto", -1, "-1"):
        count = torch.cuda.device_count() if trainer.get("accelerator") != "cpu" else 1
    elif isinstance(devices, list):
        count = len(devices)
    else:
        count = len(str(devices).split(",")) if "," in str(devices) else int(devices)
    return count * nodes > 1


def _is_first_process() -> bool:
    """Before a trainer exists. The other processes start when the first has begun to write the run's folder."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
