"""The commands of our own: all but fit, validate and test."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fgvczoo import __version__
from fgvczoo.errors import FgvczooError, did_you_mean, printable
from fgvczoo.zoo.recipe import list_recipes, read_recipe, resolve_recipe

EPILOG = """training (options: fgvczoo fit --help):
  fit --config RECIPE        train; writes runs/RECIPE
  validate --config RECIPE   evaluate on the part of the training images kept for it
  test --config RECIPE       evaluate on the official test split
"""

IMPORT_EPILOG = (
    "Any argument of the model can follow, as in --backbone resnet34, instead of what the checkpoint implies."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise FgvczooError(f"{self.prog.partition(' ')[2] or 'fgvczoo'}: {message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands but the training ones."""
    parser = _Parser(
        prog="fgvczoo",
        description="A model zoo for fine-grained visual classification.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fgvczoo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    add = commands.add_parser("list", help="all recipes")
    add.add_argument("pattern", nargs="?", default="*", help="a glob, as in '*-cub'")
    add.add_argument("--task", help="only of this kind of work: classification, ...")
    add.add_argument("--data", help="only for this data set: cub, ...")
    add.add_argument("--paper", help="only of this paper: protopnet, ...")
    add.add_argument("--weights", action="store_true", help="only those with published weights")

    add = commands.add_parser("info", help="the card of a recipe, or of weights: results, sizes, licences")
    add.add_argument("name", metavar="NAME", help="a recipe, the folder of a run or of weights, or a Hub repository")

    add = commands.add_parser("recipe", help="print a recipe, to copy and edit")
    add.add_argument("name")

    add = commands.add_parser("predict", help="classify image files, or embed them")
    _model_options(add)
    add.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them")
    add.add_argument(
        "-o",
        "--output",
        type=Path,
        help="a .csv, .json, .parquet or (boxes) .coco.json file, of embeddings also .safetensors; default: print",
    )
    add.add_argument("--top", type=int, default=5, help="classes a result lists (default 5)")
    _metadata_option(add)
    add.add_argument("--maps", type=Path, metavar="DIR", help="of localisation models: write each image's map there")

    add = commands.add_parser("explain", help="why an image gets its class, or what it is near to, as a page")
    _model_options(add)
    add.add_argument(
        "paths", nargs="*", type=Path, metavar="IMAGE", help="image files; none: the whole model, where it can be drawn"
    )
    add.add_argument(
        "-o", "--output", type=Path, default=Path("why.html"), help=".html (default why.html), .png or .json"
    )
    add.add_argument("--target", help="the class to explain, by name or number; default: the predicted one")
    add.add_argument("--top", type=int, default=6, help="prototypes that get a map, classes of a leaf (default 6)")
    _metadata_option(add)

    add = commands.add_parser("retrieve", help="the nearest images of a folder, as a page")
    _model_options(add)
    add.add_argument("paths", nargs="+", type=Path, metavar="QUERY", help="image files, or folders of them")
    add.add_argument("--gallery", type=Path, required=True, metavar="DIR", help="searched: a folder of image files")
    add.add_argument(
        "--index", type=Path, metavar="FILE", help="a .safetensors file that keeps the gallery's embeddings"
    )
    add.add_argument("-k", "--top", type=int, default=10, help="neighbours of a query (default 10)")
    add.add_argument(
        "-o", "--output", type=Path, default=Path("sheet.html"), help=".html (default sheet.html), .png or .json"
    )

    add = commands.add_parser("import", help="the authors' checkpoint as weights of ours", epilog=IMPORT_EPILOG)
    add.add_argument("paper", metavar="PAPER", help="as in `fgvczoo info`: st-protopnet, ...")
    add.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of theirs; nothing in it is executed")
    add.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder of weights to write")

    add = commands.add_parser("push", help="upload weights to the Hub")
    add.add_argument("folder", type=Path, metavar="DIR", help="the folder of a run or of weights")
    add.add_argument("repo", metavar="REPO", help="owner/name; made where it does not exist")
    add.add_argument("--private", action="store_true", help="make it a private repository")
    add.add_argument("--revision", metavar="BRANCH", help="a branch; default: main")
    add.add_argument("--licence", help="as the Hub names them (cc-by-nc-4.0), where the weights do not say theirs")
    add.add_argument("--message", help="of the commit")

    add = commands.add_parser("completion", help="code that completes fgvczoo's words in a shell")
    add.add_argument("shell", choices=["bash", "zsh", "fish"])

    add = commands.add_parser("export", help="a file that runs where fgvczoo is not installed")
    _name_options(add)
    add.add_argument("-o", "--output", type=Path, required=True, help="a .onnx or .pt2 file")
    add.add_argument("--batch", type=int, help="images at once; default: any number")

    add = commands.add_parser("evaluate", help="score a model's explanations on the test images of its data set")
    _name_options(add)
    add.add_argument(
        "--data_root", type=Path, help="the data set's root; default: where it lies by itself (synthbirds)"
    )
    add.add_argument("--limit", type=int, help="only the first images of the split")
    add.add_argument("-o", "--output", type=Path, help="a .json file; default: print")

    data = commands.add_parser("data", help="make, check and look at data sets")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    actions.add_parser("list", help="the data sets")
    add = actions.add_parser("make", help="generate a synthetic data set")
    add.add_argument("name", help="synthbirds")
    add.add_argument("root", nargs="?", type=Path, help="where; default: the user's cache folder")
    add.add_argument("--size", default="small", help="tiny, small (default), large, or PAIRSxTRAINxTEST as in 10x30x30")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--workers", type=int, help="processes; default: one a core")
    add = actions.add_parser("check", help="verify the files of a data set; exit status 1 when something is wrong")
    add.add_argument("name")
    add.add_argument("root", type=Path)
    add.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of the reader, as in version=2018")
    add = actions.add_parser("show", help="a contact sheet of a split, with boxes and parts")
    add.add_argument("name")
    add.add_argument("root", nargs="?", type=Path)
    add.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of the data module, as in version=2018")
    add.add_argument("--split", default="test")
    add.add_argument("-n", "--number", type=int, default=20)
    add.add_argument("-o", "--output", type=Path, default=Path("sheet.png"))
    return parser


def _name_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a recipe, the folder of a run or of weights, or a Hub repository")
    parser.add_argument("--weights", help="of the recipe: a folder, repository or checkpoint, not the published ones")


def _metadata_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metadata",
        help="what is known of the images, for models that read it: lat=46.9,lon=7.4,date='2021-06-05 14:30', or a .csv"
        " file with the columns path, lat, lon, date, ...",
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    _name_options(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; default: a GPU where there is one")
    parser.add_argument("--box", help="X0,Y0,X1,Y1 in pixels: cut this out of the image first")
    parser.add_argument(
        "--data_root",
        type=Path,
        help="the data set's root: boxes of its images and pictures of prototypes come from there",
    )


def run(args: list[str]) -> int:
    """Runs one command; the exit status."""
    parser = build_parser()
    if not args:
        parser.print_help()
        return 0
    known = [*_COMMANDS, "data", "fit", "validate", "test"]
    if not args[0].startswith("-") and args[0] not in known:
        raise FgvczooError(f"no command {args[0]!r}{did_you_mean(args[0], known) or '; see `fgvczoo --help`'}")
    try:
        options, rest = parser.parse_known_args(args)
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    if options.command == "explain":  # argparse finds words that may be missing before the options alone
        options.paths += [Path(word) for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if options.command == "import":
        options.settings = _settings(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "data":
        return _DATA[options.action](options)
    return _COMMANDS[options.command](options)


def _list(options: argparse.Namespace) -> int:
    names = list_recipes(options.pattern)
    if not names:
        raise FgvczooError(f"no recipe matches {options.pattern!r}{did_you_mean(options.pattern, list_recipes())}")
    cards = {name: read_recipe(name).card for name in names}
    for key, wanted in (("task", options.task), ("dataset", options.data), ("paper", options.paper)):
        if wanted is not None:
            known = {getattr(card, key) for card in cards.values()}
            cards = {name: card for name, card in cards.items() if getattr(card, key) == wanted}
            if not cards:
                raise FgvczooError(
                    f"list: none of {len(names)} recipes has {key} {wanted!r}{did_you_mean(wanted, known)}"
                )
    if options.weights:
        cards = {name: card for name, card in cards.items() if card.weights}
    width = max((len(name) for name in cards), default=0)
    for name, card in cards.items():
        weights = "-" if card.weights is None else "package" if card.weights.source == "package" else "hub"
        print(f"{name:{width}}  {card.task:15} {card.dataset:12} {weights:8} {card.title}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from fgvczoo.zoo.info import describe, describe_weights

    path = Path(options.name)
    if not path.is_dir() and (len(path.parts) == 1 or path.is_file() or path.suffix in (".yaml", ".yml")):
        print(describe(read_recipe(options.name)))
        return 0
    from fgvczoo.zoo.load import locate
    from fgvczoo.zoo.weights import check_folder

    if (folder := locate(options.name)) is None:
        raise FgvczooError(
            f"{options.name}: not found; give a recipe, the folder of a run or of weights, or owner/name"
        )
    text = describe_weights(folder, check_folder(folder))
    print("\n".join(printable(line) for line in text.splitlines()))
    return 0


def _recipe(options: argparse.Namespace) -> int:
    sys.stdout.write(resolve_recipe(options.name).read_text(encoding="utf-8"))
    return 0


def _predict(options: argparse.Namespace) -> int:
    from fgvczoo.cli.files import (
        check_table,
        image_files,
        metadata_finder,
        predict_files,
        write_maps,
        write_predictions,
    )
    from fgvczoo.tasks.retrieval import RetrievalModule

    check_table(options.output, more=(".safetensors",))
    files = image_files(options.paths)
    unreadable: list[str] = []
    model, boxes = _model(options)
    metadata = metadata_finder(model, options.metadata)
    if isinstance(model, RetrievalModule):
        return _predict_embeddings(options, model, files, boxes)
    check_table(options.output)
    results = predict_files(model, files, boxes, top=options.top, unreadable=unreadable, metadata=metadata)
    if options.output is None:
        for result in results:
            box = "".join(f" {value:.0f}" for value in getattr(result, "box", ()))
            print(printable(f"{result.source}  {result.label}  {result.score:.3f}{box and f'  box{box}'}"))
    else:
        write_predictions(results, options.output)
        print(f"{len(results)} predictions in {options.output}")
    if options.maps is not None:
        print(f"{write_maps(results, options.maps)} maps in {options.maps}")
    return _unread(unreadable)


def _predict_embeddings(options: argparse.Namespace, model: Any, files: list[Path], boxes: Any) -> int:
    from fgvczoo.cli.files import embed_files, write_embeddings

    unreadable: list[str] = []
    embeddings, names = embed_files(model, files, boxes, unreadable=unreadable)
    if options.output is None:
        for name, vector in zip(names, embeddings.tolist()):
            print(printable(f"{name}  {' '.join(f'{value:.5g}' for value in vector)}"))
    else:
        write_embeddings(embeddings, names, model.fingerprint(), options.output)
        print(f"{len(names)} embeddings in {options.output}")
    return _unread(unreadable)


def _unread(lines: list[str]) -> int:
    for line in lines:
        print(f"fgvczoo: {line}", file=sys.stderr)
    return 2 if lines else 0


def _explain(options: argparse.Namespace) -> int:
    from fgvczoo.cli.files import metadata_finder
    from fgvczoo.explain.page import write
    from fgvczoo.tasks.retrieval import RetrievalModule

    model, boxes = _model(options)
    metadata = metadata_finder(model, options.metadata)
    if isinstance(model, RetrievalModule):
        return _explain_retrieval(options, model, boxes)
    if not hasattr(model, "explain"):
        raise FgvczooError(
            f"{model.paper} has no explanation of its own; it is a baseline, `fgvczoo predict` is all it does"
        )
    if not options.paths:
        if not hasattr(model, "explain_model"):
            raise FgvczooError(f"explain: {model.paper} explains images, not itself; name at least one")
        print(f"explanation in {write([model.explain_model(top=options.top)], options.output)}")
        return 0
    by_number = options.target is not None and options.target.isdecimal() and options.target not in model.class_names
    target = int(options.target) if by_number else options.target
    truth = _truth(options, model)
    given = (lambda path: {"metadata": metadata(path)}) if metadata is not None else (lambda path: {})
    explanations = [
        model.explain(path, target=target, top=options.top, box=boxes(path), **truth(path), **given(path))
        for path in options.paths
    ]
    written = write(explanations, options.output, names=[path.name for path in options.paths])
    for path, explanation in zip(options.paths, explanations):
        print(printable(f"{path}  {explanation.predicted}  {explanation.probability:.3f}"))
    print(f"explanation in {written}")
    return 0


def _truth(options: argparse.Namespace, model: Any) -> Any:
    """What is known of an image beside the model: for localisation models its annotated boxes."""
    from fgvczoo.cli.files import truth_finder
    from fgvczoo.tasks.localization import LocalizationModule

    if options.data_root is None or not isinstance(model, LocalizationModule):
        return lambda path: {}
    boxes = truth_finder(model, options.data_root)
    return lambda path: {"truth": boxes(path)}


def _explain_retrieval(options: argparse.Namespace, model: Any, boxes: Any) -> int:
    """Neighbours among the test images of the data that the model was trained with."""
    from fgvczoo.explain.contact_sheet import Gallery, explain_retrieval, save_sheets
    from fgvczoo.zoo.build import data_from_provenance

    if not options.paths:
        raise FgvczooError(f"explain: {model.paper} explains images, not itself; name at least one")
    data = data_from_provenance(model, options.data_root)
    gallery = Gallery.of_data(model, data, "gallery" if "gallery" in data.splits else "test")
    rows = {str(data.row(row)["path"]): data.row(row) for row in data.splits["test"]}
    known = [rows.get(str(path.resolve()), rows.get(str(path.absolute()))) for path in options.paths]
    places = {name: place for place, name in enumerate(gallery.index.names)}
    sheets = explain_retrieval(
        model,
        options.paths,
        gallery,
        top=options.top,
        boxes=[boxes(path) or (row["crop"] if row else None) for path, row in zip(options.paths, known)],
        labels=[row["class_name"] if row else None for row in known],
        own=[places.get(str(row["image_id"]), -1) if row else -1 for row in known],
    )
    return _sheets(sheets, save_sheets(sheets, options.output))


def _sheets(sheets: list[Any], written: Path) -> int:
    for sheet in sheets:
        nearest = ", ".join(found.neighbour.label or found.neighbour.name for found in sheet.rows[""][:3])
        print(printable(f"{sheet.name}  {nearest}"))
    print(f"neighbours in {written}")
    return 0


def _retrieve(options: argparse.Namespace) -> int:
    from fgvczoo.cli.files import image_files
    from fgvczoo.explain.contact_sheet import Gallery, explain_retrieval, save_sheets
    from fgvczoo.tasks.retrieval import Index, RetrievalModule

    if options.index is not None and options.index.suffix != ".safetensors":
        raise FgvczooError(f"--index {options.index}: an index ends in .safetensors")
    if not options.gallery.is_dir():
        raise FgvczooError(f"--gallery {options.gallery}: no such folder")
    queries, files = image_files(options.paths), image_files([options.gallery])
    model, boxes = _model(options)
    if not isinstance(model, RetrievalModule):
        raise FgvczooError(
            f"retrieve: {model.paper} classifies; give a retrieval model (`fgvczoo list --task retrieval`)"
        )
    index = Index.load(options.index) if options.index is not None and options.index.exists() else None
    gallery = Gallery.of_files(model, files, options.gallery, index)
    if options.index is not None and index is None:
        gallery.index.save(options.index)
    inside = {file.resolve(): place for place, file in enumerate(files)}
    own = [inside.get(path.resolve(), -1) for path in queries]
    sheets = explain_retrieval(
        model,
        queries,
        gallery,
        top=options.top,
        boxes=[boxes(path) for path in queries],
        labels=[gallery.index.labels[place] if place >= 0 else None for place in own],
        own=own,
    )
    return _sheets(sheets, save_sheets(sheets, options.output))


def _evaluate(options: argparse.Namespace) -> int:
    import json

    from fgvczoo.explain.interpretability import interpretability
    from fgvczoo.files import write_text
    from fgvczoo.tasks.prototypes import PrototypeClassifier
    from fgvczoo.zoo.build import data_from_provenance
    from fgvczoo.zoo.load import PUBLISHED, load

    model = load(options.name, weights=options.weights or PUBLISHED)
    if not isinstance(model, PrototypeClassifier):
        raise FgvczooError(f"evaluate: {model.paper} explains nothing that could be scored; give a prototype network")
    data = data_from_provenance(model, options.data_root, keys=["mask", "parts"])
    scores = {
        name: None if value != value else value for name, value in interpretability(model, data, options.limit).items()
    }
    for name, value in scores.items():
        print(f"{name:26} {'-' if value is None else f'{value:.4g}'}")
    if options.output is not None:
        write_text(options.output, json.dumps(scores, indent=1) + "\n")
    return 0


def _settings(words: list[str]) -> dict[str, Any]:
    """--key value or --key=value, over and over; values are read as in a recipe."""
    import yaml

    settings: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise FgvczooError(f"import: {word!r} is unexpected; arguments of the model are given as --KEY VALUE")
        try:
            settings[key] = yaml.safe_load(value if equals else next(rest))
        except StopIteration:
            raise FgvczooError(f"import: {word} needs a value") from None
        except yaml.YAMLError:
            raise FgvczooError(f"import: the value of --{key} is not valid YAML") from None
    return settings


def _import(options: argparse.Namespace) -> int:
    from fgvczoo.zoo.official import import_checkpoint, save_imported

    model, report = import_checkpoint(options.paper, options.checkpoint, **options.settings)
    folder = save_imported(model, options.paper, options.output)
    print("\n".join(report.lines()))
    print(f"weights in {folder}")
    return 0


def _push(options: argparse.Namespace) -> int:
    from fgvczoo.zoo.config import CONFIG
    from fgvczoo.zoo.hub import push
    from fgvczoo.zoo.weights import file_sha256, weights_folder

    pushed = push(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        licence=options.licence,
        message=options.message,
    )
    print(f'{pushed}\nfgvczoo.load("{pushed}")\nsha256 {file_sha256(weights_folder(options.folder) / CONFIG)}')
    return 0


def _completion(options: argparse.Namespace) -> int:
    from fgvczoo.cli.completion import shell_code

    print(shell_code(options.shell))
    return 0


def _export(options: argparse.Namespace) -> int:
    from fgvczoo.zoo.export import export
    from fgvczoo.zoo.load import PUBLISHED, load

    print(export(load(options.name, weights=options.weights or PUBLISHED), options.output, options.batch))
    return 0


def _model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and a function that gives the box of a file (or None)."""
    from fgvczoo.cli.files import box_finder, parse_box, parse_device
    from fgvczoo.zoo.load import PUBLISHED, load

    box = parse_box(options.box) if options.box else None
    device = parse_device(options.device)
    model = load(options.name, weights=options.weights or PUBLISHED).to(device)
    if options.data_root is None:
        return model, lambda path: box
    return model, box_finder(model, options.data_root, box)


def _data_list(options: argparse.Namespace) -> int:
    from fgvczoo.zoo.registry import list_datasets

    for name in list_datasets():
        print(name)
    return 0


def _data_make(options: argparse.Namespace) -> int:
    if options.name != "synthbirds":
        raise FgvczooError(f"data make: {options.name!r} is not generated; only synthbirds is")
    from fgvczoo.data.synthbirds import SIZES, Size, make

    size: Any = options.size
    if size not in SIZES:
        try:
            pairs, train, test = (int(part) for part in size.split("x"))
        except ValueError:
            expected = ", ".join(SIZES)
            raise FgvczooError(f"--size {size}: expected {expected}, or PAIRSxTRAINxTEST as in 10x30x30") from None
        size = Size(pairs=pairs, train_per_class=train, test_per_class=test)
    print(make(options.root, size, seed=options.seed, workers=options.workers))
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from fgvczoo.data.check import check_folder, check_official
    from fgvczoo.zoo.registry import dataset_class

    chosen = _data_options(options.options)
    reader = dataset_class("cub" if options.name == "synthbirds" else options.name).reader_class
    if options.name == "folder":
        report = check_folder(options.root, **chosen)
    elif reader is None:
        raise FgvczooError(f"data check: {options.name!r} has no check: it has no official layout")
    else:
        report = check_official(reader, options.root, **chosen)
    print("\n".join(printable(line) for line in report.lines()))
    return 0 if report.ok else 1


def _data_options(given: list[str]) -> dict[str, Any]:
    """OPTION=VALUE -> values, as a recipe has them."""
    import yaml

    chosen = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise FgvczooError(f"{text!r}: expected OPTION=VALUE, as in version=2018")
        chosen[name] = yaml.safe_load(value)
    return chosen


def _data_show(options: argparse.Namespace) -> int:
    from fgvczoo.data.check import contact_sheet
    from fgvczoo.files import atomic_path
    from fgvczoo.zoo.registry import dataset_class

    cls = dataset_class(options.name)
    if options.root is not None and options.name == "synthbirds":
        cls = dataset_class("cub")  # shows what is there, of any size; draws nothing
    place = {"root": str(options.root) if options.root else None, **_data_options(options.options)}
    there = cls(**place).reader.keys
    module = cls(**place, keys=[key for key in ("bbox", "boxes", "parts") if key in there])
    sheet = contact_sheet(module, options.split, options.number)
    with atomic_path(options.output) as path:
        sheet.save(path)
    print(options.output)
    return 0


_COMMANDS = {
    "list": _list,
    "info": _info,
    "recipe": _recipe,
    "predict": _predict,
    "explain": _explain,
    "import": _import,
    "push": _push,
    "export": _export,
    "retrieve": _retrieve,
    "evaluate": _evaluate,
    "completion": _completion,
}
_DATA = {"list": _data_list, "make": _data_make, "check": _data_check, "show": _data_show}
