"""Ideas of the literature, each tuned by hypergradient, by random search and by Optuna at equal time.

`problems.paper` says what a problem is; ``PAPERS`` lists them. The gradient arm is one run of
`bilevel.optimize` from the default hyperparameters; its answer is the better on validation of the last
hyperparameters and the best, each trained anew. Searches train anew at one proposal after the other until
the CPU seconds that the gradient arm took are spent; compilation is in neither. All answers are judged in
trainings with other starts and orders, the same for all arms. Errors are standard errors of the mean over
seeds; a ``win`` is a seed on which the gradient arm's test score is the lower.

``python -m benchmarks.papers NAME ...`` runs some of them and shows the report; ``--report`` shows what has
been run before, ``--page FILE`` writes it as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import papers_report, search
from benchmarks.problems.paper import Answer, Arm, Case, Paper, key_of, scored, tuned
from benchmarks.rows import save_lines

OUT = Path(__file__).parent / "results" / "papers"
SEEDS, JUDGES = (0, 1, 2), 3
PAPERS = (
    "repeated_data", "interpolated_activation", "graph_kernel", "power_schedule", "tuning_free",
    "data_mixture", "novel_classes", "hyperfitting", "curriculum", "ensemble_decay", "architecture",
    "guidance", "continual", "offline_design", "experts", "mask_tuning", "pruning",
)  # fmt: skip
GRADIENT = "hypergradient"


def paper(name: str) -> Paper:
    return importlib.import_module(f"benchmarks.problems.{name}").PAPER


@dataclasses.dataclass(frozen=True)
class Row:
    """What an arm found on a seed.

    Args:
      paper: its name.
      seed: of the case.
      arm: its name.
      seconds: CPU seconds, compilation apart.
      tried: trainings, or outer steps.
      valid: mean score of the judges.
      test: mean score of the judges.
      hparams: in words.
    """

    paper: str
    seed: int
    arm: str
    seconds: float
    tried: int
    valid: float
    test: float
    hparams: str


# --- Arms -------------------------------------------------------------------------------------------------


def default(case: Case, seconds: float, seed: int) -> Answer:
    del seconds, seed
    return Answer(case.hparams, 0)


def gradient(case: Case, seconds: float, seed: int) -> Answer:
    """All of the case's steps, whatever the seconds."""
    del seconds
    result = tuned(case, seed, case.steps)
    found = [result.hparams, result.best.hparams]
    values = [scored(case, hparams, key_of(seed, 1)).valid for hparams in found]
    return Answer(found[int(np.argmin(values))], len(result.history["value"]))


def searched(propose: search.Propose, case: Case, seconds: float, seed: int) -> Answer:
    """The best proposal on validation."""
    began, proposals = time.process_time(), propose(case.box, seed)
    values, tried, best = next(proposals), 0, (np.inf, None)
    while tried == 0 or time.process_time() - began < seconds:
        value = scored(case, case.spread(values), key_of(seed, 1)).valid
        if best[1] is None or value < best[0]:
            best = value, values
        tried += 1
        values = proposals.send(value)
    assert best[1] is not None
    return Answer(case.spread(best[1]), tried)


ARMS: Mapping[str, Arm] = {
    "default": default,
    GRADIENT: gradient,
    "random": functools.partial(searched, search.random),
    "optuna": functools.partial(searched, search.tpe),
}


def arms_of(own: Paper) -> dict[str, Arm]:
    """Those of the paper in place of, or beside, the usual ones."""
    return {name: arm for name, arm in {**ARMS, **own.arms}.items() if arm is not None}


# --- A seed -----------------------------------------------------------------------------------------------


def run_seed(name: str, case: Case, seed: int, arms: Mapping[str, Arm], judges: int = JUDGES):
    """A row for each arm, and their answers."""
    scored(case, case.hparams, key_of(seed, 1))  # compilation
    scored(case, case.spread(search.at(case.box, np.full(len(case.box), 0.5))), key_of(seed, 1))
    tuned(case, seed, 1)
    rows, answers, budget = [], {}, 0.0
    for arm in sorted(arms, key=lambda arm: arm != GRADIENT):
        began = time.process_time()
        answers[arm] = arms[arm](case, budget, seed)
        seconds = time.process_time() - began
        budget = seconds if arm == GRADIENT else budget
        scores = [scored(case, answers[arm].hparams, key_of(seed, 2 + i)) for i in range(judges)]
        valid, test = np.mean(scores, axis=0)
        words = papers_report.in_words(answers[arm].hparams)
        rows.append(Row(name, seed, arm, seconds, answers[arm].tried, float(valid), float(test), words))
    return rows, answers


def run(name: str, seeds: Sequence[int], out: Path, say: Callable[[str], object] = print) -> None:
    """Rows, the evidence and a picture, into the folder."""
    own = paper(name)
    rows: list[Row] = []
    cases, answers = {}, {}
    for seed in seeds:
        cases[seed] = own.case(seed)
        found, answers[seed] = run_seed(name, cases[seed], seed, arms_of(own))
        for row in found:
            say(f"  {row}")
        rows += found
    evidence = own.evidence(cases, answers)
    save_lines(rows, out / f"{name}.jsonl")
    papers_report.save(out, name, own, rows, evidence)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.papers", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of {', '.join(PAPERS)} (default: all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT, help="folder of rows, verdicts and pictures")
    parser.add_argument("--report", action="store_true", help="show what is there, run nothing")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the report of all as Markdown, too")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in PAPERS]
    if unknown:
        parser.error(f"no paper {', '.join(unknown)}; choose from: {', '.join(PAPERS)}")
    search.check_optuna()
    names = args.names or PAPERS
    if not args.report:
        for name in names:
            print(f"  -- {name}", flush=True)
            run(name, args.seeds, args.out, functools.partial(print, flush=True))
    papers_report.show(args.out, [name for name in names if (args.out / f"{name}.json").exists()])
    if args.page is not None:
        done = [name for name in PAPERS if (args.out / f"{name}.json").exists()]
        args.page.write_text(papers_report.page(args.out, done))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
