"""Hypernetworks: sizes that do not depend on the input, sequences of layers, and what is forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import nn

MODEL = {"first": {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}, "out": jnp.full((5,), 2.0)}
KEY = jax.random.key(0)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def away(network, params, inputs):
    """What h adds to the base."""
    return flat(network(params, inputs)) - flat(params["base"])


def test_without_the_encoding_outputs_grow_with_their_inputs():
    network = nn.hypernetwork(MODEL, 2, encoding=False)
    params = network.init(KEY, MODEL)
    z = jnp.array([0.1, 0.2])
    np.testing.assert_allclose(away(network, params, 4.2 * z), 4.2 * away(network, params, z), rtol=1e-12)
    coded = nn.hypernetwork(MODEL, 2)
    params = coded.init(KEY, MODEL)
    ratio = np.linalg.norm(away(coded, params, 4.2 * z)) / np.linalg.norm(away(coded, params, z))
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("inputs", [np.zeros(3), np.ones(3), np.array([0.1, 0.5, 0.9])])
def test_the_encoding_has_one_norm(inputs):
    assert nn.encode(inputs).shape == (6,)
    np.testing.assert_allclose(np.linalg.norm(nn.encode(inputs)), np.sqrt(3), rtol=1e-12)


def test_variance_over_hypernetworks_is_flat_in_the_input():
    def variance(encoding, value):
        network = nn.hypernetwork(MODEL, 1, encoding=encoding)

        def one(key):
            params = network.init(key, MODEL)
            made = jax.tree.leaves(network(params, jnp.array([value])))
            return jnp.concatenate(
                [(a - b).ravel() for a, b in zip(made, jax.tree.leaves(MODEL), strict=True)]
            )

        return float(jnp.var(jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000)), axis=0).mean())

    flat = [variance(True, value) for value in (0.0, 0.3, 1.0)]
    assert max(flat) / min(flat) < 1.2
    assert variance(False, 1.0) / variance(False, 0.3) == pytest.approx(1 / 0.09, rel=1e-6)


def test_the_output_begins_at_an_existing_network():
    network, params = nn.from_existing(MODEL, 1, KEY, hidden=(4,))
    assert jax.tree.structure(network(params, jnp.array([0.5]))) == jax.tree.structure(MODEL)
    np.testing.assert_array_equal(flat(network(params, jnp.array([0.5]))), flat(MODEL))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL)
    made = [nn.hypernetwork(half, 1), nn.recurrent_hypernetwork(half, tasks=2)]
    for of, given in zip(made, (jnp.array([0.5]), 1), strict=True):
        assert {x.dtype for x in jax.tree.leaves(of(of.init(KEY, half), given))} == {jnp.dtype(jnp.bfloat16)}
    plain = nn.hypernetwork(MODEL, 1, residual=False).init(KEY, MODEL)
    assert not np.any(flat(plain["base"]))
    assert hash(network) == hash(nn.hypernetwork(MODEL, 1, hidden=(4,)))


def test_it_learns_the_solutions_of_a_family_of_ridge_problems():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 4)), rng.standard_normal(30)
    start = {"w": jnp.zeros(4)}
    network, params = nn.from_existing(start, 1, KEY)

    def strength(g):
        return 10.0 ** (4 * g - 3)

    def loss(params, g):
        w = network(params, g[None])["w"]
        return 0.5 * jnp.mean((a @ w - b) ** 2) + 0.5 * strength(g) * jnp.sum(w**2)

    @jax.jit
    def train(params):
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 4000))

        def step(k, at):
            params, state = at
            g = jax.random.uniform(jax.random.fold_in(KEY, k), (16,))
            grads = jax.grad(lambda p: jnp.mean(jax.vmap(lambda g: loss(p, g))(g)))(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 4000, step, (params, optimizer.init(params)))[0]

    params = train(params)
    for g in (0.1, 0.5, 0.9):
        exact = np.linalg.solve(a.T @ a / 30 + strength(g) * np.eye(4), a.T @ b / 30)
        assert np.abs(network(params, jnp.array([g]))["w"] - exact).max() < 0.02


# --- Recurrent --------------------------------------------------------------------------------------------


def test_chunks_cover_the_parameters_and_begin_at_the_base():
    network = nn.recurrent_hypernetwork(MODEL, tasks=3, chunk=7)
    assert network.chunks == 4  # 25 numbers
    params = network.init(KEY, MODEL)
    still = params | {"out": jax.tree.map(jnp.zeros_like, params["out"])}
    np.testing.assert_array_equal(flat(network(still, 2)), flat(MODEL))
    one, two = flat(network(params, 0)), flat(network(params, 1))
    assert np.abs(one - two).max() > 1e-3


def test_a_later_chunk_depends_on_those_before():
    network = nn.recurrent_hypernetwork(MODEL, tasks=1, chunk=5)
    params = network.init(KEY, MODEL)
    changed = params | {"chunks": params["chunks"].at[0].add(1.0)}
    difference = np.abs(flat(network(params, 0)) - flat(network(changed, 0)))
    assert all(difference[5 * i : 5 * i + 5].max() > 1e-6 for i in range(network.chunks))


def regression(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 3))
    return jnp.asarray(x), jnp.asarray(np.sin(x @ rng.standard_normal(3)))


def learned(network, params, task, beta, steps=800):
    """Adam on one task, with what earlier ones were given held by ``beta``."""
    x, y = regression(task)
    old, optimizer = params, optax.adam(6e-3)

    def error(params, task, x, y):
        w = network(params, task)
        return jnp.mean((jnp.tanh(x @ w["first"]["kernel"] + w["first"]["bias"][None]) @ w["out"] - y) ** 2)

    @jax.jit
    def train(params):
        def step(_, at):
            params, state = at
            grads = jax.grad(lambda p: error(p, task, x, y) + beta * nn.forgetting(network, p, old, task))(
                params
            )
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]

    params = train(params)
    return params, [float(error(params, i, *regression(i))) for i in range(network.tasks)]


def test_the_penalty_keeps_old_tasks_and_without_it_they_are_forgotten():
    model = {"first": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}, "out": jnp.zeros(5)}
    network = nn.recurrent_hypernetwork(model, tasks=2, cells=16, chunk=9)
    start = network.init(KEY, model)
    first, (error, _) = learned(network, start, 0, beta=0.0)
    assert error < 0.02
    _, forgotten = learned(network, first, 1, beta=0.0)
    kept, remembered = learned(network, first, 1, beta=1.0)
    assert forgotten[0] > 0.1
    assert remembered[0] < 0.03
    assert remembered[1] < 0.05
    frozen, _ = learned(network, first, 1, beta=1e4, steps=300)
    assert float(nn.forgetting(network, frozen, first, 1)) < 1e-4
    assert float(nn.forgetting(network, kept, first, 0)) == 0  # no task before
    assert np.abs(flat(network(kept, 1)) - flat(network(first, 1))).max() > 0.1


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: nn.hypernetwork(MODEL, 0), ValueError, "inputs"),
        (lambda: nn.hypernetwork(MODEL, 1, hidden=(4, 0)), ValueError, "hidden"),
        (lambda: nn.hypernetwork({"a": jnp.arange(3)}, 1), TypeError, "floating"),
        (lambda: nn.hypernetwork(MODEL, 1, encoding="mip"), TypeError, "encoding"),
        (lambda: nn.recurrent_hypernetwork(MODEL, tasks=1.5), TypeError, "tasks"),
    ],
)
def test_what_does_not_fit_is_said(call, error, part):
    with pytest.raises(error, match=part):
        call()


def test_inputs_have_to_be_as_many_as_were_said():
    network, params = nn.from_existing(MODEL, 2, KEY)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        network(params, jnp.ones(3))


def test_a_recurrent_one_is_the_inner_variable_of_a_problem():
    network = nn.recurrent_hypernetwork({"w": jnp.zeros(2)}, tasks=2, cells=4, chunk=2)

    def loss(params, h, batch):
        w = [network(params, task)["w"] for task in (0, 1)]
        return sum(jnp.sum((x - batch.mean() - i) ** 2) + jnp.exp(h) * jnp.sum(x**2) for i, x in enumerate(w))

    problem = bilevel.Problem(loss, lambda p, h, batch: loss(p, -99.0, batch))
    method = bilevel.alternating(bilevel.one_step(), optax.sgd(0.01), optax.adam(1e-2), inner_steps=1)
    params = network.init(KEY, {"w": jnp.zeros(2)})
    result = bilevel.optimize(problem, params, 0.5, jnp.ones(2), jnp.ones(2), method, 10, progress=False)
    assert np.isfinite(result.history["value"]).all()


def test_its_parameters_are_the_inner_variables_of_a_problem():
    # One hyperparameter of the training loss, the network's parameters as a function of it.
    network, params = nn.from_existing({"w": jnp.zeros(())}, 1, KEY, hidden=(8,))

    def inner(params, h, batch):
        return (
            0.5 * (network(params, h[None])["w"] - batch.mean()) ** 2
            + 0.5 * h * network(params, h[None])["w"] ** 2
        )

    def outer(params, h, batch):
        return 0.5 * (network(params, h[None])["w"] - batch.mean()) ** 2

    problem = bilevel.Problem(inner, outer, constraints=bilevel.interval(0, 1))
    method = bilevel.alternating(bilevel.one_step(), optax.sgd(0.05), optax.adam(1e-2), inner_steps=1)
    data = jnp.full(2, 2.0), jnp.full(2, 1.5)
    result = bilevel.optimize(problem, params, 0.5, *data, method, 50, progress=False)
    assert np.isfinite(result.history["value"]).all()
