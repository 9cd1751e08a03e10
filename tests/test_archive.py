"""Files of arrays: what goes in comes out, whole or not at all."""

import errno
import hashlib
import io
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
from bilevel import archive

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
    archive.write(path, {"tree": tree, "other": other}, META)
    trees, meta = archive.read(path)
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
    archive.write(path, {"leaf": leaf, "nested": [leaf, (leaf,)]}, {})
    trees, _ = archive.read(path)
    assert_same(leaf, trees["leaf"])
    assert_same([leaf, (leaf,)], trees["nested"])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_keys_on_the_host_are_read_as_keys(tmp_path, kind):
    key = jax.random.split(jax.random.key(1, impl=kind), 2)
    archive.write(tmp_path / "key", {"key": [archive.host_key(key)]}, {})
    assert_same(key, archive.read(tmp_path / "key")[0]["key"][0])


def test_files_hold_plain_arrays(tmp_path):
    """Readable without this library: npy members beside a manifest, nothing pickled."""
    path = tmp_path / "run.bilevel"
    archive.write(path, {"a": {"x": np.arange(3)}, "b": jnp.ones(2, jnp.bfloat16)}, META)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        manifest = json.loads(file.read("manifest.json"))
        arrays = [name for name in file.namelist() if name != "manifest.json"]
        with file.open("0.npy") as member:
            np.testing.assert_array_equal(np.load(member, allow_pickle=False), np.arange(3))
    assert arrays == ["0.npy", "1.npy"]
    assert (manifest["format"], manifest["version"]) == ("bilevel", 2)
    with np.load(path, allow_pickle=False) as members:
        np.testing.assert_array_equal(members["0"], np.arange(3))
    assert manifest["meta"] == META


# --- Other containers, through like -------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


def test_named_tuples(tmp_path):
    path = tmp_path / "pair.bilevel"
    tree = {"net": [Pair(np.arange(3.0), {"c": np.ones(2)}), None], "plain": (np.zeros(1),)}
    archive.write(path, {"tree": tree}, {})
    with pytest.raises(ValueError, match="Pair.*like="):
        archive.read(path)
    like = {"net": [Pair(0, {"c": 0}), None], "plain": (0,)}
    assert_same(tree, archive.read(path, {"tree": like})[0]["tree"])


def test_dicts_with_other_keys(tmp_path):
    path = tmp_path / "dict.bilevel"
    archive.write(path, {"tree": {0: np.zeros(1), 1: np.ones(2)}}, {})
    assert_same({0: np.zeros(1), 1: np.ones(2)}, archive.read(path, {"tree": {0: 0, 1: 0}})[0]["tree"])


class Nothing(NamedTuple):
    """Without fields, as the states of many optimisers are."""


def test_containers_without_leaves(tmp_path):
    path = tmp_path / "empty.bilevel"
    tree = {"a": Nothing(), "b": [Nothing(), {}, (), [], None]}
    archive.write(path, {"tree": tree}, {})
    restored = archive.read(path, {"tree": tree})[0]["tree"]
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert type(restored["a"]) is Nothing


def test_optimiser_states(tmp_path):
    path = tmp_path / "state.bilevel"
    params = {"w": jnp.ones(3), "b": jnp.zeros((), jnp.bfloat16)}
    optimiser = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    _, state = optimiser.update(params, optimiser.init(params), params)
    archive.write(path, {"state": state}, {})
    restored = archive.read(path, {"state": optimiser.init(params)})[0]["state"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert_same(a, b)


def test_flax_states(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    path = tmp_path / "model.bilevel"
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    archive.write(path, {"model": {"of": state}}, {})
    with pytest.raises(ValueError, match="State.*like="):
        archive.read(path)
    blank = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), nnx.Param)
    restored = archive.read(path, {"model": {"of": blank}})[0]["model"]["of"]
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
    "the disk is full": (archive, "_write_npy", 2, OSError("no space left")),
    "interrupted": (archive, "_write_npy", 1, KeyboardInterrupt()),
    "not flushed": (os, "fsync", 1, OSError("input/output error")),
    "not renamed": (os, "replace", 1, PermissionError("denied")),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("there", [True, False], ids=["over a file", "new"])
def test_a_failing_write_leaves_what_was(tmp_path, monkeypatch, failure, there):
    path = tmp_path / "run.bilevel"
    if there:
        archive.write(path, {"a": np.arange(3)}, META)
    module, name, call, error = FAILURES[failure]
    monkeypatch.setattr(module, name, fails_at(call, getattr(module, name), error))
    with pytest.raises(type(error)):
        archive.write(path, {"a": np.zeros(5), "b": np.zeros(5)}, {})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["run.bilevel"] if there else [])
    if there:
        trees, meta = archive.read(path)
        assert_same(np.arange(3), trees["a"])
        assert meta == META


def test_what_json_cannot_hold_leaves_what_was(tmp_path):
    path = tmp_path / "run.bilevel"
    archive.write(path, {"a": np.arange(3)}, {})
    with pytest.raises(TypeError):
        archive.write(path, {"a": np.zeros(5)}, {"meta": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["run.bilevel"]
    assert_same(np.arange(3), archive.read(path)[0]["a"])


def test_paths(tmp_path, monkeypatch):
    """Text or Path, relative or absolute; a second write replaces the first."""
    monkeypatch.chdir(tmp_path)
    for path in ("run", Path("run"), str(tmp_path / "run")):
        archive.write(path, {"a": np.array(str(path) == "run")}, {})
        assert archive.read(path)[0]["a"] == (str(path) == "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_no_folder(tmp_path):
    with pytest.raises(archive.MissingFileError, match="none does not exist"):
        archive.write(tmp_path / "none" / "run", {"a": np.zeros(1)}, {})


def test_files_and_their_folder_are_flushed_in_order(tmp_path, monkeypatch):
    """The content before the name, the name before the end."""
    done, fsync, replace = [], os.fsync, os.replace

    def flush(number):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    archive.write(tmp_path / "run", {"a": np.zeros(1)}, {})
    assert done == ["file", "name", "folder"]


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch, call):
    """Windows opens no folders, some network drives flush none."""
    number = 1 if call == "open" else 2
    error = PermissionError("denied") if call == "open" else OSError(errno.EINVAL, "invalid")
    monkeypatch.setattr(os, call, fails_at(number, getattr(os, call), error))
    archive.write(tmp_path / "run", {"a": np.arange(3)}, {})
    assert_same(np.arange(3), archive.read(tmp_path / "run")[0]["a"])


# --- Damage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a file with some of everything."""
    path = tmp_path_factory.mktemp("content") / "run"
    rng = np.random.default_rng(0)
    trees = {"state": [rng.normal(size=(30, 10)), jnp.ones(3, jnp.bfloat16), jax.random.key(1)], "none": None}
    archive.write(path, trees, META)
    return path.read_bytes()


@pytest.mark.parametrize("form", [bytes, memoryview])
def test_content_is_read_as_its_file_is(content, form):
    trees, meta = archive.read(form(content))
    assert meta == META
    np.testing.assert_array_equal(trees["state"][0], np.random.default_rng(0).normal(size=(30, 10)))
    assert archive.intact(form(content))


def test_no_damage_goes_unnoticed(content, tmp_path):
    rng = np.random.default_rng(0)
    damaged = []
    for place, bits in zip(rng.integers(len(content), size=700), rng.integers(1, 256, size=700), strict=True):
        flipped = bytearray(content)
        flipped[place] ^= bits
        damaged.append(bytes(flipped))
    damaged += [content[:size] for size in rng.integers(len(content), size=250)]
    damaged += [content[size:] for size in rng.integers(1, len(content), size=25)]
    damaged += [content + b"0" * size for size in range(1, 26)]
    assert len(damaged) == 1000
    for one in damaged:
        assert not archive.intact(one)
        with pytest.raises(ValueError, match="damaged"):
            archive.read(one)
    for one in damaged[::100]:
        (tmp_path / "run").write_bytes(one)
        with pytest.raises(ValueError, match=r"path: .*run is not .* or it is damaged"):
            archive.read(tmp_path / "run")


def test_whole_files_of_another_kind(tmp_path):
    """A digest that is right makes nobody's bytes a file of ours, nor a newer version readable."""
    stream = io.BytesIO()
    manifest = {"format": "bilevel", "version": 3, "trees": {}, "dtypes": [], "meta": {}}
    with zipfile.ZipFile(stream, "w") as file:
        file.comment = b"0" * 64
        file.writestr("manifest.json", json.dumps(manifest))
    for body, reason in ((stream.getvalue()[:-64], "newer version"), (b"nothing", "zip")):
        sealed = body + hashlib.sha256(body).hexdigest().encode()
        assert archive.intact(sealed)
        with pytest.raises(ValueError, match=reason):
            archive.read(sealed)


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
