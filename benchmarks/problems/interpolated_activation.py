"""An activation between two, learned on some tasks and judged on tasks never seen.

Balcan, Nguyen and Sharma (2025, "Sample complexity of data-driven tuning") bound how many problem instances a
hyperparameter has to be tuned on, until what is best for them is near the best for all. Their first example
is an activation of all hidden units between two piecewise polynomials::

    sigma_alpha = alpha relu(z) + (1 - alpha) clip(z, -1, 1)^2,    alpha in [0, 1]

Here a task is a regression in one dimension, a wave and a kink with noise. A network of two hidden layers is
trained on each by 300 steps of gradient descent with momentum; outer is the mean over tasks of the validation
errors. All arms tune an alpha for each layer (ours) on 16 tasks, from relu, and are judged on 64 others. The
claim is tested with one alpha and with two, the best of a grid on N tasks, by the gap: the mean error on 64
unseen tasks less that on the N. Tasks are dealt from 192 again and again, and the gap is a mean over deals.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.paper import Case, Evidence, Paper, Score

HIDDEN, ROWS, VALID, STEPS = 16, 20, 40, 300
TASKS, UNSEEN = 16, 64
RATE, MOMENTUM, NOISE = 0.02, 0.9, 0.2
POOL, SIZES, DEALS = 192, (1, 4, 16, 64), 400
LEVELS = np.linspace(0, 1, 6, dtype=np.float32)


def start(hparams, batch, key):
    """Weights of variance two over the fan-in, kinks all over the interval."""
    del hparams, batch
    one, two, three, four = jax.random.split(key, 4)
    return {
        "first": {
            "w": 2 * jax.random.normal(one, (HIDDEN,)),
            "b": jax.random.uniform(two, (HIDDEN,), minval=-1),
        },
        "second": {
            "w": jax.random.normal(three, (HIDDEN, HIDDEN)) * np.sqrt(2 / HIDDEN),
            "b": jnp.zeros(HIDDEN),
        },
        "read": {"w": jax.random.normal(four, (HIDDEN,)) / np.sqrt(HIDDEN), "b": jnp.zeros(())},
    }


def activation(z, alpha):
    return alpha * jax.nn.relu(z) + (1 - alpha) * jnp.clip(z, -1, 1) ** 2


def error(params, hparams, batch):
    """Mean squared error of a task."""
    alpha = hparams["alpha"]
    first, second, read = params["first"], params["second"], params["read"]
    h = activation(batch["x"][:, None] * first["w"][None] + first["b"][None], alpha[0])
    h = activation(h @ second["w"] + second["b"][None], alpha[1])
    return jnp.mean((h @ read["w"] + read["b"] - batch["y"]) ** 2)


PROBLEM = bilevel.lift(bilevel.Problem(error, error, start=start, constraints=bilevel.box(0.0, 1.0)))
OPTIMIZER = optax.sgd(RATE, momentum=MOMENTUM)
METHOD = bilevel.alternating(bilevel.unrolled(), OPTIMIZER, optax.adam(0.1, b2=0.9), inner_steps=STEPS)


def tasks(seed: int, count: int):
    """Training and validation data of so many tasks, of unit variance but for the noise."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (count, ROWS + VALID))
    frequency, phase, place, kink = rng.uniform((1, 0, -0.5, -2), (5, 2 * np.pi, 0.5, 2), (count, 4)).T[
        ..., None
    ]
    clean = np.sin(frequency * x + phase) + kink * np.abs(x - place)
    clean = (clean - clean.mean(1, keepdims=True)) / clean.std(1, keepdims=True)
    y = clean + NOISE * rng.standard_normal(x.shape)
    both = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    return [{name: a[:, cut] for name, a in both.items()} for cut in (slice(ROWS), slice(ROWS, None))]


def errors(alpha, key, data):
    """Validation error of each task after training from a start of its own."""
    train, valid = data
    hparams = {"alpha": alpha}

    def one(train, valid, key):
        params = start(None, None, key)

        def step(carry, _):
            params, state = carry
            updates, state = OPTIMIZER.update(jax.grad(error)(params, hparams, train), state)
            return (optax.apply_updates(params, updates), state), None

        carry = params, OPTIMIZER.init(params)
        return error(jax.lax.scan(step, carry, None, STEPS)[0][0], hparams, valid)

    return jax.vmap(one)(train, valid, jax.random.split(key, train["x"].shape[0]))


@functools.cache
def split(seed: int):
    """Tasks to tune on, and unseen ones."""
    return tasks(2 * seed, TASKS), tasks(2 * seed + 1, UNSEEN)


@jax.jit
def judged(hparams, key, own, unseen) -> Score:
    one, two = jax.random.split(key)
    return Score(errors(hparams["alpha"], one, own).mean(), errors(hparams["alpha"], two, unseen).mean())


def of_each(numbers):
    """Of numbers between 1 and e, whose logarithms are searched."""
    return {"alpha": jnp.log(jnp.asarray(list(numbers.values()), jnp.float32))}


def case(seed: int) -> Case:
    own, unseen = split(seed)
    return Case(
        problem=PROBLEM,
        params=None,
        hparams={"alpha": jnp.ones(2)},
        train=own[0],
        valid=own[1],
        method=METHOD,
        steps=40,
        box={"first": (1.0, float(np.e)), "second": (1.0, float(np.e))},
        spread=of_each,
        judge=lambda hparams, key: judged(hparams, key, own, unseen),
    )


# --- The claim --------------------------------------------------------------------------------------------


@functools.cache
def table() -> np.ndarray:
    """Validation errors, shape (levels, levels, tasks): one start for each task, the same for all alphas."""
    pool, found = tasks(9999, POOL), jax.jit(errors)
    pairs = [jnp.stack([a, b]) for a in LEVELS for b in LEVELS]
    values = np.stack([found(pair, jax.random.key(99), pool) for pair in pairs])
    return values.reshape(len(LEVELS), len(LEVELS), POOL)


def gaps(values: np.ndarray, sizes: Sequence[int], deals: int) -> np.ndarray:
    """For each size and deal: error on unseen tasks less that on as many tasks as the alpha is the best for.

    Args:
      values: shape (alphas, tasks).
      sizes: tasks to tune on.
      deals: of tasks to tune on and 64 unseen ones.
    """
    rng = np.random.default_rng(0)

    def gap(n):
        order = rng.permutation(values.shape[1])
        own = values[:, order[:n]].mean(1)
        best = int(np.argmin(own))
        return values[best, order[-UNSEEN:]].mean() - own[best]

    return np.array([[gap(n) for _ in range(deals)] for n in sizes])


def optimism(cases: Mapping[int, Case], answers, arm: str = "hypergradient") -> float:
    """By how much more than the default what an arm found is worse on the unseen tasks than on its own."""
    keys = jax.random.split(jax.random.key(98), 3)

    def gap(case, hparams):
        scores = [case.judge(hparams, key) for key in keys]
        return np.mean([score.test - score.valid for score in scores])

    pairs = zip(cases.values(), answers.values(), strict=True)
    return float(np.mean([gap(case, found[arm].hparams) - gap(case, case.hparams) for case, found in pairs]))


def gap_evidence(kinds: Mapping[str, np.ndarray], of_arm: float, tuned_on: int) -> Evidence:
    """Of errors of shape (hyperparameters, tasks), for a small and a larger set of hyperparameters.

    Args:
      kinds: by the name of what is tuned.
      of_arm: `optimism` of the gradient arm.
      tuned_on: tasks of the gradient arm.
    """
    found = {name: gaps(values, SIZES, DEALS).mean(1) for name, values in kinds.items()}
    shrinks = all(bool(np.all(np.diff(gap) < 0)) for gap in found.values())
    small = all(gap[-1] < gap[0] / 4 for gap in found.values())
    verdict = "holds" if shrinks and small else "holds in part" if shrinks or small else "does not hold here"

    def words(name):
        gap = found[name][:-1]
        power = np.polyfit(np.log(SIZES[:-1]), np.log(np.maximum(gap, 1e-9)), 1)[0]
        return f"{', '.join(f'{x:.4f}' for x in found[name])} (about N^{power:.2f}) for {name}"

    sizes = ", ".join(map(str, SIZES))
    sentence = (
        f"tuned on {sizes} tasks, the gap to unseen ones is {'; '.join(map(words, found))}. Hypergradients "
        f"on {tuned_on} tasks widen that of their own splits by {of_arm:.4f}."
    )

    def draw(ax):
        for name, gap in found.items():
            (line,) = ax.plot(SIZES, gap, "o-", label=name)
            ax.plot(SIZES, gap[0] / np.sqrt(SIZES), ":", color=line.get_color())
        ax.set_xscale("log")
        ax.set_xlabel("tasks tuned on (dotted: one over the root)")
        ax.set_ylabel("error on unseen tasks less that on these")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    errors_at = np.nan_to_num(table(), nan=10.0)
    kinds = {"one alpha": np.einsum("iit->it", errors_at), "two alphas": errors_at.reshape(-1, POOL)}
    return gap_evidence(kinds, optimism(cases, answers), TASKS)


PAPER = Paper(
    title="an activation for many tasks",
    source="Balcan, Nguyen and Sharma 2025",
    claim="what is tuned on N tasks is the nearer to its value on unseen ones the more tasks there are",
    case=case,
    evidence=evidence,
    unit="mean squared error on unseen tasks",
)
