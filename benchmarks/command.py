"""The commands ``study`` and ``report`` of ``python -m benchmarks``."""

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

from benchmarks import runner
from benchmarks.arms import ARMS
from benchmarks.problems import PROBLEMS
from benchmarks.rows import Job, Row, StudyError
from benchmarks.study import Request, Study

# "work" is what "study" starts; it takes the same arguments.
COMMANDS = ("study", "report", "work")
_ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str]) -> int:
    """Run a command; its exit status."""
    args = _parser().parse_args(argv)
    try:
        return {"study": _study, "work": _work, "report": _report}[args.command](args)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on where this one ended", file=sys.stderr)
        return 130


# --- The command line -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Compare ways to tune. Without a command: run the checks, all or those named.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{study,report}")
    _add_study(commands.add_parser("study", help="run arms on problems and store what they found"))
    _add_study(commands.add_parser("work"))
    report = commands.add_parser("report", help="tables and a picture of a study")
    report.add_argument("out", type=Path, metavar="FOLDER", help="of the study")
    report.add_argument("--plot", type=_picture, metavar="FILE", help="a picture too (.png, .pdf or .svg)")
    return parser


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.description = "Every arm on every problem, once for each seed; goes on where it was interrupted."
    given = "(default: %(default)s)"
    add = parser.add_argument
    for name, known in (("--problems", PROBLEMS), ("--arms", ARMS)):
        text = f"some of {', '.join(known)} (default: all)"
        add(name, nargs="+", choices=known, default=list(known), metavar="NAME", help=text)
    add(
        "--seeds", nargs="+", type=_seed, default=[0], metavar="N", help="of splits and searches (default: 0)"
    )
    add("--seconds", type=_seconds, default=5.0, metavar="S", help=f"of a run, without compilation {given}")
    add("--workers", type=_workers, default=1, metavar="N", help=f"processes; they share the cores {given}")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new one, or that of a study to go on")


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


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path.parent)!r} is not a folder")
    return path


def _request(args: argparse.Namespace) -> Request:
    return Request(*(tuple(dict.fromkeys(given)) for given in (args.problems, args.arms, args.seeds)))


def _command(name: str, args: argparse.Namespace, out: Path) -> list[str]:
    """The arguments of a Python interpreter that mean the same."""
    request = _request(args)
    return [
        "-m", "benchmarks", name,
        "--problems", *request.problems,
        "--arms", *request.arms,
        "--seeds", *map(str, request.seeds),
        "--seconds", repr(args.seconds),
        "--workers", str(args.workers),
        "--out", str(out),
    ]  # fmt: skip


# --- What they do -----------------------------------------------------------------------------------------


def _study(args: argparse.Namespace) -> int:
    request, study = _request(args), Study(args.out)
    for arm in request.arms:
        ARMS[arm].check()
    study.ask(request, args.seconds)
    missing = [job for job in request.jobs() if job not in study.rows()]
    print(f"{len(missing)} of {len(request.jobs())} jobs to do in {args.out}", flush=True)
    workers = min(args.workers, len(missing))
    command = [sys.executable, *_command("work", args, args.out.resolve())]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_start(command)) for _ in range(workers)]
        dead = [worker.returncode for worker in running if worker.wait() != 0]
    if dead:
        statuses = ", ".join(map(str, dead))
        raise StudyError(
            f"{len(dead)} of {workers} workers died (status {statuses}); the rows that are there are good. "
            "Run the same command again for the others."
        )
    return 0


def _start(command: list[str]) -> subprocess.Popen:
    """A worker; it ends when its standard input does: when this command ends, however, Ctrl-C included."""
    return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, start_new_session=True)


def _work(args: argparse.Namespace) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    command = shlex.join(["python", *_command("study", args, args.out)])

    def run(job: Job) -> Row:
        row = runner.run(job, args.seconds, command)
        print(
            f"  {job}: solved {row.solved:.6g} in {row.run_seconds:.2f} s "
            f"and {row.compile_seconds:.2f} s of compilation, {row.status}",
            flush=True,
        )
        return row

    Study(args.out).work(_request(args).jobs(), run)
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def _report(args: argparse.Namespace) -> int:
    from benchmarks import report

    report.show(Study(args.out))
    if args.plot is not None:
        from benchmarks import picture

        picture.save(Study(args.out), args.plot)
        print(f"\nThe picture is in {args.plot}.")
    return 0
