"""``python -m benchmarks [name ...]``: the quick checks, or those named; or list, run, report, compare."""

from __future__ import annotations

import importlib
import sys
import time

from benchmarks import machine

NAMES = (
    "exactness",
    "hparam_count",
    "unroll",
    "import_time",
    "cleaning",
    "cg_steps",
    "tuned_rates",
    "memory",
    "memory_predicted",
    "communication",
    "population",
    "checkpoint_cost",
)
# Minutes each; run by name only.
LONG = (
    "default_method", "kills", "certificates", "robustness", "accuracies", "denoising", "multinomial",
    "experts_cost", "online_cost", "complexity", "single_loop", "text", "stn_cost", "hypernetworks",
    "self_tuning", "early_learning", "few_shot", "few_shot_cost", "lasso",
    "schedules", "long_horizons", "layer_rates", "papers", "curves_stopping", "peers",
    "tune_methods",
    "estimator_scores", "stochastic_methods", "drawn_members",
)  # fmt: skip


def main(argv: list[str]) -> int:
    from benchmarks import command, peers

    if argv and argv[0] == "peers":
        return peers.main(argv[1:])
    if argv and (argv[0] in command.COMMANDS or argv[0].startswith("-")):
        return command.main(argv)
    return checks(argv)


def checks(names: list[str]) -> int:
    unknown = [name for name in names if name not in NAMES + LONG]
    if unknown:
        known = ", ".join((*NAMES, *LONG))
        print(
            f"error: no benchmark {', '.join(unknown)}; choose from: {known}; or list, run, report, compare",
            file=sys.stderr,
        )
        return 2
    print(machine.summary())
    for name in names or NAMES:
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        importlib.import_module(f"benchmarks.{name}").main()
        print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
