"""``python -m benchmarks peers [TASK ...]``: run tasks, keep what came out, show it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.peers import cold, handles, instances, measured, questions, report, searches

OUT = Path(__file__).parents[1] / "results" / "peers"
MISSING = "error: the peers have an environment of their own, which is missing; run: make peers"
# Of each task its problems.
KINDS: dict[str, tuple[str, ...]] = {
    **{task: kinds for task, (_, kinds) in questions.TASKS.items()},
    "cold": cold.KINDS,
    "searches": searches.PROBLEMS,
}
TASKS = tuple(KINDS)
ALL_KINDS = tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))
ROUNDS, BUDGET = 21, 60.0
REPEATS = {"small": 5, "middle": 5, "large": 1}  # of runs from a cold process
QUICK = {"sizes": ("small",), "dtypes": ("float32",), "rounds": 5}
QUICK_STEPS, QUICK_SECONDS = 30, 5.0


def main(argv: Sequence[str]) -> int:
    """Exit status; leaves with 2 where the environment of the peers is missing."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.tasks = [task for task in args.tasks or TASKS if _kinds(task, args)]
    if not args.tasks:
        parser.error(f"no task that was asked for has the problem {' or '.join(args.kinds)}")
    if args.report or args.page is not None:
        return _show(args)
    if not handles.PYTHON.exists():
        print(MISSING, file=sys.stderr)
        raise SystemExit(2)
    print(f"  {machine.summary()}, load {machine.load():.1f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        {"cold": _cold, "searches": _searches}.get(task, functools.partial(_hypergradients, task))(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks peers", description="The library beside its peers."
    )
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", type=_task, help=f"some of {', '.join(TASKS)} (default: all)")
    add("--quick", action="store_true", help="the smallest size in float32, few rounds")
    add("--kinds", nargs="+", choices=ALL_KINDS, default=ALL_KINDS, metavar="NAME",
        help=f"some of the problems {', '.join(ALL_KINDS)} (default: all)")  # fmt: skip
    add("--sizes", nargs="+", choices=list(instances.SIZES["logistic"]), help="default: all")
    add("--dtypes", nargs="+", choices=questions.DTYPES, help="default: all")
    add("--peers", nargs="+", choices=handles.NAMES, default=list(handles.NAMES), metavar="NAME")
    add("--cpu", dest="clock", action="store_const", const="process_time", default="perf_counter",
        help="CPU seconds in the place of wall time, for a machine that has other work")  # fmt: skip
    cores = handles.cores()
    add("--core", type=int, choices=cores, default=cores[-1], help="one for all (default: %(default)s)")
    add("--seconds", type=float, default=300.0, help="of each search (default: %(default)s)")
    add("--arms", nargs="+", choices=searches.ARMS, default=searches.ARMS, metavar="NAME",
        help=f"of the searches: some of {'; '.join(searches.ARMS)} (default: all)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the searches (default: 0 1 2)")
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="where what came out is kept")
    add("--report", action="store_true", help="show what is kept, run nothing")
    add("--page", type=Path, metavar="FILE", help="write what is kept as Markdown, run nothing")
    return parser


def _task(name: str) -> str:
    if name not in TASKS:
        raise argparse.ArgumentTypeError(f"no task {name!r}; choose from: {', '.join(TASKS)}")
    return name


def _kinds(task: str, args: argparse.Namespace) -> list[str]:
    """The problems of a task that were asked for."""
    return [kind for kind in KINDS[task] if kind in args.kinds]


def _sizes(args: argparse.Namespace) -> Sequence[str]:
    return args.sizes or (QUICK["sizes"] if args.quick else list(instances.SIZES["logistic"]))


def _show(args: argparse.Namespace) -> int:
    if not any(args.out.glob("*.json")):
        print(f"error: nothing is kept in {args.out}; run: python -m benchmarks peers", file=sys.stderr)
        return 1
    if args.page is None:
        report.show(report.load(args.out))
    else:
        args.page.write_text(report.page_of(report.load(args.out)))
    return 0


def _cold(args: argparse.Namespace) -> None:
    steps = QUICK_STEPS if args.quick else cold.OUTER_STEPS
    for kind in _kinds("cold", args):
        for size in _sizes(args):
            load, begun = machine.load(), instances.started(kind, size)
            repeats = 1 if args.quick else REPEATS[size]
            rows = cold.rows(begun, args.peers, repeats, steps, args.core, args.out / "log.txt")
            target = next((row.setting for row in rows if row.status == measured.RIGHT), float("nan"))
            shape = len(begun.x), len(begun.valid_x), begun.x.shape[1]
            _keep(args.out, "cold", kind, size, "float32", target, rows, load, shape=shape)


def _searches(args: argparse.Namespace) -> None:
    seconds, seeds = (QUICK_SECONDS, (0,)) if args.quick else (args.seconds, args.seeds)
    for kind in _kinds("searches", args):
        load = machine.load()
        rows = searches.rows(kind, args.arms, seeds, seconds, args.core, args.out / "log.txt")
        data = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        _keep(args.out, "searches", kind, data, "float32", seconds, rows, load)


def _hypergradients(task: str, args: argparse.Namespace) -> None:
    make, _ = questions.TASKS[task]
    dtypes = args.dtypes or (QUICK["dtypes"] if args.quick else questions.DTYPES)
    for kind in _kinds(task, args):
        for size in _sizes(args):
            with (
                tempfile.TemporaryDirectory() as folder,
                handles.started(args.peers, args.core, args.out / "log.txt") as workers,
            ):
                asked = make(Path(folder), instances.KINDS[kind](size))
                # Whoever is asked first would compile while the others still begin.
                versions = {peer: worker.ask({"do": "versions"}) for peer, worker in workers.items()}
                for question in asked:
                    if question.dtype not in dtypes:
                        continue
                    rows, load = measured.all_answered(workers, question), machine.load()
                    rounds = QUICK["rounds"] if args.quick else ROUNDS
                    rows = measured.timed(workers, rows, rounds, BUDGET, args.clock)
                    _keep(
                        args.out, task, kind, size, question.dtype, question.setting, rows, load,
                        accurate=question.accurate, shape=instances.SIZES[kind][size], versions=versions,
                        clock=args.clock,
                    )  # fmt: skip


def _keep(
    out: Path,
    task,
    kind,
    size,
    dtype,
    setting,
    rows,
    load,
    *,
    accurate=None,
    shape=None,
    versions=None,
    clock="perf_counter",
):
    """Keep everything about a case, and show it."""
    case = {
        "task": task, "kind": kind, "size": size, "dtype": dtype, "shape": shape, "setting": setting,
        "accurate": accurate, "rows": [dataclasses.asdict(row) for row in rows], "versions": versions or {},
        "where": {
            "commit": machine.commit(), "processor": machine.processor(), "load": max(load, machine.load()),
            "clock": clock,
        },
    }  # fmt: skip
    report.save(out, case)
    report.show([case])
