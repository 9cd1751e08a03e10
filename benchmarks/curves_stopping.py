"""Early stopping of 200 runs whose whole curves are known, by prediction and by Optuna's pruners.

Baker, Gupta, Raskar and Naik (2017, "Accelerating neural architecture search using performance prediction",
arXiv:1705.10823) predict the last value of a learning curve from its beginning, and stop a run that will
hardly beat the best so far. The curves here are those of networks with one hidden layer on 400 digits, a
fifth of them labelled wrong, for 50 epochs of SGD with momentum: rate, width, decay and dropout are drawn at
random, and a quarter of the pairs of curves cross. A width is a mask, so that all 200 are one program. Loss
and error are those of 600 digits that are labelled right; a loss is cut off at twice that of a guess.

A search takes the runs one after the other, in several orders. Asked of prediction: the same best run, in at
most a third of the steps. Pruners are Optuna's own, with its defaults and with the beginning that prediction
has (20 runs finished, 5 epochs before a run is judged, and every 5 from then on). That curves are given to
prediction in logarithms was chosen on other seeds, with ridge regression.

Pareja et al. (2024, "Unveiling the secret recipe: a guide for supervised fine-tuning small LLMs",
arXiv:2412.13337) found a low gradient norm and a high loss early in training to be good signs. Which signs
they are here is told by the correlations with the end, over all runs and over the better half of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import search
from benchmarks.measure import table
from benchmarks.problems.digits import pictures
from bilevel.stopping import Replay, predictor, replay

OUT = Path(__file__).parent / "results" / "papers"
RUNS, EPOCHS, WIDEST, TRAIN, VALID, BATCH = 200, 50, 64, 400, 600, 50
WRONG, MOMENTUM, WORST = 0.2, 0.9, 2 * np.log(10)
BOX = {"rate": (2e-3, 0.5), "width": (4, WIDEST), "decay": (1e-6, 3e-2), "dropout": (0.02, 0.6)}
SEEDS, ORDERS = (0, 1), 4
FINISH, AFTER, EVERY, THRESHOLD, SHARE = 20, 5, 5, 0.95, 1 / 3
FOREST, SAME_BEGINNING = "random forest", "median pruner, our beginning"
SHOWN = {"gradient": "gradient norm", "value_4": "loss", "first_3": "last change of the loss"}


# --- Curves -----------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """Of each epoch, shape (runs, epochs)."""

    loss: np.ndarray
    error: np.ndarray
    gradient: np.ndarray  # mean norm over the steps


def data(seed: int):
    """Digits for training, a share of them labelled wrong, and for validation."""
    (x, y), rng = pictures(), np.random.default_rng(seed)
    order = rng.permutation(len(y))[: TRAIN + VALID]
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    y[: round(WRONG * TRAIN)] = rng.integers(0, 10, round(WRONG * TRAIN))
    cuts = slice(TRAIN), slice(TRAIN, None)
    return [{"x": jnp.asarray(x[i]), "y": jnp.asarray(y[i])} for i in cuts]


def settings(seed: int, runs: int = RUNS) -> dict[str, np.ndarray]:
    proposals = search.random(BOX, seed)
    drawn = [next(proposals)] + [proposals.send(0.0) for _ in range(runs - 1)]
    return {name: np.asarray([own[name] for own in drawn], np.float32) for name in BOX}


def logits(params, x, width, dropout=None, key=None):
    """Of a network with so many hidden units, of which each drops out at a rate."""
    hidden = jax.nn.relu(x @ params["w"] + params["b"][None])
    hidden = hidden * (jnp.arange(hidden.shape[1]) < width)[None]
    if dropout is not None:
        hidden = hidden * jax.random.bernoulli(key, 1 - dropout, hidden.shape) / (1 - dropout)
    return hidden @ params["v"] + params["c"][None]


def cross_entropy(made, labels):
    return optax.softmax_cross_entropy_with_integer_labels(made, labels).mean()


def start(key, width):
    """Weights of variance two, and of one over the fan-in."""
    one, two = jax.random.split(key)
    return {
        "w": jax.random.normal(one, (64, WIDEST)) * np.sqrt(2 / 64),
        "b": jnp.zeros(WIDEST),
        "v": jax.random.normal(two, (WIDEST, 10)) / jnp.sqrt(width),
        "c": jnp.zeros(10),
    }


@jax.jit
def trained(drawn, keys, train, valid):
    """`Curves` of all runs."""
    rows = train["y"].shape[0]

    def one(run):
        own, key = run
        width = jnp.floor(own["width"])
        momentum, key_start = optax.trace(MOMENTUM), jax.random.fold_in(key, 0)

        def loss(params, batch, key):
            made = logits(params, batch["x"], width, own["dropout"], key)
            return cross_entropy(made, batch["y"]) + 0.5 * own["decay"] * optax.tree.norm(
                params, squared=True
            )

        def step(carry, moment):
            params, state = carry
            chosen, key = moment
            grad = jax.grad(loss)(params, jax.tree.map(lambda a: a[chosen], train), key)
            velocity, state = momentum.update(grad, state)
            params = jax.tree.map(lambda w, v: w - own["rate"] * v, params, velocity)
            return (params, state), optax.tree.norm(grad)

        def epoch(carry, key):
            key_order, key_noise = jax.random.split(key)
            order = jax.random.permutation(key_order, rows)[: rows // BATCH * BATCH].reshape(-1, BATCH)
            carry, norms = jax.lax.scan(step, carry, (order, jax.random.split(key_noise, len(order))))
            made = logits(carry[0], valid["x"], width)
            error = jnp.mean(jnp.argmax(made, axis=1) != valid["y"])
            loss = jnp.minimum(jnp.nan_to_num(cross_entropy(made, valid["y"]), nan=WORST), WORST)
            return carry, Curves(loss, error, jnp.mean(norms))

        params = start(key_start, width)
        return jax.lax.scan(epoch, (params, momentum.init(params)), jax.random.split(key, EPOCHS))[1]

    return jax.lax.map(one, (drawn, keys), batch_size=25)


def curves(seed: int) -> Curves:
    found = trained(settings(seed), jax.random.split(jax.random.key(seed), RUNS), *data(seed))
    return Curves(*(np.asarray(x, np.float64) for x in found))


def known(seed: int, found: Curves) -> dict[str, np.ndarray]:
    """What else is known of a run after the first epochs, in logarithms."""
    norms = np.nan_to_num(found.gradient[:, :AFTER].mean(axis=1), nan=1e3, posinf=1e3)
    return {
        "gradient": np.log(np.clip(norms, 1e-3, 1e3)),
        **{k: np.log(v) for k, v in settings(seed).items()},
    }


# --- Searches ---------------------------------------------------------------------------------------------

Stop = Callable[[np.ndarray, Mapping[str, np.ndarray]], Replay]


def pruned(values: np.ndarray, pruner) -> Replay:
    """Optuna's study of runs whose curves are known, in the order that they have."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(pruner=pruner)
    total = values.shape[1]
    steps, done = np.full(len(values), total), []
    for i, curve in enumerate(values):
        trial = study.ask()
        for t, value in enumerate(curve[:-1].tolist(), 1):
            trial.report(value, t)
            if trial.should_prune():
                steps[i] = t
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            trial.report(float(curve[-1]), total)
            study.tell(trial, float(curve[-1]))
            done.append(i)
    index = done[int(np.argmin(values[done, -1]))]
    return Replay(float(values[index, -1]), index, steps, float(steps.sum() / values.size))


def predicted(regressor=None, scale=lambda values: np.log(np.maximum(values, 1e-3))) -> Stop:
    """By `replay`; curves are given in logarithms, where errors of runs good and bad are more alike."""

    def stop(values, extra):
        return replay(
            scale(values), extra, finish=FINISH, after=AFTER, every=EVERY, threshold=THRESHOLD,
            regressor=regressor,
        )  # fmt: skip

    return stop


def searches() -> dict[str, Stop]:
    """Prediction by each regression, and Optuna's pruners."""
    search.check_optuna()
    from optuna import pruners
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.svm import NuSVR

    def by(make, **given) -> Stop:
        return lambda values, extra: pruned(values, make(**given))

    begun = {"n_startup_trials": FINISH, "n_warmup_steps": AFTER, "interval_steps": EVERY}
    return {
        "ridge": predicted(),
        "ridge, not in logarithms": predicted(scale=np.asarray),
        "nu-SVR": predicted(NuSVR(C=10.0, gamma="scale")),
        FOREST: predicted(RandomForestRegressor(10, max_features=0.3, random_state=0)),
        "median pruner": by(pruners.MedianPruner),
        SAME_BEGINNING: by(pruners.MedianPruner, **begun),
        "successive halving": by(pruners.SuccessiveHalvingPruner),
        "successive halving, from 5": by(pruners.SuccessiveHalvingPruner, min_resource=AFTER),
    }


class Found(NamedTuple):
    """Of one order: share of the steps, how much worse than the best of all runs, CPU seconds."""

    fraction: float
    regret: float
    seconds: float


def compared(values: np.ndarray, extra, arms: Mapping[str, Stop], orders: int, seed: int):
    """Each arm in the same orders, the forest in the first only."""
    found: dict[str, list[Found]] = {name: [] for name in arms}
    for i in range(orders):
        order = np.random.default_rng([seed, i]).permutation(len(values))
        for name, arm in arms.items():
            if name == FOREST and i > 0:
                continue  # a minute each
            began = time.process_time()
            own = arm(values[order], {key: column[order] for key, column in extra.items()})
            spent = time.process_time() - began
            regret = values[order[own.index], -1] - values[:, -1].min()
            found[name].append(Found(own.fraction, float(regret), spent))
    return found


# --- The report -------------------------------------------------------------------------------------------


def rows(found: Mapping[str, Sequence[Found]]) -> list[tuple]:
    return [
        (
            name,
            f"{100 * np.mean([x.fraction for x in own]):.0f} %",
            f"{sum(x.regret == 0 for x in own)} of {len(own)}",
            f"{np.mean([x.regret for x in own]):.4f}",
            f"{max(x.regret for x in own):.4f}",
            f"{np.mean([x.seconds for x in own]):.1f}",
        )
        for name, own in found.items()
    ]


def verdict(found: Mapping[str, Sequence[Found]], arm: str = "ridge", rival: str = SAME_BEGINNING) -> str:
    """Whether the arm finds the same best run every time, in a third of the steps; beside a pruner."""

    def of(name):
        own = found[name]
        return np.mean([x.regret == 0 for x in own]), np.mean([x.fraction for x in own])

    (same, share), other = of(arm), of(rival)
    said = f"{arm} finds the same best run in {same:.0%} of the searches and takes {share:.0%} of the steps"
    said += f"; {rival}: {other[0]:.0%} and {other[1]:.0%}"
    return f"{'HOLDS' if same == 1 and share <= SHARE else 'DOES NOT HOLD'}: {said}."


def signals(values: np.ndarray, extra) -> list[tuple]:
    """Correlations with the end of what is seen early, of all runs and of the better half."""
    better = values[:, -1] <= np.median(values[:, -1])
    cells = {}
    for chosen in (np.full(len(values), True), better):
        own = predictor(values[chosen], {name: column[chosen] for name, column in extra.items()})
        for name, signal in own.signals(AFTER).items():
            low, high = signal.interval
            cells.setdefault(name, []).append(f"{signal.correlation:+.2f} ({low:+.2f} to {high:+.2f})")
    names = {**SHOWN, **{name: name for name in BOX}}
    return [(words, *cells[name]) for name, words in names.items()]


def crossings(values: np.ndarray) -> float:
    """Share of the pairs of runs that are in another order in the end than after the first epochs."""
    i, j = np.triu_indices(len(values), 1)
    early, end = values[:, AFTER - 1], values[:, -1]
    return float(np.mean((early[i] < early[j]) != (end[i] < end[j])))


def draw(values: np.ndarray, kept: Replay, found: Mapping[str, Sequence[Found]], path: Path) -> None:
    """Curves as the first search saw them, and what each arm takes and misses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve, steps in zip(values, kept.steps, strict=True):
        whole = steps == len(curve)
        style = {"color": "C0", "alpha": 0.9} if whole else {"color": "0.6", "alpha": 0.5, "linewidth": 0.7}
        left.plot(np.arange(1, steps + 1), curve[:steps], zorder=2 + whole, **style)
    left.plot(np.arange(1, EPOCHS + 1), values[kept.index], color="C3", zorder=5, label="the one it finds")
    left.set_yscale("log")
    left.set_xlabel("epoch")
    left.set_ylabel("validation loss")
    left.set_title("a search stopped by ridge regression: whole runs in blue", fontsize="small")
    left.legend(frameon=False)
    for name, own in found.items():
        marker = "s" if "pruner" in name or "halving" in name else "o"
        right.plot([x.fraction for x in own], [x.regret for x in own], marker, label=name, alpha=0.7)
    right.axvline(SHARE, color="0.4", linestyle=":")
    right.set_xlabel("share of the steps")
    right.set_ylabel("validation loss above that of the best run")
    right.legend(frameon=False, fontsize="small")
    for ax in (left, right):
        ax.grid(color="0.9")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.curves_stopping", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--orders", type=int, default=ORDERS)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the picture")
    args = parser.parse_args(argv)
    arms = searches()
    own = {seed: curves(seed) for seed in args.seeds}
    for what in ("loss", "error"):
        found: dict[str, list[Found]] = {name: [] for name in arms}
        for seed in args.seeds:
            values = getattr(own[seed], what)
            for name, new in compared(values, known(seed, own[seed]), arms, args.orders, seed).items():
                found[name] += new
        crossed = np.mean([crossings(getattr(own[seed], what)) for seed in args.seeds])
        print(f"\n  validation {what}; {100 * crossed:.0f} % of the pairs change places after epoch {AFTER}")
        table(("", "steps", "same best", "regret", "largest", "CPU s"), rows(found))
        print(f"  {verdict(found)}")
        if what == "loss":
            drawn = found
    seed = args.seeds[0]
    print(f"\n  seed {seed}: correlation with the last validation loss of what is seen by epoch {AFTER}")
    extra = known(seed, own[seed])
    table(("", "all runs", "the better half"), signals(own[seed].loss, extra))
    draw(own[seed].loss, predicted()(own[seed].loss, extra), drawn, args.out / "curves_stopping.png")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
