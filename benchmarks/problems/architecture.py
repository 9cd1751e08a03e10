"""An architecture by tree search, its weight decays by hypergradient inside each trial.

Negrinho and Gordon (2017, "DeepArchitect: automatically designing and training deep architectures",
arXiv:1704.08792) search trees of choices that depend on choices, and find that tree search with bisection
beats random search. Here a network for digits has one to three hidden layers of 4 to 64 units each, one of
three activations, and layers with or without a residual connection; `benchmarks.mcts` is the tree search.
Weight decays of the layers are continuous, and a trial finds them as it trains: `bilevel.alternating` with
implicit hypergradients, one run. Every architecture is a mask on the same largest network, so that all of
them share a program, and architectures are data: a `bilevel.fixed` leaf of the hyperparameters.

The arms here are: the tree search with hypergradients in its trials; the same with decays drawn at random;
Optuna and random search over everything. The claim is tested on a table of all architectures at the default
decay, by many searches of each kind that look things up in it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks import mcts
from benchmarks.problems import digits
from benchmarks.problems.paper import Answer, Case, Evidence, Paper, Score, key_of, scored, tuned

LAYERS, UNITS, TRAIN, VALID, BATCH = 3, 64, 300, 600, 50
WIDTHS, KINDS = (4, 8, 16, 32, 64), ("relu", "tanh", "sine")
INNER, STEPS, TRIALS, USUAL = 10, 20, 40, 1e-4  # inner steps of an outer one, outer steps, trials, decay
LEARNING_RATE = 3e-3
REPEATS, LOOKS = 200, 60


def architecture(layers: int, widths: Sequence[int], kind: int, residual: bool):
    """As numbers: (3,) widths, (3,) whether a layer is there, (3,) one-hot activation, residual or not."""
    full = (*widths[:layers], *([UNITS] * (LAYERS - layers)))
    return {
        "widths": jnp.asarray(full, jnp.float32),
        "there": jnp.asarray(np.arange(LAYERS) < layers, jnp.float32),
        "kind": jnp.asarray(np.arange(len(KINDS)) == kind, jnp.float32),
        "residual": jnp.float32(residual),
    }


def start(hparams, batch, key):
    """Weights of variance one over the units that feed them."""
    del batch
    widths = hparams["architecture"]["widths"]
    feeding = jnp.concatenate([jnp.full(1, 64.0), widths[:-1]])
    weights = jax.random.normal(key, (LAYERS + 1, UNITS, UNITS))
    last = jnp.min(widths)
    scale = jax.lax.rsqrt(jnp.concatenate([feeding, last[None]]))
    return {"w": weights * scale[:, None, None], "b": jnp.zeros((LAYERS + 1, UNITS))}


def logits(params, hparams, x):
    own = hparams["architecture"]
    h = x
    for i in range(LAYERS):
        z = h @ params["w"][i] + params["b"][i][None]
        made = sum(k * fn(z) for k, fn in zip(own["kind"], (jax.nn.relu, jnp.tanh, jnp.sin), strict=True))
        made = made * (jnp.arange(UNITS) < own["widths"][i])[None] + own["residual"] * h
        h = jnp.where(own["there"][i] > 0, made, h)
    return (h @ params["w"][-1] + params["b"][-1][None])[:, :10]


def outer(params, hparams, batch):
    return digits.cross_entropy(logits(params, hparams, batch["x"]), batch["y"])


inner = bilevel.composite(
    predict=lambda params, hparams, batch: logits(params, hparams, batch["x"]),
    loss=lambda made, hparams, batch: digits.cross_entropy(made, batch["y"]),
    penalty=lambda params, hparams: jnp.sum(hparams["decay"] * jnp.sum(params["w"] ** 2, (1, 2))) / 2,
)


PROBLEM = bilevel.Problem(
    inner, outer, constraints={"decay": bilevel.positive(), "architecture": bilevel.fixed()}
)
METHOD = bilevel.alternating(
    # Of a network that is being trained the Hessian is not positive; its Gauss-Newton part is.
    bilevel.implicit(bilevel.cg(max_steps=5, damping=1e-2), curvature="gauss_newton"),
    optax.adam(LEARNING_RATE), optax.adam(0.3), inner_steps=INNER, warmup=3,
)  # fmt: skip


def split(seed: int):
    return digits.split(seed, TRAIN, VALID)


@jax.jit
def judged(hparams, key, train, valid, test) -> Score:
    key_start, key_order = jax.random.split(key)
    params, optimizer = start(hparams, None, key_start), optax.adam(LEARNING_RATE)

    def step(carry, j):
        params, state = carry
        rows = jax.random.choice(jax.random.fold_in(key_order, j), TRAIN, (BATCH,))
        grad = jax.grad(inner)(params, hparams, jax.tree.map(lambda x: x[rows], train))
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(INNER * STEPS))
    return Score(outer(params, hparams, valid), outer(params, hparams, test))


def with_decays(numbers, chosen=None):
    decays = jnp.stack([jnp.float32(numbers[f"decay {i}"]) for i in range(LAYERS + 1)])
    return {
        "decay": decays,
        "architecture": architecture(2, (32, 32), 0, False) if chosen is None else chosen,
    }


BOX = {f"decay {i}": (1e-6, 1e-1) for i in range(LAYERS + 1)}
DEFAULT = with_decays(dict.fromkeys(BOX, USUAL))


def case(seed: int) -> Case:
    train, valid, test = split(seed)
    return Case(
        problem=PROBLEM,
        params=start(DEFAULT, None, jax.random.key(seed)),
        hparams=DEFAULT,
        train=bilevel.minibatches(train, BATCH),
        valid=valid,
        method=METHOD,
        steps=STEPS,
        box=BOX,
        spread=with_decays,
        judge=lambda hparams, key: judged(hparams, key, train, valid, test),
    )


# --- Arms -------------------------------------------------------------------------------------------------


def asked(trial):
    """An architecture of an Optuna trial."""
    layers = trial.suggest_int("layers", 1, LAYERS)
    widths = [WIDTHS[trial.suggest_int(f"width {i}", 0, len(WIDTHS) - 1)] for i in range(layers)]
    kind = trial.suggest_categorical("activation", range(len(KINDS)))
    return architecture(layers, widths, kind, trial.suggest_categorical("residual", (False, True)))


def search(make_sampler, learn: bool):
    """An arm: trials of an Optuna study, that learn their decays or have them suggested."""

    def arm(case: Case, seconds: float, seed: int) -> Answer:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=make_sampler(seed))
        began, tried, best = time.process_time(), 0, (np.inf, case.hparams)
        while tried == 0 or (tried < TRIALS if learn else time.process_time() - began < seconds):
            trial = study.ask()
            chosen = asked(trial)
            if learn:
                begin = {"decay": DEFAULT["decay"], "architecture": chosen}
                params = start(begin, None, key_of(seed, 0))
                own = dataclasses.replace(case, params=params, hparams=begin)
                hparams = tuned(own, seed, case.steps).hparams
            else:
                numbers = {name: trial.suggest_float(name, *ends, log=True) for name, ends in BOX.items()}
                hparams = with_decays(numbers, chosen)
            value = scored(case, hparams, key_of(seed, 1)).valid
            best = min(best, (value, hparams), key=lambda entry: entry[0])
            study.tell(trial, value)
            tried += 1
        return Answer(best[1], tried)

    return arm


def optuna_sampler(name: str, seed: int):
    import optuna

    return getattr(optuna.samplers, name)(seed=seed)


ARMS = {
    "hypergradient": search(mcts.sampler, learn=True),
    "tree, random decays": search(mcts.sampler, learn=False),
    "optuna": search(functools.partial(optuna_sampler, "TPESampler"), learn=False),
    "random": search(functools.partial(optuna_sampler, "RandomSampler"), learn=False),
}


# --- The claim --------------------------------------------------------------------------------------------


def choices() -> list[tuple]:
    """All of them: (layers, indices of widths, activation, residual)."""
    return [
        (layers, widths, kind, residual)
        for layers in range(1, LAYERS + 1)
        for widths in itertools.product(range(len(WIDTHS)), repeat=layers)
        for kind in range(len(KINDS))
        for residual in (False, True)
    ]


def table(seed: int) -> dict[tuple, float]:
    """Validation loss of each architecture at the default decay."""
    train, valid, _ = split(seed)
    every = choices()
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x),
        *[architecture(n, [WIDTHS[i] for i in widths], kind, res) for n, widths, kind, res in every],
    )
    small = jax.tree.map(lambda x: x[:1], valid)

    @jax.jit
    def losses(own):
        def one(own):
            hparams = {"decay": DEFAULT["decay"], "architecture": own}
            return judged(hparams, jax.random.key(5), train, valid, small).valid

        return jax.lax.map(one, own, batch_size=31)

    return dict(zip(every, np.nan_to_num(np.asarray(losses(stacked)), nan=10.0).tolist(), strict=True))


def looked_up(found: dict[tuple, float], tree: mcts.Tree) -> np.ndarray:
    """The lowest loss after each of some looks at the table."""
    losses = []
    for _ in range(LOOKS):
        layers, path = tree.choose((), "layers", range(1, LAYERS + 1), True)
        widths = []
        for i in range(layers):
            width, path = tree.choose(path, f"width {i}", range(len(WIDTHS)), True)
            widths.append(width)
        kind, path = tree.choose(path, "activation", range(len(KINDS)), False)
        residual, path = tree.choose(path, "residual", (False, True), False)
        losses.append(found[layers, tuple(widths), kind, residual])
        tree.learn(path, losses[-1])
    return np.minimum.accumulate(losses)


class Blind(mcts.Tree):
    """Random search along the same choices."""

    def learn(self, path, loss) -> None:
        del path, loss


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    kinds = {
        "random": lambda seed: Blind(seed, bisect=False),
        "tree search": lambda seed: mcts.Tree(seed, bisect=False),
        "with bisection": mcts.Tree,
    }
    tables = [table(seed) for seed in answers]
    ranks = {
        name: np.mean(
            [
                [np.mean(np.asarray(list(found.values()))[:, None] < looked_up(found, make(i))[None], 0)]
                for found in tables
                for i in range(REPEATS)
            ],
            axis=(0, 1),
        )
        for name, make in kinds.items()
    }
    last = {name: 100 * rank[-1] for name, rank in ranks.items()}
    better = last["with bisection"] < 0.8 * last["random"]
    part = last["tree search"] < 0.8 * last["random"]
    verdict = "holds" if better else "holds in part" if part else "does not hold here"
    sentence = (
        f"after {LOOKS} of {len(tables[0])} architectures the best one found is, in the mean of {REPEATS} "
        f"searches on each seed, beaten by {last['random']:.2f} % of all for random search, "
        f"{last['tree search']:.2f} % for tree search and {last['with bisection']:.2f} % with bisection."
    )

    def draw(ax):
        for name, rank in ranks.items():
            ax.plot(np.arange(1, LOOKS + 1), 100 * rank, label=name)
        ax.set_yscale("log")
        ax.set_xlabel("architectures tried")
        ax.set_ylabel("% of architectures that are better")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


PAPER = Paper(
    title="an architecture by tree search",
    source="Negrinho and Gordon 2017, arXiv:1704.08792",
    claim="tree search with bisection finds better architectures than random search in as many trials",
    case=case,
    evidence=evidence,
    unit="cross-entropy",
    arms=ARMS,
)
