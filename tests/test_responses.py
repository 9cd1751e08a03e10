"""The structured response on pytrees of params, whatever made them."""

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import responses
from bilevel.constraints import bind

# Each: (params, gates by the name of the leaf). A gate counts outputs along one axis, all others are 1.


def _linen():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.Conv(6, (3, 3), name="conv")(x).mean((1, 2))
            return flax.linen.Dense(6, name="square")(x)

    return Net().init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))["params"]


def _nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
            self.square = nnx.Linear(6, 6, rngs=rngs)

    return nnx.split(Net(nnx.Rngs(0)), nnx.Param)[1]


def _equinox():
    keys = jax.random.split(jax.random.key(0))
    net = {"conv": eqx.nn.Conv2d(2, 6, 3, key=keys[0]), "square": eqx.nn.Linear(6, 6, key=keys[1])}
    return eqx.filter(net, eqx.is_array)


_LAST = {"conv kernel": (1, 1, 1, 6), "square kernel": (1, 6)}
MODELS = {
    "linen": (_linen, _LAST),
    "nnx": (_nnx, _LAST),
    "equinox": (_equinox, {"conv weight": (6, 1, 1, 1), "square weight": (6, 1)}),
}


def gates_of(response):
    """Shapes of the gates without the axis of perturbations, by the names that lead to them."""
    paths = jax.tree_util.tree_flatten_with_path(response.gates)[0]
    return {" ".join(responses._names(path)): gates.shape[1:] for path, gates in paths}


@pytest.mark.parametrize("model", MODELS)
def test_kernels_are_gated_by_output_unit(model):
    make, expected = MODELS[model]
    gates = gates_of(responses.first_response(make(), 3, responses.setting(True), 0))
    assert expected.items() <= gates.items()
    assert {gates["conv bias"][0], gates["square bias"]} == {6, (6,)}  # equinox: (6, 1, 1)


def test_the_bias_beside_a_kernel_tells_its_axis():
    params = {"a": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(4)}, "b": {"weight": jnp.ones((4, 3))}}
    params["c"] = {"weight": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    gates = gates_of(responses.first_response(params, 1, responses.setting(True), 0))
    assert (gates["a kernel"], gates["b weight"], gates["c weight"]) == ((4, 1), (4, 1), (1, 3))


def test_settings_choose_parts_axes_and_full_responses():
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3)), "c": jnp.ones((4, 3)), "d": jnp.ones(2)}
    setting = responses.setting({"a": 0, "b": "full", "c": False})
    response = responses.first_response(params, 2, setting, 0)
    assert gates_of(response) == {"a": (4, 1), "b": (4, 3), "d": (2,)}
    assert jax.tree.structure(response.kernels) == jax.tree.structure(
        {**params, "b": None, "c": None, "d": None}
    )


def test_members_of_a_lifted_problem_respond_by_themselves():
    params = {"kernel": jnp.ones((5, 4, 3)), "bias": jnp.ones((5, 3))}
    response = responses.first_response(params, 2, responses.setting(True), 1)
    assert gates_of(response) == {"bias": (5, 3), "kernel": (5, 1, 3)}


def _random(params, n, seed=0):
    """A response with nothing that is zero."""
    response = responses.first_response(params, n, responses.setting(True), 0)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), response)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_change_is_the_equation_and_sizes_are_its_norms(outputs, inputs, n):
    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.standard_normal((inputs, outputs))), "bias": jnp.ones(outputs)}
    response = _random(params, n)
    e = rng.standard_normal(n)
    made = responses.change(params, response, jnp.asarray(e))
    gates = np.asarray(response.gates["kernel"]).reshape(n, -1, outputs)
    kernel = response.kernels["kernel"]
    factor = np.tensordot(e, gates, 1)
    expected = factor if kernel is None else factor * np.asarray(kernel)
    np.testing.assert_allclose(made["kernel"], expected, rtol=1e-12)
    np.testing.assert_allclose(made["bias"], e @ np.asarray(response.gates["bias"]), rtol=1e-12)
    for k, size in enumerate(responses.sizes(params, response)):
        unit = responses.change(params, response, jnp.eye(n)[k])
        np.testing.assert_allclose(size, np.sqrt(sum(np.sum(x**2) for x in unit.values())), rtol=1e-12)


def test_one_output_unit_responds_along_one_direction():
    # The limit of expressivity: all hyperparameters rescale the same row.
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((5, 1)))}
    response = _random(params, 3)
    columns = [responses.change(params, response, row)["kernel"].ravel() for row in jnp.eye(3)]
    assert np.linalg.matrix_rank(np.stack(columns)) == 1


def test_a_kernel_of_zeros_can_leave_zero():
    params = {"kernel": jnp.zeros((4, 3)), "other": jnp.full((4, 3), 2.0)}
    response = responses.first_response(params, 1, responses.setting(True), 0)
    assert 0.2 < np.std(response.kernels["kernel"]) < 0.9  # one over the root of four inputs
    np.testing.assert_array_equal(response.kernels["other"], params["other"])
    assert not any(np.any(gates) for gates in jax.tree.leaves(response.gates))


def test_vectors_of_hyperparameters():
    hparams = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0), "c": jnp.array(4.0)}
    constraints = bind({"b": bilevel.fixed()}, hparams)
    vector = responses.vector(constraints, hparams)
    np.testing.assert_array_equal(vector, [1.0, 2.0, 4.0])
    back = responses.tree(constraints, vector, hparams)
    np.testing.assert_array_equal(back["a"], hparams["a"])
    assert (float(back["b"]), float(back["c"])) == (0.0, 4.0)
    assert responses.count(constraints, hparams) == 3


@pytest.mark.parametrize(
    ("params", "n", "setting", "error", "parts"),
    [
        ({"a": jnp.ones(3)}, 1, {"a": "half"}, ValueError, ["response", "'half'", "axis"]),
        ({"a": jnp.ones(3)}, 1, {"a": 0.5}, TypeError, ["response", "0.5"]),
        ({"a": jnp.ones(3)}, 1, {"b": True}, ValueError, ["response", "b", "params"]),
        ({"a": jnp.ones((3, 2))}, 1, {"a": 2}, ValueError, ["response['a']", "axis 2", "(3, 2)"]),
        ({"a": jnp.ones(3)}, 1, False, ValueError, ["response", "all of params"]),
        (
            {"a": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)},
            1_000_000,
            True,
            ValueError,
            ["1,000,000 hyperparameters", "3.7 GiB", "times params", "bilevel.implicit()"],
        ),
    ],
)
def test_what_cannot_respond_is_said(params, n, setting, error, parts):
    with pytest.raises(error) as caught:
        responses.first_response(params, n, responses.setting(setting), 0)
    for part in parts:
        assert part in str(caught.value)
