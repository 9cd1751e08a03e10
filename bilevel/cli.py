"""The ``bilevel`` command."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from rich.console import Console

import bilevel

_FORMATS = (".png", ".pdf", ".svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 0 where all went well."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return _demo(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bilevel", description="Tune hyperparameters by gradient.")
    parser.add_argument("--version", action="version", version=f"bilevel {bilevel.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    text = "find wrong labels among handwritten digits by tuning one weight per example"
    demo = commands.add_parser("demo", help=text, description=f"The demonstration: {text}.")
    demo.add_argument(
        "--output",
        type=_picture,
        default="demo.png",
        metavar="PATH",
        help="where the picture goes (.png, .pdf or .svg; default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the split and of the wrong labels (default: %(default)s)",
    )
    demo.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def _picture(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() not in _FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path.parent)!r} is not a folder")
    return path


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if seed < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return seed


def _demo(args: argparse.Namespace) -> int:
    from bilevel import demo

    try:
        demo.check_extras()
    except ImportError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False)
        return 1
    demo.main(args.output, args.seed, not args.no_progress, Console())
    return 0
