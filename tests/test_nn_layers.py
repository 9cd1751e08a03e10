"""Response layers: each row has the network of its own perturbation, in every form of the layers."""

import collections

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from problems import RIDGE, RIDGE_LOG_L2, ridge

import bilevel
from bilevel import nn
from bilevel.nn import linen, nnx

N, ROWS = 3, 5
KEY = jax.random.key(0)


def _random(params, seed=1):
    """No gate is small."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params)


def _lstm(params, x, hparams):
    carry = (jnp.ones((len(x), 4)), jnp.full((len(x), 4), 0.5))
    return nn.lstm_cell(params, carry, x, hparams)[1]


RNG = np.random.default_rng(0)
# Each: (parameters, layer, input).
LAYERS = {
    "dense": (nn.dense_init(KEY, 6, 4, N), nn.dense, jnp.asarray(RNG.standard_normal((ROWS, 6)))),
    "dense over time": (
        nn.dense_init(KEY, 6, 4, N), nn.dense, jnp.asarray(RNG.standard_normal((ROWS, 2, 6))),
    ),
    "dense without bias": (
        nn.dense_init(KEY, 6, 4, N, bias=False), nn.dense, jnp.asarray(RNG.standard_normal((ROWS, 6))),
    ),
    "conv": (nn.conv_init(KEY, (3, 3), 2, 4, N), nn.conv, jnp.asarray(RNG.standard_normal((ROWS, 5, 5, 2)))),
    "embedding": (nn.embedding_init(KEY, 7, 4, N), nn.embedding, jnp.asarray(RNG.integers(0, 7, (ROWS, 6)))),
    "lstm": (nn.lstm_init(KEY, 6, 4, N), _lstm, jnp.asarray(RNG.standard_normal((ROWS, 6)))),
}  # fmt: skip
EPS = jnp.asarray(RNG.standard_normal((ROWS, N)))
HPARAMS = {"rate": jnp.linspace(0, 0.5, ROWS)}


def merged(params, eps):
    """The ordinary parameters of Eq. (1) for one perturbation."""
    if "kernel" not in params:
        return {name: merged(layer, eps) for name, layer in params.items()}
    gate = (eps @ params["gate"]).reshape((1,) * (params["kernel"].ndim - 1) + (-1,))
    out = params | {"kernel": params["kernel"] + gate * params["kernel_response"]}
    if "bias" in params:
        out["bias"] = params["bias"] + (eps @ params["bias_gate"]) * params["bias_response"]
    return out


@pytest.mark.parametrize("name", LAYERS)
def test_each_row_has_the_weights_of_its_perturbation(name):
    params, layer, x = LAYERS[name]
    params = _random(params)
    together = layer(params, x, nn.response(HPARAMS, EPS))
    for i in range(ROWS):
        alone = layer(merged(params, EPS[i]), x[i : i + 1], HPARAMS)
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-10)
    one = layer(params, x, nn.response({"rate": 0.1}, EPS[2]))
    np.testing.assert_allclose(one, layer(merged(params, EPS[2]), x, None), rtol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_without_perturbation_a_layer_is_an_ordinary_one(name):
    params, layer, x = LAYERS[name]
    params = _random(params)
    chex.assert_trees_all_close(
        layer(params, x, {"rate": 0.1}), layer(params, x, nn.response(HPARAMS, 0 * EPS))
    )
    # Nothing of the response is computed.
    grads = jax.grad(lambda p: layer(p, x, {"rate": 0.1}).sum())(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        used = path[-1].key in ("kernel", "bias")
        assert np.any(leaf) == used


@pytest.mark.parametrize("name", ["dense", "conv", "embedding", "lstm"])
def test_modules_of_flax_are_the_same_functions(name):
    _, layer, x = LAYERS[name]
    given = nn.response(HPARAMS, EPS)
    one, two = {
        "dense": (linen.ResponseDense(4, N), nnx.ResponseLinear(6, 4, N, rngs=flax_nnx.Rngs(0))),
        "conv": (linen.ResponseConv(4, (3, 3), N), nnx.ResponseConv(2, 4, (3, 3), N, rngs=flax_nnx.Rngs(0))),
        "embedding": (linen.ResponseEmbed(7, 4, N), nnx.ResponseEmbed(7, 4, N, rngs=flax_nnx.Rngs(0))),
        "lstm": (linen.ResponseLSTMCell(4, N), nnx.ResponseLSTMCell(6, 4, N, rngs=flax_nnx.Rngs(0))),
    }[name]
    carry = (jnp.ones((ROWS, 4)), jnp.full((ROWS, 4), 0.5))
    args = (carry, x, given) if name == "lstm" else (x, given)
    made = one.init(KEY, *args)["params"]["response"]
    out = one.apply({"params": {"response": made}}, *args)
    chex.assert_trees_all_close(out[1] if name == "lstm" else out, layer(made, x, given))
    graph, params = flax_nnx.split(two, flax_nnx.Param)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    out = flax_nnx.merge(graph, params)(*args)
    chex.assert_trees_all_close(out[1] if name == "lstm" else out, layer(two.params, x, given))


def test_a_cell_masks_both_kernels_of_the_state():
    params = _random(LAYERS["lstm"][0])
    x, mask = LAYERS["lstm"][2], jnp.zeros((4, 16))
    carry = (jnp.ones((ROWS, 4)), jnp.ones((ROWS, 4)))
    masked = nn.lstm_cell(params, carry, x, nn.response(HPARAMS, EPS), mask)[1]
    still = nn.lstm_cell(params, (0 * carry[0], carry[1]), x, nn.response(HPARAMS, EPS))[1]
    np.testing.assert_allclose(masked, still, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: nn.dense(LAYERS["dense"][0], jnp.ones((4, 6)), nn.response(HPARAMS, EPS)), "got 4 rows"),
        (lambda: nn.dense(LAYERS["dense"][0], jnp.ones((5, 6)), nn.response(HPARAMS, EPS[:, :2])), "3 hyper"),
        (
            lambda: nn.response({"rate": jnp.ones(4)}, EPS),
            r"hparams\['rate'\] must have an entry for each of",
        ),
        (lambda: nn.response({"rate": 0.1}, 0.5), r"shape \(rows, n\)"),
        (lambda: bilevel.stn(optax.sgd(0.1), optax.sgd(0.1), perturbations="rows"), "'rows'"),
        (lambda: bilevel.stn(optax.sgd(0.1), optax.sgd(0.1), perturbations="examples"), "centred=True"),
    ],
)
def test_what_does_not_fit_is_said(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_hparams_are_read_by_name_or_by_field():
    given = nn.response(HPARAMS, EPS)
    np.testing.assert_array_equal(given["rate"], HPARAMS["rate"])
    fields = collections.namedtuple("Fields", ["rate"])(HPARAMS["rate"])
    np.testing.assert_array_equal(nn.response(fields, EPS).rate, HPARAMS["rate"])


# --- End to end -------------------------------------------------------------------------------------------


def test_stn_tunes_a_model_of_response_layers_with_a_perturbation_for_each_row():
    # Ridge regression as a layer of one output, the penalty paid by the weights of each row.
    def inner(params, h, batch):
        a, b = batch
        residual = nn.dense(params, a, h)[:, 0] - b
        rows = jnp.broadcast_to(jnp.eye(20)[None], (len(a), 20, 20))
        squares = jnp.sum(nn.dense(params, rows, h) ** 2, (1, 2))
        return 0.5 * jnp.mean(residual**2) + jnp.mean(0.5 * jnp.exp(h["log_l2"]) * squares)

    def outer(params, h, batch):
        a, b = batch
        return 0.5 * jnp.mean((nn.dense(params, a, h)[:, 0] - b) ** 2)

    params = jax.tree.map(jnp.asarray, nn.dense_init(KEY, 20, 1, 1, bias=False))
    method = bilevel.stn(
        optax.adam(1e-2), optax.adam(1e-2), perturbations="examples", centred=True, warmup=100, entropy=1e-4
    )
    problem = bilevel.Problem(inner, outer)
    result = bilevel.optimize(
        problem, params, {"log_l2": -1.0}, ridge().train, ridge().valid, method, 5000, progress=False
    )
    log_l2 = float(np.mean(result.trajectory.hparams["log_l2"][-500:]))
    assert abs(log_l2 - RIDGE_LOG_L2) < 0.25
    assert result.history["inner_grad"][0] == 2 * 40
    np.testing.assert_allclose(
        result.history["value"][-1], RIDGE.outer(result.params["kernel"][:, 0], 0.0, ridge().valid), rtol=0.01
    )


def test_models_that_do_not_take_rows_are_told_at_the_start():
    method = bilevel.stn(optax.sgd(0.1), optax.sgd(0.1), perturbations="examples", centred=True)
    data = ridge().train, ridge().valid

    def of(inner, hparams):
        problem = bilevel.Problem(inner, lambda w, h, batch: RIDGE.outer(w, None, batch))
        bilevel.optimize(problem, np.zeros(20), hparams, *data, method, 3, progress=False)

    with pytest.raises(ValueError, match="nothing in inner reads the perturbations"):
        of(lambda w, h, batch: RIDGE.inner(w, jnp.mean(h["l2"]), batch), {"l2": 0.0})
    with pytest.raises(ValueError, match=r"inner must return a scalar, got shape \(40,\)"):
        of(lambda w, h, batch: RIDGE.inner(w, 0.0, batch) + h["l2"], {"l2": 0.0})
    with pytest.raises(ValueError, match="by name, and hparams are a bare array"):
        of(lambda w, h, batch: RIDGE.inner(w, h, batch), 0.0)


def test_linen_model_with_dropout_of_each_row():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, hparams, key=None):
            x = jax.nn.relu(linen.ResponseDense(8, 1)(x, hparams))
            if key is not None:
                x = nn.dropout(x, hparams["rate"], key)
            return linen.ResponseDense(1, 1)(x, hparams)[:, 0]

    net = Net()
    params = net.init(KEY, jnp.ones((4, 20)), {"rate": 0.1})["params"]

    def inner(params, hparams, batch):
        (a, b), key = batch
        return jnp.mean((net.apply({"params": params}, a, hparams, key) - b) ** 2)

    def outer(params, hparams, batch):
        return jnp.mean((net.apply({"params": params}, batch[0], hparams) - batch[1]) ** 2)

    problem = bilevel.Problem(inner, outer, constraints={"rate": bilevel.interval(0, 0.9)})
    train = bilevel.with_rng(bilevel.minibatches(ridge().train, 20))
    method = bilevel.stn(optax.adam(1e-2), optax.adam(1e-2), perturbations="examples", centred=True)
    result = bilevel.optimize(
        problem, params, {"rate": 0.1}, train, ridge().valid, method, 30, progress=False
    )
    assert np.isfinite(result.history["value"]).all()
    assert float(result.hparams["rate"]) != 0.1
