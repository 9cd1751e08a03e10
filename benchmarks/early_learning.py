"""Early-learning regularisation whose two settings are learned, on digits with 40 % of their labels wrong.

A network learns first what is true of most labels, then the wrong ones by heart. Liu, Niles-Weed,
Razavian and Fernandez-Granda (2020, "Early-learning regularization prevents memorization of noisy labels",
arXiv:2007.00151) hold it to what it predicted early. With p the softmax, clipped to [1e-4, 1 - 1e-4]::

    loss = CE(p, label) + lambda mean_i log(1 - <p_i, t_i>)                              (1)
    t_i <- beta t_i + (1 - beta) p_i / |p_i|_1,    t_i = 0 at first                      (2)

and t_i is a constant to the gradient of (1). It is not one to the hypergradient: beta acts through it alone,
and lambda on it through all steps before. So the targets t are model state, and
`bilevel.penalties.early_learning` makes them constant at the innermost level of differentiation only.

The data are 1,000 digits for training, 300 with true labels for validation and 497 for the test; a network of
64, 256 and 10 units, 1,500 steps on minibatches of 100 with Adam at 3e-3.

What is learned is judged by a fresh run, with other weights and minibatches, of all 1,500 steps at the
lambda and beta found, on the test. On five seeds lambda = 0 ends at 0.69 to 0.74, what is learned from
lambda = 0.3, 1 and 3 at 0.944 to 0.984, 0.970 in the mean and on four of the seeds never below 0.964. On the
fifth it is 0.944 to 0.962, and a grid of 12 points, chosen on validation, ends at 0.942. The grid has an
advantage: the run that it is chosen by is the fresh one that it is judged by, weights and minibatches
included, while what is learned is judged by a run it has not seen. With so few hyperparameters the grid takes
less time; it is here to say what there is to find.

Two things have to be chosen to get through a run of Adam, and a table says why. `eps_root=1e-5` damps its
steps where gradients are small, and runs are short at first, 600 steps from the same start: through all
1,500, d value / d log lambda at lambda = 1 has no sign that could be trusted without the former, and with it
varies by a factor of four with the order of the minibatches. Six whole runs from where the short ones lead
raise lambda by a little, as short runs have little time to learn by heart. Whole runs at once from lambda =
0.3, where wrong labels are learned anyway, get nowhere; nor do they without damping from lambda = 1. The
cliff at strong lambda (0.08 on the test at lambda = 7, beta = 0.3) holds no danger to short runs with a
clipped gradient: from lambda = 30 they come back to 5 in 16 steps.

One run that goes on, with an outer step every 50 steps, takes two to three times as long as a plain one and
ends at 0.950 to 0.984 itself. But lambda and beta of its end are those of a network that has learned
already: fresh runs there come to 0.839 to 0.986.

A damped Adam is not optax's own, and its runs learn less by heart: with the latter lambda = 0 ends at 0.67
to 0.74, and what was learned for the former at 0.940 to 0.978, 0.966 in the mean.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.measure import table
from bilevel.penalties import early_learning

ROWS, WRONG, VALID, BATCH, HIDDEN, CLASSES = 1000, 400, 300, 100, 256, 10
STEPS, HORIZON = 1500, 600
SEEDS, STRENGTHS, BETA = 5, (0.3, 1.0, 3.0), 0.7
GRID = [(strength, beta) for beta in (0.3, 0.7, 0.9) for strength in (2.0, 3.0, 5.0, 7.0)]
ASKED = 0.96
RATE, EPS_ROOT, TINY = 3e-3, 1e-5, 1e-8


def logits(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"] + params["shift"]


def inner(params, hparams, batch, targets):
    """Eq. (1) with the targets of Eq. (2), which are returned."""
    z = logits(params, batch["x"])
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))
    penalty, new = early_learning(z, hparams["lambda"], targets[batch["i"]], hparams["beta"])
    return loss + penalty, targets.at[batch["i"]].set(new)


def outer(params, hparams, batch, targets):
    """Cross-entropy; accuracy and the hyperparameters become columns of the history."""
    del targets
    z = logits(params, batch["x"])
    accuracy = jnp.mean(jnp.argmax(z, -1) == batch["y"])
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))
    return loss, {"accuracy": accuracy, **hparams}


PROBLEM = bilevel.Problem(
    inner,
    outer,
    constraints={"lambda": bilevel.positive(), "beta": bilevel.interval(0, 1)},
    has_state=True,
)


@functools.cache
def digits(seed: int):
    """train, valid and test of a seed; 400 of the training labels are another one."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    noisy = y[:ROWS].copy()
    wrong = rng.permutation(ROWS)[:WRONG]
    noisy[wrong] = (noisy[wrong] + rng.integers(1, CLASSES, WRONG)) % CLASSES
    train = {"x": x[:ROWS], "y": noisy, "i": np.arange(ROWS)}
    valid, test = slice(ROWS, ROWS + VALID), slice(ROWS + VALID, None)
    return train, {"x": x[valid], "y": y[valid]}, {"x": x[test], "y": y[test]}


def start(key):
    """A network with He's initial weights in its hidden layer, half their variance above."""
    one, two = jax.random.split(key)
    return {
        "hidden": jax.random.normal(one, (64, HIDDEN)) * np.float32(np.sqrt(2 / 64)),
        "bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(two, (HIDDEN, CLASSES)) * np.float32(np.sqrt(1 / HIDDEN)),
        "shift": jnp.zeros(CLASSES),
    }


def no_targets():
    return jnp.zeros((ROWS, CLASSES))


@functools.cache
def adam(eps_root: float) -> optax.GradientTransformation:
    return optax.adam(RATE, eps_root=eps_root)


@functools.partial(jax.jit, static_argnames="eps_root")
def trained(eps_root: float, hparams, key, train, valid, test):
    """Loss on valid and accuracy on test after a plain run, hparams fixed; the loop is written by hand."""
    key_start, key_data = jax.random.split(key)
    params, optimizer = start(key_start), adam(eps_root)

    def step(at, rows):
        params, state, targets = at
        batch = jax.tree.map(lambda x: x[rows], train)
        grads, targets = jax.grad(inner, has_aux=True)(params, hparams, batch, targets)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, targets), None

    epochs = jax.random.split(key_data, STEPS * BATCH // ROWS)
    rows = jax.vmap(lambda key: jax.random.permutation(key, ROWS))(epochs).reshape(STEPS, BATCH)
    (params, _, targets), _ = jax.lax.scan(step, (params, optimizer.init(params), no_targets()), rows)
    return outer(params, hparams, valid, targets)[0], outer(params, hparams, test, targets)[1]["accuracy"]


def fresh(hparams, seed: int, eps_root: float = EPS_ROOT) -> tuple[float, float]:
    """Validation loss and test accuracy of a plain run at hparams, from weights of its own."""
    hparams = {name: jnp.float32(value) for name, value in hparams.items()}
    key = jax.random.fold_in(jax.random.key(1), seed)
    loss, accuracy = trained(eps_root, hparams, key, *jax.tree.map(jnp.asarray, digits(seed)))
    return float(loss), float(accuracy)


@functools.cache
def method(steps: int, eps_root: float = EPS_ROOT, rate: float = 0.2, restart: bool = True):
    clipped = optax.chain(optax.clip(1.0), optax.adam(rate, b1=0.5, b2=0.9))
    return bilevel.alternating(bilevel.forward(), adam(eps_root), clipped, inner_steps=steps, restart=restart)


def tune(seed: int, hparams, how, outer_steps: int):
    """A run of `bilevel.optimize`."""
    train, valid, test = digits(seed)
    return bilevel.optimize(
        PROBLEM, start(jax.random.key(seed)), hparams, bilevel.minibatches(train, BATCH), valid, how,
        outer_steps, key=jax.random.key(seed), test=test, judge_every=outer_steps,
        model_state=no_targets(), progress=False,
    )  # fmt: skip


def begun(strength: float):
    return {"lambda": strength, "beta": BETA}


def short_then_whole(seed: int, strength: float):
    """The study's own way: 12 outer steps through short runs, and 6 through whole ones from there."""
    short = tune(seed, begun(strength), method(HORIZON), 12)
    return short, tune(seed, short.best.hparams, method(STEPS, rate=0.1), 6)


def going_on(seed: int, strength: float):
    """One run that goes on, with an outer step every 50 steps."""
    return tune(seed, begun(strength), method(50, restart=False), STEPS // 50)


def slopes(horizon: int, eps_root: float, strength: float = 1.0, orders: int = 5) -> np.ndarray:
    """d value / d log lambda of seed 0, for several orders of the minibatches."""
    train, valid, _ = digits(0)
    fn = _slope(horizon, eps_root)
    taken = []
    for order in range(orders):
        rng = np.random.default_rng(order)
        rows = np.concatenate([rng.permutation(ROWS) for _ in range(horizon * BATCH // ROWS)])
        batches = jax.tree.map(lambda x, rows=rows: x[rows].reshape(horizon, BATCH, *x.shape[1:]), train)
        hparams = {"lambda": jnp.float32(strength), "beta": jnp.float32(BETA)}
        taken.append(strength * float(fn(start(jax.random.key(0)), hparams, batches, valid)))
    return np.asarray(taken)


def _slope(horizon: int, eps_root: float):
    hypergradient = bilevel.hypergradient(PROBLEM, bilevel.forward(adam(eps_root), horizon))

    @jax.jit
    def slope(params, hparams, batches, valid):
        train = bilevel.stacked(batches)
        return hypergradient(params, hparams, train, valid, model_state=no_targets()).grad["lambda"]

    return slope


def show_slopes() -> None:
    rows = []
    for eps_root in (TINY, EPS_ROOT):
        for horizon in (HORIZON, STEPS):
            cells = (f"{slope:.3g}" for slope in slopes(horizon, eps_root))
            rows.append((f"{eps_root:g}", horizon, *cells))
    print("  seed 0: d value / d log lambda at lambda = 1, for five orders of the minibatches")
    table(("eps_root", "steps", *map(str, range(1, 6))), rows)


def path(result, every: int) -> str:
    """lambda at some outer steps, and at the last."""
    taken = result.history["lambda"]
    return " ".join(f"{value:.2g}" for value in [*taken[:-1:every], taken[-1]])


def found(hparams, seed: int) -> tuple[str, ...]:
    """Cells: hyperparameters, test accuracies of fresh runs there with both kinds of Adam."""
    accuracies = (fresh(hparams, seed, eps_root)[1] for eps_root in (EPS_ROOT, 0.0))
    return *(f"{float(hparams[name]):.2f}" for name in ("lambda", "beta")), *(f"{a:.3f}" for a in accuracies)


FOUND = "lambda", "beta", "fresh", "optax's Adam"


def by_grid(seed: int) -> tuple[str, ...]:
    """Cells of the best of the grid on validation, by the very runs whose test accuracy is told."""
    tried = [{"lambda": strength, "beta": beta} for strength, beta in GRID]
    return found(min(tried, key=lambda hparams: fresh(hparams, seed)[0]), seed)


def summary(name: str, cells) -> None:
    values = np.asarray(cells, float)
    print(
        f"  {name}: {values.mean():.3f} ({values.min():.3f} to {values.max():.3f}), "
        f"{np.sum(values >= ASKED)} of {values.size} at {ASKED:.2f} or above"
    )


def show_learned() -> None:
    """The study's own way, beside lambda = 0 and a grid."""
    rows, learned, ends = [], [], []
    for seed in range(SEEDS):
        rows.append((seed, "lambda = 0", "", *found({"lambda": 0.0, "beta": BETA}, seed), ""))
        rows.append((seed, "grid of 12", "", *by_grid(seed), ""))
        for strength in STRENGTHS:
            short, whole = short_then_whole(seed, strength)
            cells, own = found(whole.best.hparams, seed), f"{whole.test['best']['accuracy']:.3f}"
            way = f"{path(short, 3)} | {path(whole, 2)}"
            rows.append((seed, f"learned from {strength:g}", way, *cells, own))
            learned.append(cells[2:])
            ends.append(own)
    print(f"  {HORIZON} steps 12 times, then {STEPS} steps 6 times; accuracies on the test")
    table(("seed", "", "lambda on the way", *FOUND, "its own"), rows)
    summary("learned, fresh runs", [cells[0] for cells in learned])
    summary("learned, fresh runs with optax's Adam", [cells[1] for cells in learned])
    summary("learned, the last run of the tuning", ends)


def show_going_on() -> None:
    rows, own, later = [], [], []
    for seed in range(SEEDS):
        for strength in STRENGTHS:
            result = going_on(seed, strength)
            cells, end = found(result.hparams, seed), f"{result.test['last']['accuracy']:.3f}"
            rows.append((seed, f"{strength:g}", path(result, 5), *cells, end))
            own.append(end)
            later.append(cells[2])
    print(f"  one run of {STEPS} steps, an outer step every 50; lambda and beta as they are in the end")
    table(("seed", "from", "lambda on the way", *FOUND, "its own"), rows)
    summary("its own", own)
    summary("fresh runs", later)


def show_failures() -> None:
    rows = []
    for label, how, strength, outer_steps in (
        ("whole runs", method(STEPS), 0.3, 16),
        ("whole runs, eps_root=1e-8", method(STEPS, TINY), 1.0, 16),
        ("short runs, far too strong", method(HORIZON), 30.0, 16),
    ):
        result = tune(0, begun(strength), how, outer_steps)
        own = f"{result.test['best']['accuracy']:.3f}"
        rows.append((label, f"{strength:g}", path(result, 3), *found(result.best.hparams, 0), own))
    print("  seed 0, 16 outer steps")
    table(("", "from", "lambda on the way", *FOUND, "its own"), rows)


def main() -> None:
    show_learned()
    show_going_on()
    show_slopes()
    show_failures()
