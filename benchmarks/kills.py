"""Runs that are killed at random moments and started again end with the bits of one that was left alone.

Each run is a process of its own that gets SIGKILL one to three times, at moments drawn over the whole of its
life or, every other time, over its chunks: while it imports, compiles, computes, writes. Then it is left to
end, and everything it found is compared with what a run of its kind finds that nobody killed and that wrote
no checkpoints.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import table

RUNS, WORKERS = 100, 2
EVERY, STEPS = 5, 600
KINDS = tuple(itertools.product(("float32", "float64"), ("whole", "minibatches"), ("single", "population")))
# What a process was doing, by the last letter that it wrote down. Files are written beside the rest.
PHASES = {"": "import", "s": "start", "c": "chunk", "b": "between", "e": "end"}


# --- The process that is killed ---------------------------------------------------------------------------


def child(precision: str, data: str, members: str, steps: str, out: str, checkpoints: str) -> None:
    """One run; marks on standard output say what it is doing."""
    import jax

    jax.config.update("jax_enable_x64", precision == "float64")
    from bilevel import archive, keeper
    from bilevel.run import Run

    _mark("s")
    write = archive.write
    _marked(archive, "write", "(", ")")
    _marked(Run, "_advance", "c", "b", skip=1)  # the first one compiles
    restore = keeper.Keeper.restore

    def restored(self, run, trees, meta):
        restore(self, run, trees, meta)
        _mark(f"r{meta['step']};")

    keeper.Keeper.restore = restored
    result = _run(precision, data, members == "population", int(steps), checkpoints)
    archive.write = write
    _mark("e")
    result.save(f"{out}.result.npz")
    archive.write(f"{out}.state.npz", {"state": jax.tree.leaves(result.state)}, {})


def _mark(text: str) -> None:
    os.write(1, text.encode())


def _marked(owner, name: str, before: str, after: str, skip: int = 0) -> None:
    call, count = getattr(owner, name), itertools.count()

    def marked(*args):
        silent = next(count) < skip
        _mark("s" if silent else before)
        try:
            return call(*args)
        finally:
            _mark(after)

    setattr(owner, name, marked)


def _run(precision: str, data: str, population: bool, steps: int, checkpoints: str):
    import jax
    import jax.numpy as jnp
    import optax

    import bilevel

    rng = np.random.default_rng(0)
    # Where less is computed at a step there are more rows, so that all kinds take seconds.
    rows = 400 if population else 2000
    x = rng.standard_normal((2 * rows, 40)).astype(precision)
    y = (x[:, :4].sum(1) + 5 * rng.standard_normal(2 * rows)).astype(precision)
    train, valid = (x[:rows], y[:rows]), (x[rows:], y[rows:])

    def error(w, batch):
        a, b = batch
        return 0.5 * jnp.mean((a @ w - b) ** 2)

    problem = bilevel.Problem(
        lambda w, h, batch: error(w, batch) + 0.5 * jnp.sum(h["l2"] * w**2),
        lambda w, h, batch: error(w, batch),
        constraints={"l2": bilevel.positive()},
    )
    method = bilevel.alternating(
        bilevel.implicit(bilevel.cg(max_steps=20)),
        inner=optax.sgd(0.05, momentum=0.5),
        outer=optax.adam(0.003),
        inner_steps=20,
    )

    def sample(key):
        return jnp.zeros(40), {"l2": 0.1 + jax.random.uniform(key, (40,))}

    params, hparams = np.zeros(40, precision), {"l2": np.full(40, 0.3, precision)}
    return bilevel.optimize(
        problem,
        None if population else params,
        None if population else hparams,
        bilevel.minibatches(train, rows // 2) if data == "minibatches" else train,
        valid,
        method,
        steps,
        population=bilevel.population(4, sample, halve_every=steps // 3) if population else None,
        checkpoint=bilevel.checkpoints(checkpoints, every=EVERY) if checkpoints else None,
        progress=False,
    )


# --- The one that kills -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Killed:
    """What happened to one run: phases in which it was killed, steps it went on from, what differs."""

    kind: tuple[str, str, str]
    phases: list[str]
    writing: int
    resumed: list[int]
    differ: list[str]


def start(
    kind, steps: int, out: Path, checkpoints: Path | None, until: Callable | None = None
) -> tuple[str, int]:
    """A process: its marks and its exit code.

    Args:
      kind: one of `KINDS`.
      steps: outer steps.
      out: beginning of the names of its files.
      checkpoints: their folder, None for a run without.
      until: returns when the process is to be killed, if it is still there; None: never.
    """
    command = [sys.executable, "-m", "benchmarks.kills", *kind, str(steps), str(out), str(checkpoints or "")]
    log = marks_of(out)
    with open(log, "w") as marks:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdout=marks, stderr=subprocess.PIPE, text=True
        )
        with process:
            if until is not None:
                until()
                process.kill()
            _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(kind)} failed:\n{errors}")
    return log.read_text(), process.returncode


def marks_of(out: Path) -> Path:
    """The file in which a process marks what it is doing."""
    return out.with_name(f"{out.name}.marks")


def resumed(marks: str) -> int | None:
    """The step that a process went on from; None for one that began."""
    found = re.search(r"r(\d+);", marks)
    return found and int(found[1])


def contents(out: Path) -> dict[str, object]:
    """Everything that a run left behind, but for the time it took."""
    from bilevel import archive

    found: dict[str, object] = {}
    for name in ("result", "state"):
        trees, meta = archive.read(f"{out}.{name}.npz")
        found[f"{name} meta"] = {k: v for k, v in meta.items() if k != "seconds"}
        for part, tree in trees.items():
            _flatten(f"{name} {part}", tree, found)
    return {name: value for name, value in found.items() if name != "result history seconds"}


def _flatten(name: str, tree, found: dict) -> None:
    if isinstance(tree, dict):
        for key, child in tree.items():
            _flatten(f"{name} {key}", child, found)
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            _flatten(f"{name} {i}", child, found)
    elif tree is not None:
        import jax

        key = isinstance(tree, jax.Array) and jax.numpy.issubdtype(tree.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(tree) if key else tree)
        found[name] = array.dtype.name, array.shape, array.tobytes()


def differences(one: Path, other: Path) -> list[str]:
    """Names of what is not the same to the last bit."""
    a, b = contents(one), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def kill(folder: Path, kind, seed: int, seconds: tuple[float, float], reference: Path) -> Killed:
    """One run, killed one to three times.

    Args:
      folder: for its files.
      kind: one of `KINDS`.
      seed: of the moments.
      seconds: the length of a run that is left alone, and of its chunks.
      reference: beginning of the names of that one's files.
    """
    rng = np.random.default_rng(seed)
    out, own = folder / f"run{seed}", Killed(kind, [], 0, [], [])
    for i in itertools.count():
        whole = bool((seed + i) % 2)
        delay = rng.uniform(0.02, 0.95) * seconds[0 if whole else 1]

        def until(whole=whole, delay=delay):
            deadline = time.perf_counter() + 120
            while not whole and time.perf_counter() < deadline:  # until the first chunk is done
                if "b" in marks_of(out).read_text():
                    break
                time.sleep(2e-3)
            time.sleep(delay)

        chosen = until if i <= seed % 3 else None
        marks, code = start(kind, STEPS, out, folder / f"checkpoints{seed}", chosen)
        if (step := resumed(marks)) is not None:
            own.resumed.append(step)
        if code == 0:
            break
        own.writing += marks.count("(") > marks.count(")")
        own.phases.append(PHASES[re.sub(r"r\d+;|[()]", "", marks)[-1:]])
    own.differ = differences(out, reference)
    return own


def references(folder: Path) -> dict[tuple, tuple[tuple[float, float], Path]]:
    """Seconds of a run of each kind that writes checkpoints and of its chunks; what one without finds."""
    found = {}
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:

        def both(kind):
            name = "-".join(kind)
            start(kind, STEPS, folder / name, None)
            began = time.perf_counter()
            start(kind, STEPS, folder / f"{name}-kept", folder / f"{name}-checkpoints")
            seconds = time.perf_counter() - began, _chunk_seconds(folder / f"{name}-kept.result.npz")
            wrong = differences(folder / name, folder / f"{name}-kept")
            if wrong:
                raise RuntimeError(f"{name}: a run that writes checkpoints differs in {', '.join(wrong)}")
            return seconds, folder / name

        for kind, outcome in zip(KINDS, pool.map(both, KINDS), strict=True):
            found[kind] = outcome
    return found


def _chunk_seconds(path: Path) -> float:
    """From the end of the first chunk to that of the last."""
    import bilevel

    return float(np.ptp(bilevel.load(path).history["seconds"]))


def report(every: list[Killed], seconds: dict) -> None:
    counted = ("kills", *PHASES.values(), "writing", "resumed at", "mismatches")
    header = ("kind", "runs", "s alone", "s chunks", *counted)
    rows = []
    for kind in (*KINDS, None):
        own = [killed for killed in every if kind in (None, killed.kind)]
        phases = collections.Counter(phase for killed in own for phase in killed.phases)
        resumed = [step for killed in own for step in killed.resumed]
        rows.append(
            (
                " ".join(kind or ("all",)), len(own), *(f"{s:.1f}" for s in seconds.get(kind, ())),
                *([] if kind else ["", ""]), phases.total(), *(phases[phase] for phase in PHASES.values()),
                sum(killed.writing for killed in own), f"{np.mean(resumed or [0]):.0f}",
                sum(bool(killed.differ) for killed in own),
            )
        )  # fmt: skip
    table(header, rows)
    for killed in every:
        if killed.differ:
            print(f"  {' '.join(killed.kind)} differs in {', '.join(killed.differ)}")


def main() -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        alone = references(folder)
        print(f"  references after {time.perf_counter() - began:.0f} s", flush=True)
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            jobs = [
                pool.submit(kill, folder, kind, seed, *alone[kind])
                for seed, kind in zip(range(RUNS), itertools.cycle(KINDS), strict=False)
            ]
            every = [job.result() for job in concurrent.futures.as_completed(jobs)]
    report(every, {kind: seconds for kind, (seconds, _) in alone.items()})
    bad = sum(bool(killed.differ) for killed in every)
    print(f"  {len(every)} runs of {STEPS} outer steps, a checkpoint every {EVERY}: {bad} differ")


if __name__ == "__main__":
    child(*sys.argv[1:])
