"""Weights of domains: the loss is what it says, on batches too, and its hypergradient is the influence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import mixtures

RNG = np.random.default_rng(0)
# Three domains of 30, 12 and 6 rows, each with targets of its own; validation data are like the second.
DOMAINS = np.repeat([0, 1, 2], [30, 12, 6])
X = RNG.normal(size=(48, 4))
TRUTHS = RNG.normal(size=(3, 4))
Y = np.einsum("nd,nd->n", X, TRUTHS[DOMAINS])
TRAIN = {"x": X, "y": Y, "domain": DOMAINS}
VALID = {"x": (v := RNG.normal(size=(20, 4))), "y": v @ TRUTHS[1]}
PI = np.array([0.5, 0.3, 0.2])
L2 = 0.1


def row_loss(w, hparams, batch):
    del hparams
    return 0.5 * (batch["x"] @ w - batch["y"]) ** 2


def valid_loss(w, hparams, batch):
    return row_loss(w, hparams, batch).mean()


MIXED = mixtures.loss(row_loss, mixtures.shares(TRAIN, 3))


def inner(w, hparams, batch):
    return MIXED(w, hparams, batch) + 0.5 * L2 * jnp.sum(w**2)


PROBLEM = bilevel.Problem(inner, valid_loss, constraints={"mixture": bilevel.simplex()})


def by_hand(w, pi):
    return sum(p * np.mean(0.5 * (X[k == DOMAINS] @ w - Y[k == DOMAINS]) ** 2) for k, p in enumerate(pi))


def test_on_whole_arrays_it_is_the_sum_of_weighted_means():
    w = RNG.normal(size=4)
    np.testing.assert_allclose(MIXED(w, {"mixture": PI}, TRAIN), by_hand(w, PI), rtol=1e-12)
    alone = mixtures.loss(row_loss, mixtures.shares(TRAIN, 3), name=None)
    np.testing.assert_allclose(alone(w, PI, TRAIN), by_hand(w, PI), rtol=1e-12)


def test_the_hypergradient_is_minus_the_influence_of_each_domain():
    """Closed form of ridge regression; the derivative is by pi as free numbers, in natural units."""
    hessian, right, means = L2 * np.eye(4), np.zeros(4), []
    for k, p in enumerate(PI):
        x, y = X[k == DOMAINS], Y[k == DOMAINS]
        hessian, right = hessian + p * x.T @ x / len(y), right + p * x.T @ y / len(y)
    w = np.linalg.solve(hessian, right)
    for k in range(3):
        x, y = X[k == DOMAINS], Y[k == DOMAINS]
        means.append(x.T @ (x @ w - y) / len(y))
    outer_grad = VALID["x"].T @ (VALID["x"] @ w - VALID["y"]) / 20
    expected = -np.array([g @ np.linalg.solve(hessian, outer_grad) for g in means])
    fn = jax.jit(bilevel.hypergradient(PROBLEM, bilevel.implicit(bilevel.cg(tol=1e-13))))
    estimate = fn(w, {"mixture": PI}, TRAIN, VALID)
    np.testing.assert_allclose(estimate.grad["mixture"], expected, rtol=1e-8)


@pytest.mark.parametrize("strata", [1, 3])
def test_the_mean_over_the_batches_of_an_epoch_is_the_loss(strata):
    """48 rows in batches of 6: most of them lack the third domain. An epoch visits every row once."""
    source = bilevel.minibatches(TRAIN, 6, strata=strata)
    w, key = RNG.normal(size=4), jax.random.key(0)
    assert any(2 not in source.batch(key, t)["domain"] for t in range(8))
    values = [MIXED(w, {"mixture": PI}, source.batch(key, t)) for t in range(8)]
    np.testing.assert_allclose(np.mean(values), by_hand(w, PI), rtol=1e-12)


def test_rows_drawn_in_other_proportions_give_the_same_loss():
    """In expectation, here computed: with the probability of each row instead of draws."""
    q = np.array([0.2, 0.3, 0.5])
    drawn = mixtures.loss(row_loss, q)
    w = RNG.normal(size=4)
    probability = (q / np.bincount(DOMAINS))[DOMAINS]
    one_by_one = [
        drawn(w, {"mixture": PI}, jax.tree.map(lambda x, i=i: x[i : i + 1], TRAIN)) for i in range(48)
    ]
    np.testing.assert_allclose(probability @ np.array(one_by_one), by_hand(w, PI), rtol=1e-12)


def test_rows_are_drawn_in_proportion_and_evenly_within_a_domain():
    n, q = 20000, np.array([0.2, 0.3, 0.5])
    rows = jax.jit(mixtures.sample, static_argnums=3)(jax.random.key(1), q, DOMAINS, n)
    counts = np.bincount(rows, minlength=48)
    expected = n * (q / np.bincount(DOMAINS))[DOMAINS]
    # Chi squared of 47 degrees of freedom: mean 47, standard deviation 9.7.
    assert np.sum((counts - expected) ** 2 / expected) < 47 + 4 * 9.7


def test_every_row_is_within_reach_and_none_of_a_domain_without_a_proportion():
    """A sum over rows in float16 has 1024 steps at most; domain 2 is beyond the two proportions."""
    domains = np.repeat([0, 2, 1], [2000, 1000, 2000])
    half = np.array([0.5, 0.5], np.float16)
    rows = np.asarray(mixtures.sample(jax.random.key(0), half, domains, 20000))
    assert set(domains[rows]) == {0, 1}
    # Of 4000 rows, 5 draws each on average leave 4000 exp(-5) = 27 out.
    assert len(set(rows.tolist())) > 3900


def test_weights_may_be_a_list():
    w = RNG.normal(size=4)
    np.testing.assert_allclose(MIXED(w, {"mixture": PI.tolist()}, TRAIN), by_hand(w, PI), rtol=1e-12)


def test_strata_that_leave_rows_out_are_counted_as_they_are():
    whole = mixtures.shares(TRAIN, 3)
    np.testing.assert_allclose(whole, [30 / 48, 12 / 48, 6 / 48])
    cut = mixtures.shares(bilevel.minibatches(TRAIN, 5, strata=5), 3)  # five blocks of nine
    np.testing.assert_allclose(cut, [30 / 45, 12 / 45, 3 / 45])


def test_a_run_finds_the_domain_that_validation_is_like():
    start = np.zeros(4), {"mixture": np.full(3, 1 / 3)}
    sampled = bilevel.minibatches(jax.tree.map(jnp.asarray, TRAIN), 12, strata=2)
    method = bilevel.alternating(bilevel.implicit(), optax.sgd(0.05), optax.adam(0.1), inner_steps=5)
    result = bilevel.optimize(PROBLEM, *start, sampled, VALID, method, 80, progress=False)
    np.testing.assert_allclose(result.hparams["mixture"].sum(), 1, rtol=1e-12)
    assert result.hparams["mixture"][1] > 0.8


def test_float32_stays():
    single = jax.tree.map(lambda x: np.float32(x) if x.dtype == float else x, TRAIN)
    out = MIXED(np.zeros(4, np.float32), {"mixture": jnp.asarray(PI, jnp.float32)}, single)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: mixtures.shares(TRAIN, 5), ValueError, "domain 3, 4 of 5 has no rows"),
        (lambda: mixtures.shares(TRAIN, 2), ValueError, "from 0 to num_domains - 1 = 1, got 0 to 2"),
        (lambda: mixtures.shares({"x": X}, 3), ValueError, "under 'domain'"),
        (lambda: mixtures.shares({"domain": X}, 3), TypeError, "whole numbers"),
        (lambda: mixtures.loss(row_loss, [0.5, 0.6]), ValueError, "sum to one"),
        (lambda: mixtures.loss(row_loss, [1.0, 0.0]), ValueError, "positive"),
        (lambda: mixtures.loss(3, [1.0]), TypeError, "row_loss"),
        (lambda: MIXED(np.zeros(4), {"mixture": np.ones(2)}, TRAIN), ValueError, "each of 3 domains"),
        (
            lambda: mixtures.loss(valid_loss, PI)(np.zeros(4), {"mixture": PI}, TRAIN),
            ValueError,
            "one loss for each row",
        ),
        (
            lambda: MIXED(np.zeros(4), {"mixture": PI}, TRAIN | {"domain": DOMAINS + 1}),
            ValueError,
            r"batch\['domain'\] must be from 0 to 2, .* got 1 to 3",
        ),
        (lambda: mixtures.sample(jax.random.key(0), 1.0, DOMAINS, 2), ValueError, "vectors"),
    ],
)
def test_bad_input(call, error, part):
    with pytest.raises(error, match=part):
        call()


def test_domains_that_are_constants_of_a_program_are_read():
    """Under jit, where the minimum of a constant jax.Array would be traced."""
    batch = {"x": jnp.arange(4.0), "domain": jnp.array([0, 1, 1, 0])}
    fn = mixtures.loss(lambda w, h, b: w * b["x"], [0.5, 0.5])
    value = jax.jit(lambda w: fn(w, {"mixture": jnp.array([0.25, 0.75])}, batch))(2.0)
    np.testing.assert_allclose(value, np.mean([0.0, 1.5 * 2, 1.5 * 4, 0.5 * 6]))
    wrong = batch | {"domain": jnp.array([0, 2, 1, 0])}
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        jax.jit(lambda w: fn(w, {"mixture": jnp.array([0.5, 0.5])}, wrong))(1.0)
