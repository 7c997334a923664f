"""Make a weights bundle of any BLIP, and show, change or verify one.

A SOURCE is a model of LAVIS's (large_coco, okvqa, base, …), a checkpoint of LAVIS or BLIP (.pth, .pt, .bin), or a BLIP
in Hugging Face's layout: its directory, or a repository's name. docs/models.md has examples.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blip.errors import UserError
from blip.weights.bundle import DTYPES, TASKS, Bundle, open_bundle, read_manifest, understanding
from blip.weights.shapes import PURPOSES


def main(given: Sequence[str]) -> int:
    """Do what the command line asks; on failure print one sentence and return 1."""
    arguments = _parser().parse_args(given)
    try:
        status: int = arguments.run(arguments)
    except UserError as error:
        print(f"bundle {arguments.command}: {_printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"bundle {arguments.command}: {error.filename} cannot be used: {error.strerror}.", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    make = commands.add_parser("make", help="make a bundle of one task, two or three")
    make.add_argument("out", type=Path, metavar="OUT", help="the bundle's directory")
    for task, purpose in PURPOSES.items():
        make.add_argument(f"--{task}", metavar="SOURCE", help=f"where the model for {purpose} comes from")
    make.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="what weights are stored as (%(default)s)")
    make.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side, if not those that the models were trained with"
    )
    make.add_argument("--keep", action="store_true", help="keep the downloads, in blip-downloads beside the bundle")
    make.set_defaults(run=_make)

    show = commands.add_parser("show", help="print what a bundle is and what it was made from")
    show.set_defaults(run=_show)
    change = commands.add_parser("set", help="change beams, lengths or the prompt")
    change.set_defaults(run=_set)
    verify = commands.add_parser("verify", help="hash every file and name every difference")
    verify.set_defaults(run=_verify)
    for command in (show, change, verify):
        command.add_argument("path", type=Path, metavar="PATH", help="the bundle's directory")
    change.add_argument("settings", nargs="+", metavar="TASK.NAME=VALUE", help="such as caption.num_beams=5")
    return parser


def _report(line: str) -> None:
    print(line, flush=True)


def _make(arguments: argparse.Namespace) -> int:
    from blip.weights.make import make
    from blip.weights.sources import find

    given = {task: text for task in TASKS if (text := getattr(arguments, task)) is not None}
    if not given:
        raise UserError("no model is named; give one or more of --caption, --answer and --match.")
    sources = {task: find(task, text) for task, text in given.items()}
    make(
        arguments.out,
        sources,
        arguments.dtype,
        _report,
        image_size=arguments.image_size,
        keep=arguments.keep,
    )
    return _print(open_bundle(arguments.out))


def _show(arguments: argparse.Namespace) -> int:
    return _print(open_bundle(arguments.path))


def _set(arguments: argparse.Namespace) -> int:
    from blip.weights.make import change

    return _print(change(arguments.path, arguments.settings, _report))


def _verify(arguments: argparse.Namespace) -> int:
    bundle = read_manifest(arguments.path)
    differences = [*bundle.missing(), *bundle.altered(), *bundle.unknown()]
    for difference in differences:
        print(_printable(difference))
    if differences:
        return 1
    print(f"{arguments.path}: {len(bundle.files)} files are as {bundle.name}'s manifest says.")
    return 0


def _print(bundle: Bundle) -> int:
    total = sum(entry.size for entry in bundle.files.values())
    print(f"{bundle.path}: {_printable(bundle.name)}, {bundle.dtype}, {total / 1e6:,.0f} MB")
    print(f"  {_printable(bundle.note)}")
    for origin in bundle.source.split("; "):
        print(f"  from {_printable(origin)}")
    for line in bundle.changes:
        print(f"  set {_printable(line)}")
    for task in bundle.tasks:
        with understanding(bundle.path, task):
            print(_model(bundle, task))
    return 0


def _printable(text: str) -> str:
    """What comes from a file, on one line and without what moves a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def _model(bundle: Bundle, task: str) -> str:
    """Three lines on a task's model."""
    config = bundle.config(task)
    size = sum(entry.size for name, entry in bundle.files.items() if name.startswith(f"{task}/"))
    vision, text = config["vision"], config["text"]
    names = ("num_beams", "min_length", "max_length", "max_txt_len", "prompt")
    return (
        f"{task}: {size / 1e6:,.0f} MB, as {config.get('library', 'lavis')} computes it\n"
        f"  images of {config['image_size']} pixels; {vision['depth']} layers of {vision['embed_dim']}; "
        f"texts: {text['num_hidden_layers']} layers of {text['hidden_size']}, {text['vocab_size']} tokens\n"
        f"  {', '.join(f'{name}={config[name]!r}' for name in names if name in config)}"
    )
