"""The studies of stochastic methods and of drawn members: budgets, choices, and what is asked."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from benchmarks import drawn_members, stochastic_methods
from bilevel.problem import Counts

MADE = np.array([[[4.0, 2.0, 1.0], [4.0, 4.0, 3.0]]])  # one seed, two orders, three shares; means 4, 3, 2


class At(NamedTuple):
    hparams: jax.Array


def test_a_walk_keeps_its_budget_and_what_it_had_at_the_shares():
    def step(state):
        return At(state.hparams + 1), jnp.float32(3), state.hparams[0] != 2

    end = stochastic_methods.walk(step, At(jnp.zeros(2)), 4.0, 20.0)
    # After n steps 4 + 3 n examples: none in a quarter, two in half, five in all of twenty.
    np.testing.assert_array_equal(end.hparams, [[0, 0], [2, 2], [5, 5]])
    assert (int(end.steps), int(end.rejected)) == (5, 1)


def test_a_member_of_a_race_is_its_method_alone():
    arm, rates, budget = stochastic_methods.ARMS["soba"], [(0.3, 3.0), (1.0, 10.0)], 3000
    end = stochastic_methods.race(arm, rates, [0, 1], budget)
    # A gradient of each level and two products, of twice its cost, on batches of 64.
    assert end.steps.tolist() == [budget // (6 * 64)] * 2
    own, method = stochastic_methods.task(1), arm.make(*rates[1])
    sources = [bilevel.minibatches(part, own.batch) for part in (own.train, own.valid)]
    key = jax.random.fold_in(jax.random.key(0), 1)
    state = method.init(own.problem, own.params, own.hparams, *sources, key=key)
    step = jax.jit(lambda state: method.step(own.problem, state, *sources)[0])
    for _ in range(7):
        state = step(state)
    np.testing.assert_allclose(end.hparams["l2"][1, -1], state.hparams["l2"], rtol=1e-4)
    assert not np.allclose(end.hparams["l2"][0], end.hparams["l2"][1], rtol=1e-2)


@pytest.mark.parametrize("name", ["saba", "srba", "ttsa, falling", "slip", "bo_rep", "f2sa", "bome"])
def test_every_kind_of_method_runs_in_a_race(name):
    arm = stochastic_methods.ARMS[name]
    race = functools.partial(stochastic_methods.race, arm, [(0.3, 3.0)] * 2, [0, 0])
    end = jax.eval_shape(race)
    assert end.hparams["l2"].shape == (2, len(stochastic_methods.SHARES), 200)


def test_passes_before_the_first_step_count():
    arms = stochastic_methods.ARMS
    touched = {name: arm.first(4992, 1984) for name, arm in arms.items() if any(arm.first(4992, 1984))}
    assert touched == {"saba": Counts(4992, 1984, 4992, 4992), "srba": Counts(0, 1984, 0, 0)}


def test_claims_are_ratios_of_mean_excesses():
    found = {
        name: stochastic_methods.Found((1.0, 1.0), MADE * scale, 1, 0)
        for name, scale in {
            "soba": 1, "stocbio": 2, "ttsa": 3, "ttsa, falling": 1.5, "slip": 1, "f2sa": 2, "bome": 3,
        }.items()
    }  # fmt: skip
    checks = stochastic_methods.checks(found)
    assert {check.what: check.got for check in checks} == {
        "f2sa over soba": 2.0,
        "f2sa over stocbio": 1.0,
        "bome over soba": 3.0,
        "bome over stocbio": 1.5,
        "stocbio over ttsa, half the budget": 1.3,
        "stocbio over ttsa, all the budget": 1.3,
        "slip over stocbio, half the budget": 0.5,
        "slip over stocbio, all the budget": 0.5,
    }
    assert [check.met for check in checks] == [True, True, False, True, False, False, True, True]


def test_grids_that_seeds_do_not_share_evenly_are_refused(monkeypatch):
    monkeypatch.setattr(stochastic_methods, "INNER_RATES", (0.3,))
    with pytest.raises(ValueError, match="6 pairs of rates are no multiple of 4 seeds"):
        stochastic_methods.study("soba", seeds=(1, 2, 3, 4))


# --- Drawn members ----------------------------------------------------------------------------------------


def test_pictures_are_noisy_crops_of_both_photographs():
    pytest.importorskip("PIL")
    hparams, data = drawn_members.instance(1)
    inside = data["noisy"][:, 1:-1, 1:-1]
    assert data["clean"].shape == inside.shape == (32, 12, 12)
    assert float(jnp.std(inside - data["clean"])) == pytest.approx(0.1, rel=0.05)
    assert hparams["filters"].shape == (8, 3, 3)
    assert not np.allclose(drawn_members.instance(2)[1]["clean"], data["clean"])


@pytest.mark.parametrize("name", ["drawn, rising", "all, MAID"])
def test_both_kinds_of_method_learn_from_members(name):
    pytest.importorskip("PIL")
    hparams, data = drawn_members.instance(1)
    run = functools.partial(drawn_members.run, drawn_members.ARMS[name], 10.0)
    end = jax.eval_shape(run, jnp.asarray(0.1), hparams, data, jax.random.key(0))
    assert end.hparams["filters"].shape == (3, 8, 3, 3)


def test_losses_are_compared_early_and_late():
    scales = {"drawn, rising": 2, "all, rising": 3, "all, MAID": 1, "drawn, rough": 2, "drawn, fine": 4}
    found = {name: drawn_members.Found(0.1, MADE[0] * scale, 1, 0) for name, scale in scales.items()}
    checks = drawn_members.checks(found)
    assert [(check.got, check.asked) for check in checks[:4]] == [
        (8.0, "< 12.0"),
        (4.0, "< 6.0"),
        (8.0, "< 4.0"),
        (4.0, "< 2.0"),
    ]
    assert [check.met for check in checks] == [True, True, False, False, False, False, True, True]
