"""The command ``bilevel bench``, by another door ``python -m benchmarks``: list, run, report, compare."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from benchmarks import catalogue, runner
from benchmarks.catalogue import SIZES
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.rows import FAILED, Job, Row, StudyError
from benchmarks.study import Request, Study

# "work" is what "run" starts; it takes the same arguments.
COMMANDS = ("list", "run", "report", "compare", "work")
_ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str]) -> int:
    """Run a command; its exit status."""
    args = _parser().parse_args(argv)
    try:
        return _DO[args.command](args)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on where this one ended", file=sys.stderr)
        return 130


# --- The command line -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, and where the rest stands."""

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("bilevel bench", description="Compare ways to tune, at equal time.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,run,report,compare}")
    commands.add_parser("list", help="problems, methods and sizes")
    _add_run(commands.add_parser("run", help="run methods on problems and store what they found"))
    _add_run(commands.add_parser("work"))
    report = commands.add_parser("report", help="tables, and a page to look at in a browser")
    report.add_argument("folder", type=Path, metavar="DIR", help="of a run")
    report.add_argument(
        "--output", type=_page, metavar="FILE", help="the page (.html; default: report.html in DIR)"
    )
    compare = commands.add_parser("compare", help="what changed from one run to another")
    compare.add_argument("folders", nargs=2, type=Path, metavar="DIR", help="of a run")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Every method on every problem, once for each seed; goes on where it was interrupted. What is not "
        "given is that of the size."
    )
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "minutes, the default"), ("full", "hours: more of everything")):
        size.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=text)
    parser.set_defaults(size="quick")
    for name, known in (("--problems", PROBLEMS), ("--methods", METHODS)):
        add(name, nargs="+", choices=known, metavar="NAME", help=f"some of {', '.join(known)}")
    add("--seeds", nargs="+", type=_seed, metavar="N", help="of data and searches")
    add("--seconds", type=_seconds, metavar="S", help="of a run, without compilation")
    add(
        "--workers",
        type=_workers,
        default=2,
        metavar="N",
        help="processes; they share the cores (default: 2)",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder, or that of a run to go on")


def _seed(text: str) -> int:
    return _whole_number(text, 0)


def _workers(text: str) -> int:
    return _whole_number(text, 1)


def _whole_number(text: str, least: int) -> int:
    if not (text.isdecimal() and text.isascii()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _page(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .html")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path.parent)!r} is not a folder")
    return path


def _request(args: argparse.Namespace) -> tuple[Request, float]:
    """What is asked for, each name once, and the seconds of a run."""
    size = SIZES[args.size]
    given = (getattr(args, name) or getattr(size, name) for name in ("problems", "methods", "seeds"))
    return Request(*(tuple(dict.fromkeys(names)) for names in given)), args.seconds or size.seconds


def _command(name: str, args: argparse.Namespace, out: Path) -> list[str]:
    """The arguments after ``bilevel bench`` that mean the same."""
    request, seconds = _request(args)
    return [
        name,
        "--problems", *request.problems,
        "--methods", *request.methods,
        "--seeds", *map(str, request.seeds),
        "--seconds", repr(seconds),
        "--workers", str(args.workers),
        "--output", str(out),
    ]  # fmt: skip


# --- What they do -----------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    del args
    catalogue.show()
    return 0


def _run(args: argparse.Namespace) -> int:
    (request, seconds), study = _request(args), Study(args.output)
    catalogue.check_extras()
    for method in request.methods:
        METHODS[method].check()
    study.ask(request, seconds)
    jobs = request.jobs()
    missing = [job for job in jobs if job not in study.rows()]
    print(f"{len(missing)} of {len(jobs)} jobs to do in {args.output}", flush=True)
    workers = min(args.workers, len(missing))
    command = [sys.executable, "-m", "benchmarks", *_command("work", args, args.output.resolve())]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_start(command)) for _ in range(workers)]
        dead = [worker.returncode for worker in running if worker.wait() != 0]
    if dead:
        statuses = ", ".join(map(str, dead))
        raise StudyError(
            f"{len(dead)} of {workers} workers died (status {statuses}); the rows that are there are good. "
            "Run the same command again for the others."
        )
    if failed := [job for job, row in study.rows().items() if job in jobs and row.status == FAILED]:
        print(f"{len(failed)} jobs failed, the report says why: {failed[0]} ...", file=sys.stderr)
    return 0


def _start(command: list[str]) -> subprocess.Popen:
    """A worker; it ends when its standard input does: when this command ends, however, Ctrl-C included."""
    return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, start_new_session=True)


def _work(args: argparse.Namespace) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    (request, seconds), command = (
        _request(args),
        shlex.join(["bilevel", "bench", *_command("run", args, args.output)]),
    )

    def run(job: Job) -> Row:
        row = runner.run(job, seconds, command)
        print(
            f"  {job}: solved {row.solved:.6g} in {row.run_seconds:.2f} s "
            f"and {row.compile_seconds:.2f} s of compilation, {row.status}",
            flush=True,
        )
        return row

    Study(args.output).work(request.jobs(), run)
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def _report(args: argparse.Namespace) -> int:
    from benchmarks import page, report

    study = _opened(args.folder)
    report.show(study)
    path = args.output or args.folder / "report.html"
    page.save(study, path)
    print(f"\nThe page is {path}.")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from benchmarks import compare

    compare.show(*map(_opened, args.folders))
    return 0


def _opened(folder: Path) -> Study:
    """A study to be read; says what of it is left out."""
    study = Study(folder)
    if lost := study.half_written():
        print(f"{study.rows_path}: a half-written last row ({lost} bytes) is left out.", file=sys.stderr)
    return study


_DO = {"list": _list, "run": _run, "work": _work, "report": _report, "compare": _compare}
