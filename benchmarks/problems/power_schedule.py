"""A learning rate that falls with a power of the step, learned on a short run and used for a longer one.

Shen et al. (2024, "Power scheduler") find that the best rate falls with a power of the tokens seen, whatever
the number of them will be::

    rate_t = min(peak, scale (t + 1)^-fall),    linearly to zero in the last fifth

Here the language model of `repeated_data` reads new text, each row once, for S = 256 steps of SGD with
momentum. All arms tune peak, scale and fall, from the paper's fall of 0.51; another arm takes the best
of 16 peaks of a cosine. The claim is tested by what they found in runs of 4 S steps, the decay and the cosine
stretched, against a cosine whose peak is the best of the 16 for 4 S.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems.paper import Answer, Case, Evidence, Paper, Score, key_of, scored
from benchmarks.problems.repeated_data import BATCH, MOMENTUM, loss, outer, start, texts

STEPS, LONGER, DECAY, JUDGES = 256, 4, 0.2, 4
PEAKS = np.geomspace(0.02, 2, 16, dtype=np.float32)
FIRST = {"peak": 0.1, "scale": 0.3, "fall": 0.51}
NEAR = 0.01  # of the loss: what still counts as transferred


def rate(numbers, steps: int):
    """The power law of three numbers, the cosine of a peak alone."""
    if "fall" not in numbers:
        return bilevel.schedules.cosine(numbers["peak"], steps)
    peak, scale, exponent = numbers["peak"], numbers["scale"], -numbers["fall"]
    return bilevel.schedules.power_law(peak, scale, exponent, decay=round(DECAY * steps), steps=steps)


PROBLEM = bilevel.Problem(outer, outer, start=start, constraints=bilevel.positive())
METHOD = bilevel.alternating(
    bilevel.unrolled(per_step={"lr": lambda numbers: rate(numbers, STEPS)}),
    bilevel.tuned(lambda hparams: optax.sgd(hparams["lr"], momentum=MOMENTUM)),
    optax.adam(0.15, b2=0.9),
    inner_steps=STEPS,
)


def trained(schedule, key, rows, steps: int):
    """Params after one pass over as many new rows, in an order of its own."""
    key_start, key_order = jax.random.split(key)
    order = jax.random.permutation(key_order, steps * BATCH).reshape(steps, BATCH)
    optimizer = optax.sgd(schedule, momentum=MOMENTUM)

    def step(carry, chosen):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows[chosen]), state)
        return (optax.apply_updates(params, updates), state), None

    params = start(None, None, key_start)
    return jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]


def judge(hparams, key, own, steps: int) -> Score:
    params = trained(rate(hparams["lr"], steps), key, own[0], steps)
    return Score(loss(params, own[1]), loss(params, own[2]))


judged = jax.jit(judge, static_argnames="steps")


@jax.jit
def grid(key, own):
    """Validation losses of the peaks of a cosine, side by side, in runs of four times the steps."""
    return jax.vmap(lambda peak: judge({"lr": {"peak": peak}}, key, own, LONGER * STEPS).valid)(
        jnp.asarray(PEAKS)
    )


def own_texts(seed: int):
    return texts(seed, LONGER * STEPS * BATCH)


def of_numbers(numbers):
    return {"lr": {name: jnp.float32(value) for name, value in numbers.items()}}


def case(seed: int) -> Case:
    own = own_texts(seed)
    return Case(
        problem=PROBLEM,
        params=None,
        hparams=of_numbers(FIRST),
        train=bilevel.minibatches(own[0][: STEPS * BATCH], BATCH),
        valid=own[1],
        method=METHOD,
        steps=25,
        box={"peak": (0.02, 2.0), "scale": (0.05, 50.0), "fall": (0.05, 1.5)},
        spread=of_numbers,
        judge=lambda hparams, key: judged(hparams, key, own, steps=STEPS),
    )


def cosine(case: Case, seconds: float, seed: int) -> Answer:
    """The best peak."""
    del seconds
    found = [{"lr": {"peak": peak}} for peak in PEAKS]
    losses = [scored(case, hparams, key_of(seed, 1)).valid for hparams in found]
    return Answer(found[int(np.argmin(losses))], len(found))


# --- The claim --------------------------------------------------------------------------------------------


def longer(hparams, seed: int) -> np.ndarray:
    """Test losses after four times the steps, of runs that nothing was chosen on."""
    own = own_texts(seed)
    return np.array(
        [judged(hparams, key_of(seed, 50 + i), own, steps=LONGER * STEPS).test for i in range(JUDGES)]
    )


def evidence(cases: Mapping[int, Case], answers) -> Evidence:
    del cases
    power, cosines, again = [], [], []
    for seed, found in answers.items():
        best = PEAKS[int(np.nanargmin(grid(key_of(seed, 49), own_texts(seed))))]
        again.append({"lr": {"peak": best}})
        power.append(found["hypergradient"].hparams)
        cosines.append(found["cosine"].hparams)
    reference, by_power, by_cosine = (
        np.concatenate([longer(hparams, seed) for seed, hparams in zip(answers, own, strict=True)])
        for own in (again, power, cosines)
    )
    cost, other = by_power - reference, by_cosine - reference
    error = float(np.std(by_power - by_cosine, ddof=1) / np.sqrt(len(cost)))
    transfers = bool(cost.mean() < NEAR * reference.mean())
    gain = float(np.mean(by_cosine - by_power))
    better = gain > error
    verdict = "holds" if transfers and better else "holds in part" if transfers else "does not hold here"
    falls = [f"{float(own['lr']['fall']):.2f}" for own in power]
    sentence = (
        f"in {LONGER} times the steps the power law learned in {STEPS} has a loss of {by_power.mean():.4f}, "
        f"the cosine tuned there {by_cosine.mean():.4f} (paired difference {-gain:.4f} +- {error:.4f}), a "
        f"cosine tuned anew {reference.mean():.4f}: not to tune anew costs {cost.mean():.4f} and "
        f"{other.mean():.4f}. The power binds in {binding(power):.0%} of the steps before the decay (fall "
        f"{', '.join(falls)}; the paper has 0.51); the best peak of a cosine goes from {middle(cosines):.2g} "
        f"to {middle(again):.2g}."
    )

    def draw(ax):
        for own, name, lengths in (
            (power[0], "power law", (STEPS, LONGER * STEPS)),
            (cosines[0], "cosine", (STEPS, LONGER * STEPS)),
            (again[0], "cosine, tuned anew", (LONGER * STEPS,)),
        ):
            for steps in lengths:
                rates = bilevel.schedules.sampled(rate(own["lr"], steps), steps).values
                ax.plot(rates, label=f"{name}, {steps} steps")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(0.005, None)
        ax.set_xlabel("step, first seed")
        ax.set_ylabel("learning rate")
        ax.legend(frameon=False)
        ax.grid(color="0.9")

    return Evidence(verdict, sentence, draw)


def binding(found) -> float:
    """Share of the steps before the decay at which the cap is not what counts."""
    t = np.arange(1, round((1 - DECAY) * STEPS) + 1)
    return float(
        np.mean([own["lr"]["scale"] * t ** -float(own["lr"]["fall"]) < own["lr"]["peak"] for own in found])
    )


def middle(found) -> float:
    return float(np.exp(np.mean([np.log(own["lr"]["peak"]) for own in found])))


PAPER = Paper(
    title="a power schedule for more steps",
    source="Shen et al. 2024",
    claim="a power law learned on a short run is right for a longer one, where a cosine has to be tuned anew",
    case=case,
    evidence=evidence,
    unit="cross-entropy, nats, after 256 steps",
    arms={"cosine": cosine},
)
