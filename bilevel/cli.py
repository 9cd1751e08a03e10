"""The ``bilevel`` command."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

import bilevel

_FORMATS = (".png", ".pdf", ".svg")
_PAGES = (".html", ".htm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is 0 where all went well, 2 where it cannot be done."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:  # everything behind it is read by the benchmarks
        return _bench(argv[1:])
    parser, commands = _parsers()
    args, unknown = parser.parse_known_args(argv)
    own = commands.get(args.command, parser)
    if unknown:
        known = ", ".join(option for action in own._actions for option in action.option_strings)
        own.error(f"unrecognized arguments: {' '.join(unknown)} (options: {known})")
    if args.command is None:
        parser.print_help()
        return 0
    return {"demo": _demo, "inspect": _inspect}[args.command](args)


def _refuse(why: object) -> int:
    """Say in a line why not."""
    print(f"error: {' '.join(str(why).split())}", file=sys.stderr)
    return 2


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and those of its subcommands."""
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
    text = "say what is in a folder of checkpoints, of a run that goes on or has ended, or in a saved result"
    inspect = commands.add_parser(
        "inspect", help=text, description=f"{text[0].upper()}{text[1:]}. Nothing is written there or locked."
    )
    inspect.add_argument("path", metavar="PATH", help="the folder of checkpoint=, or a file of result.save")
    inspect.add_argument(
        "--plot", type=_picture, metavar="FILE", help="draw it, as result.plot() does (.png, .pdf or .svg)"
    )
    inspect.add_argument("--html", type=_page, metavar="FILE", help="write a page, as result.report() does")
    commands.add_parser("bench", help="compare ways to tune (in a checkout of the sources)", add_help=False)
    return parser, dict(commands.choices)


def _picture(text: str) -> pathlib.Path:
    return _file(text, _FORMATS)


def _page(text: str) -> pathlib.Path:
    return _file(text, _PAGES)


def _file(text: str, formats: tuple[str, ...]) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() not in formats:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(formats)}")
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
        return _refuse(error)
    demo.main(args.output, args.seed, not args.no_progress, Console())
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from bilevel import inspection

    try:
        seen = inspection.look(args.path)
        print(seen, flush=True)
        if args.plot is not None:
            seen.known().plot().savefig(args.plot)
        if args.html is not None:
            from bilevel import result_report

            result_report.write(seen.known(), args.html, title=str(args.path), loads=seen.next)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        return _refuse(str(error).removeprefix("path: "))  # as the functions below call their argument
    for path in (args.plot, args.html):
        if path is not None:
            print(f"written: {path}")
    return 0


def _bench(argv: list[str]) -> int:
    try:
        command = importlib.import_module("benchmarks.command")
    except ModuleNotFoundError as error:
        if error.name in ("benchmarks", "benchmarks.command"):
            return _refuse(
                "bilevel bench needs a checkout of the sources, installed by: pip install -e '.[bench]'"
            )
        return _refuse(f"bilevel bench needs {error.name}, which is missing: pip install -e '.[bench]'")
    return command.main(argv)
