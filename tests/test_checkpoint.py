"""Files of arrays: what goes in comes out, whole or not at all."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import bilevel
from bilevel import checkpoint

META = {"kind": "test", "number": 0.1, "none": None, "list": [1, "a", True]}


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_same(stored, restored):
    """The same containers, and leaves of the same dtype, shape and bits."""
    if stored is None or isinstance(stored, (dict, list, tuple)):
        assert type(restored) is type(stored)
        if isinstance(stored, dict):
            assert list(restored) == list(stored)
            stored, restored = stored.values(), restored.values()
        for a, b in zip(stored or (), restored or (), strict=True):
            assert_same(a, b)
    elif is_key(stored):
        assert restored.dtype == stored.dtype
        np.testing.assert_array_equal(jax.random.key_data(restored), jax.random.key_data(stored))
    else:
        stored = np.asarray(stored)
        assert isinstance(restored, np.ndarray)
        assert restored.dtype == stored.dtype
        assert restored.shape == stored.shape
        assert restored.tobytes() == stored.tobytes()


# --- Round trips -------------------------------------------------------------------------------------------

DTYPES = [
    np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint8, np.uint32, np.bool_,
    np.complex64,
]  # fmt: skip
EXTENDED = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
SHAPES = st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


def extended(pair):
    bits, dtype = pair
    return bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def keys(seed, implementation, shape):
    return jax.random.split(jax.random.key(seed, impl=implementation), shape)


ARRAYS = st.sampled_from(DTYPES).flatmap(lambda dtype: st_numpy.arrays(dtype, SHAPES))
LEAVES = st.one_of(
    ARRAYS,
    ARRAYS.map(lambda x: np.asarray(x).T),
    st.tuples(st_numpy.arrays(np.uint16, SHAPES), st.sampled_from(EXTENDED)).map(extended),
    st.floats(allow_nan=True),
    st.integers(-(2**62), 2**62),
    st.booleans(),
    st.builds(
        keys, st.integers(0, 99), st.sampled_from(["threefry2x32", "rbg"]), st.sampled_from([(), (2,)])
    ),
)
TREES = st.recursive(
    st.one_of(st.none(), LEAVES),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), children, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=TREES, other=TREES)
def test_what_goes_in_comes_out(tmp_path_factory, tree, other):
    path = tmp_path_factory.mktemp("trees") / "trees.bilevel"
    checkpoint.write(path, {"tree": tree, "other": other}, META)
    trees, meta = checkpoint.read(path)
    assert meta == META
    assert list(trees) == ["tree", "other"]
    assert_same(tree, trees["tree"])
    assert_same(other, trees["other"])


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.arange(3, dtype=jnp.bfloat16),
        jnp.bfloat16(1.5),
        jnp.zeros((2, 0)),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6)[::-2],
        np.float32(0.1),
        np.array([-0.0, np.inf, np.nan]),
        jax.random.key(1),
        jax.random.split(jax.random.key(1), (2, 3)),
        jax.random.key(1, impl="rbg"),
        jax.random.key(1, impl="unsafe_rbg"),
        jax.random.PRNGKey(1),
    ],
    ids=lambda leaf: f"{leaf.dtype}{leaf.shape}",
)
def test_leaves(tmp_path, leaf):
    path = tmp_path / "leaf.bilevel"
    checkpoint.write(path, {"leaf": leaf, "nested": [leaf, (leaf,)]}, {})
    trees, _ = checkpoint.read(path)
    assert_same(leaf, trees["leaf"])
    assert_same([leaf, (leaf,)], trees["nested"])


def test_files_hold_plain_arrays(tmp_path):
    """Readable without this library: npy members beside a manifest, nothing pickled."""
    path = tmp_path / "run.bilevel"
    checkpoint.write(path, {"a": {"x": np.arange(3)}, "b": jnp.ones(2, jnp.bfloat16)}, META)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("manifest.json"))
        arrays = [name for name in archive.namelist() if name != "manifest.json"]
        with archive.open("0.npy") as member:
            np.testing.assert_array_equal(np.load(member, allow_pickle=False), np.arange(3))
    assert arrays == ["0.npy", "1.npy"]
    assert (manifest["format"], manifest["version"]) == ("bilevel", 1)
    assert manifest["meta"] == META


# --- Other containers, through like -------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


def test_named_tuples(tmp_path):
    path = tmp_path / "pair.bilevel"
    tree = {"net": [Pair(np.arange(3.0), {"c": np.ones(2)}), None], "plain": (np.zeros(1),)}
    checkpoint.write(path, {"tree": tree}, {})
    with pytest.raises(ValueError, match="Pair.*like="):
        checkpoint.read(path)
    like = {"net": [Pair(0, {"c": 0}), None], "plain": (0,)}
    assert_same(tree, checkpoint.read(path, {"tree": like})[0]["tree"])


def test_dicts_with_other_keys(tmp_path):
    path = tmp_path / "dict.bilevel"
    checkpoint.write(path, {"tree": {0: np.zeros(1), 1: np.ones(2)}}, {})
    assert_same({0: np.zeros(1), 1: np.ones(2)}, checkpoint.read(path, {"tree": {0: 0, 1: 0}})[0]["tree"])


class Nothing(NamedTuple):
    """Without fields, as the states of many optimisers are."""


def test_containers_without_leaves(tmp_path):
    path = tmp_path / "empty.bilevel"
    tree = {"a": Nothing(), "b": [Nothing(), {}, (), [], None]}
    checkpoint.write(path, {"tree": tree}, {})
    restored = checkpoint.read(path, {"tree": tree})[0]["tree"]
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert type(restored["a"]) is Nothing


def test_optimiser_states(tmp_path):
    path = tmp_path / "state.bilevel"
    params = {"w": jnp.ones(3), "b": jnp.zeros((), jnp.bfloat16)}
    optimiser = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    _, state = optimiser.update(params, optimiser.init(params), params)
    checkpoint.write(path, {"state": state}, {})
    restored = checkpoint.read(path, {"state": optimiser.init(params)})[0]["state"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert_same(a, b)


def test_flax_states(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    path = tmp_path / "model.bilevel"
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    checkpoint.write(path, {"model": {"of": state}}, {})
    with pytest.raises(ValueError, match="State.*like="):
        checkpoint.read(path)
    blank = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), nnx.Param)
    restored = checkpoint.read(path, {"model": {"of": blank}})[0]["model"]["of"]
    assert type(restored) is type(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    kernel, blank_kernel = (np.asarray(x["kernel"].get_value()) for x in (restored, blank))
    np.testing.assert_array_equal(kernel, np.asarray(state["kernel"].get_value()))
    assert not np.array_equal(kernel, blank_kernel)


# --- Whole or not at all ------------------------------------------------------------------------------------


def fails_at(call, fn, error):
    """The function, except that a call of it raises."""
    count = 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise error
        return fn(*args, **kwargs)

    return failing


FAILURES = {
    "the disk is full": (np.lib.format, "write_array", 2, OSError("no space left")),
    "interrupted": (np.lib.format, "write_array", 1, KeyboardInterrupt()),
    "not flushed": (os, "fsync", 1, OSError("input/output error")),
    "not renamed": (os, "replace", 1, PermissionError("denied")),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("there", [True, False], ids=["over a file", "new"])
def test_a_failing_write_leaves_what_was(tmp_path, monkeypatch, failure, there):
    path = tmp_path / "run.bilevel"
    if there:
        checkpoint.write(path, {"a": np.arange(3)}, META)
    module, name, call, error = FAILURES[failure]
    monkeypatch.setattr(module, name, fails_at(call, getattr(module, name), error))
    with pytest.raises(type(error)):
        checkpoint.write(path, {"a": np.zeros(5), "b": np.zeros(5)}, {})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["run.bilevel"] if there else [])
    if there:
        trees, meta = checkpoint.read(path)
        assert_same(np.arange(3), trees["a"])
        assert meta == META


def test_what_json_cannot_hold_leaves_what_was(tmp_path):
    path = tmp_path / "run.bilevel"
    checkpoint.write(path, {"a": np.arange(3)}, {})
    with pytest.raises(TypeError):
        checkpoint.write(path, {"a": np.zeros(5)}, {"meta": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["run.bilevel"]
    assert_same(np.arange(3), checkpoint.read(path)[0]["a"])


def test_paths(tmp_path, monkeypatch):
    """Text or Path, relative or absolute; a second write replaces the first."""
    monkeypatch.chdir(tmp_path)
    for path in ("run", Path("run"), str(tmp_path / "run")):
        checkpoint.write(path, {"a": np.array(str(path) == "run")}, {})
        assert checkpoint.read(path)[0]["a"] == (str(path) == "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- Results ----------------------------------------------------------------------------------------------


def inner_loss(params, hparams, batch):
    fit = jnp.mean((params["w"] - batch) ** 2)
    return (
        fit + jnp.sum(hparams["l2"]) * jnp.mean(params["w"] ** 2) + hparams["shift"] ** 2 * params["b"] ** 2
    )


def outer_loss(params, hparams, batch):
    loss = jnp.mean((params["w"] - batch) ** 2)
    return loss, {"size": jnp.max(jnp.abs(params["w"]))}


PROBLEM = bilevel.Problem(inner_loss, outer_loss, constraints={"l2": bilevel.positive()})
METHOD = bilevel.alternating(bilevel.unrolled(), optax.sgd(0.1), optax.sgd(0.1), inner_steps=2)
FIELDS = ["params", "hparams", "history", "status", "message", "seconds", "model_state"]


@pytest.fixture(scope="module")
def result():
    """A run in two precisions, with a hyperparameter large enough to be recorded by quantiles."""
    params = {"w": jnp.zeros(40, jnp.float32), "b": jnp.float32(1.0)}
    hparams = {"l2": jnp.full(40, 1e-3, jnp.float32), "shift": jnp.float32(0.5)}
    data = jnp.linspace(1, 2, 40, dtype=jnp.float32)
    return bilevel.optimize(
        PROBLEM, params, hparams, data, data, METHOD, 12, progress=False, test=data, judge_every=4
    )


def test_results_come_back_field_by_field(result, tmp_path):
    path = tmp_path / "run.bilevel"
    result.save(path)
    loaded = bilevel.load(path)
    for name in FIELDS:
        stored, restored = getattr(result, name), getattr(loaded, name)
        if name in ("params", "hparams", "history", "model_state"):
            assert_same(stored, restored)
        else:
            assert type(restored) is type(stored)
            assert restored == stored
    assert_same(result.best.params, loaded.best.params)
    assert_same(result.best.hparams, loaded.best.hparams)
    assert (loaded.best.value, loaded.best.step) == (result.best.value, result.best.step)
    assert_same(result.trajectory.steps, loaded.trajectory.steps)
    assert_same(result.trajectory.hparams, loaded.trajectory.hparams)
    assert loaded.trajectory.quantiles == result.trajectory.quantiles == (True, False)
    assert loaded.counts == result.counts
    assert repr(loaded) == repr(result)
    assert loaded.state is None
    assert result.state is not None


def test_columns_keep_their_kinds(result, tmp_path):
    path = tmp_path / "run.bilevel"
    result.save(path)
    history = bilevel.load(path).history
    assert list(history) == list(result.history)
    kinds = {"step": "i", "accepted": "b", "negative_curvature": "b", "nonfinite": "i", "solver_steps": "i"}
    assert {"size", "test", "test_size", "value", "seconds"} <= history.keys()
    for name, column in history.items():
        assert column.dtype.kind == kinds.get(name, "f")
        assert column.shape == (12,)
    assert history["value"].dtype == np.float32
    assert history["step"].tolist() == list(range(12))
    assert np.flatnonzero(np.isfinite(history["test"])).tolist() == [0, 4, 8]


def test_a_loaded_result_saves_itself_again(result, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    result.save(first)
    bilevel.load(first).save(second)
    assert_same(bilevel.load(first).history, bilevel.load(second).history)
    assert_same(bilevel.load(first).params, bilevel.load(second).params)


def handmade(params, hparams):
    return bilevel.Result(
        params=params,
        hparams=hparams,
        best=bilevel.Best(params, hparams, float("nan"), 0),
        history={"step": np.arange(0), "value": np.zeros(0), "accepted": np.zeros(0, bool)},
        trajectory=bilevel.Trajectory(
            np.arange(1), jax.tree.map(lambda x: np.zeros((1, 2)), hparams), (False,)
        ),
        status=bilevel.Status.DATA_EXHAUSTED,
        message="nothing came.",
        seconds=0.25,
        model_state={"mean": np.zeros(2, ml_dtypes.bfloat16)},
    )


def test_results_of_other_dtypes(tmp_path):
    path = tmp_path / "run.bilevel"
    params = {"w": jnp.arange(3, dtype=jnp.bfloat16), "b": (jnp.float16(0.1), None, [jnp.zeros((0, 2))])}
    handmade(params, {"l2": jnp.ones(2, jnp.bfloat16)}).save(path)
    loaded = bilevel.load(path)
    assert_same(params, loaded.params)
    assert_same({"l2": jnp.ones(2, jnp.bfloat16)}, loaded.best.hparams)
    assert_same({"mean": np.zeros(2, ml_dtypes.bfloat16)}, loaded.model_state)
    assert np.isnan(loaded.best.value)
    assert loaded.status is bilevel.Status.DATA_EXHAUSTED
    assert loaded.history["accepted"].dtype == bool


@pytest.mark.parametrize("form", ["a result", "a pair"])
def test_results_of_other_containers(tmp_path, form):
    path = tmp_path / "run.bilevel"
    stored = handmade(Pair(jnp.arange(3.0), {"c": jnp.zeros(2)}), Pair(jnp.ones(2), None))
    stored.save(path)
    like = stored if form == "a result" else (Pair(0, {"c": 0}), Pair(0, None))
    loaded = bilevel.load(path, like)
    assert_same(stored.params, loaded.params)
    assert_same(stored.hparams, loaded.hparams)
    assert_same(stored.best.params, loaded.best.params)
    assert type(loaded.trajectory.hparams) is Pair
    assert_same(stored.trajectory.hparams, loaded.trajectory.hparams)


def test_results_that_are_single_arrays(tmp_path):
    path = tmp_path / "run.bilevel"
    handmade(jnp.arange(3.0), jnp.array([0.1, 0.2])).save(path)
    loaded = bilevel.load(path)
    assert_same(np.arange(3.0), loaded.params)
    assert_same(np.array([0.1, 0.2]), loaded.hparams)
