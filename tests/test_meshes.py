"""Runs on several devices: the same numbers as on one, laid out as the arrays that they were given."""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implementations import METHODS, by_label
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import RIDGE, ridge

import bilevel
from benchmarks.collectives import of_text
from bilevel import loop
from bilevel.placement import refuse_explicit
from bilevel.preparation import Given, prepare

P = PartitionSpec
EVERYWHERE = P()
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
of_either_kind = pytest.mark.parametrize("kind", KINDS)
STEPS = 12
CG = METHODS[0].method
DENSE = bilevel.alternating(bilevel.implicit(bilevel.dense()), optax.sgd(0.1), optax.adam(0.1), inner_steps=3)
FLOAT = 8  # bytes


@functools.cache
def mesh_of(*sizes, names=("data", "model"), kind="auto"):
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=(KINDS[kind],) * len(sizes))


def put(mesh, tree, specs=EVERYWHERE):
    """The tree on a mesh; ``specs`` is a tree of them, or one for all leaves."""
    if isinstance(specs, P):
        return jax.device_put(tree, NamedSharding(mesh, specs))
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))
    return jax.device_put(tree, shardings)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def run(problem, *args, **settings):
    return bilevel.optimize(problem, *args, **{"steps": STEPS, "progress": False, **settings})


DATA = as_numpy((ridge().train, ridge().valid))
SPLITS = {
    "whole": lambda: DATA,
    "strata": lambda: (bilevel.minibatches(DATA[0], 20, strata=4, fixed=True), DATA[1]),
    "judged": lambda: (
        bilevel.minibatches(DATA[0], 20, strata=4, fixed=True),
        bilevel.minibatches(DATA[1], 40, strata=4, fixed=True),
    ),
}
# They follow the number of steps that a solver takes to a tolerance near rounding.
ADAPTIVE = {"solver_steps", "solver_residual", "error", "hvp"}


def on_ridge(method, split="whole", **settings):
    return run(RIDGE, np.zeros(20), np.float64(-1.0), *SPLITS[split](), method, judge_every=5, **settings)


@functools.cache
def alone(method, split="whole"):
    """On one device."""
    return on_ridge(method, split)


def assert_same(got, expected):
    """Two results to rounding, each column relative to its largest entry."""

    def close(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        scale = 1 + np.max(np.abs(b), where=finite, initial=0.0)
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=1e-10 * scale)

    def facts(result):
        best = result.best
        history = {k: column for k, column in result.history.items() if k not in ADAPTIVE | {"seconds"}}
        return (
            history, result.params, result.hparams, best.params, best.hparams, best.value,
            result.trajectory.hparams,
        )  # fmt: skip

    assert got.history.keys() == expected.history.keys()
    jax.tree.map(close, facts(got), facts(expected))
    assert (got.status, got.best.step) == (expected.status, expected.best.step)


# --- mesh= places what lies nowhere in particular ------------------------------------------------------


@pytest.mark.parametrize(("split", "devices"), [("whole", (2, 4)), ("strata", (4,))])
@by_label(METHODS)
def test_every_method_equals_one_device(row, split, devices):
    expected = alone(row.method, split)
    assert abs(expected.hparams + 1.0) > 1e-3  # it moves
    for n in devices:
        mesh = mesh_of(n)
        result = on_ridge(row.method, split, mesh=mesh)
        assert_same(result, expected)
        assert {x.sharding.mesh for x in jax.tree.leaves(result.state)} == {mesh}


def test_the_default_method_equals_one_device():
    assert_same(on_ridge(None, mesh=mesh_of(4)), alone(None))


@pytest.mark.parametrize("split", ["whole", "judged"])
@of_either_kind
def test_a_mesh_of_either_kind_is_given_back(kind, split):
    mesh = mesh_of(2, kind=kind)
    result = on_ridge(CG, split, mesh=mesh)
    assert_same(result, alone(CG, split))
    assert ("judged" in result.history) == (split == "judged")
    arrays = jax.tree.leaves((result.params, result.hparams, result.state, result.best))
    assert {x.sharding.mesh for x in arrays if isinstance(x, jax.Array)} == {mesh}


@of_either_kind
def test_under_set_mesh(kind):
    mesh = mesh_of(4, kind=kind)
    with jax.set_mesh(mesh):
        placed = on_ridge(CG, mesh=mesh)
        # Arrays made in that context lie on the mesh.
        args = jnp.zeros(20), jnp.float64(-1.0), *jax.tree.map(jnp.asarray, DATA)
        made = run(RIDGE, *args, CG, judge_every=5)
    for result in (placed, made):
        assert_same(result, alone(CG))
        assert result.params.sharding.mesh == mesh


def test_sources_that_carry_keys_and_iterables():
    def batches():
        for i in range(STEPS * 100):
            rows = (np.arange(20) + 7 * i) % 40
            yield DATA[0][0][rows], DATA[0][1][rows]

    with_key = bilevel.Problem(lambda w, h, b: RIDGE.inner(w, h, b[0]), RIDGE.outer)
    for problem, train in (
        (RIDGE, batches),
        (with_key, lambda: bilevel.with_rng(bilevel.minibatches(DATA[0], 20, strata=4))),
    ):
        one, many = (
            run(problem, np.zeros(20), -1.0, train(), DATA[1], DENSE, mesh=mesh)
            for mesh in (None, mesh_of(4))
        )
        assert_same(many, one)


def test_rows_of_data_are_spread_and_the_rest_is_everywhere():
    with contextlib.ExitStack() as stack:
        given = Given(RIDGE, CG, np.zeros(20), -1.0, *DATA, mesh=mesh_of(4, kind="explicit"))
        ready = prepare(stack, given)
        params, hparams, key, train, valid, _ = ready.arguments
    assert {x.sharding.spec for x in jax.tree.leaves((train, valid))} == {P("data")}
    assert {x.sharding.spec for x in jax.tree.leaves((params, hparams, key))} == {P()}


def test_default_strata_are_the_shards():
    mesh = mesh_of(4)
    assert bilevel.minibatches(DATA[0], 20).strata == 1
    assert bilevel.minibatches(put(mesh, DATA[0], P("data")), 20).strata == 4
    assert bilevel.minibatches(put(mesh_of(2, 2), DATA[0], P("data")), 20).strata == 2
    assert bilevel.minibatches(put(mesh, DATA[0], P("data")), 20, strata=2).strata == 2
    # Placed by mesh=: the same rows are drawn as with one block for each device.
    train = bilevel.minibatches(DATA[0], 20, fixed=True)
    assert_same(
        run(RIDGE, np.zeros(20), np.float64(-1.0), train, DATA[1], CG, mesh=mesh), alone(CG, "strata")
    )


# --- Placement follows the arrays given -----------------------------------------------------------------

RNG = np.random.default_rng(0)
ROWS = 48
X = RNG.standard_normal((ROWS, 8))
Y = X @ np.ones((8, 4)) + 0.1 * RNG.standard_normal((ROWS, 4))
PARAMS = {"W": 0.1 * RNG.standard_normal((8, 4)), "b": np.zeros(4)}
HPARAMS = {"weight": np.zeros(ROWS), "l2": np.float64(0.1)}
TRAIN, VALID = {"x": X, "y": Y}, {"x": X[:16] + 0.1, "y": Y[:16]}


def predicted(params, batch):
    return batch["x"] @ params["W"] + params["b"][None]


def weighted_loss(params, hparams, batch):
    weight = jax.nn.sigmoid(hparams["weight"])[:, None]
    fit = jnp.mean(weight * (predicted(params, batch) - batch["y"]) ** 2)
    return fit + 0.5 * hparams["l2"] * jnp.sum(params["W"] ** 2)


def plain_loss(params, hparams, batch):
    del hparams
    return jnp.mean((predicted(params, batch) - batch["y"]) ** 2)


WEIGHTED = bilevel.Problem(weighted_loss, plain_loss, constraints={"l2": bilevel.positive()})


def method_of(estimator, **settings):
    adam = optax.adam(0.05, eps_root=1e-8)  # its derivative at zero is finite
    return bilevel.alternating(estimator, adam, optax.adam(0.05), inner_steps=3, **settings)


SHARDED_METHODS = {
    "cg": method_of(bilevel.implicit(bilevel.cg(10, tol=1e-13))),
    "nystrom": method_of(bilevel.implicit(bilevel.nystrom(4, 0.1))),
    "sgd": method_of(bilevel.implicit(bilevel.sgd(0.1))),
    "unrolled": method_of(bilevel.unrolled(), restart=True),
}
LAYOUTS = {
    "data": {"W": P("data"), "b": P("data")},
    "model": {"W": P(None, "model"), "b": P("model")},
    "both": {"W": P("data", "model"), "b": P("model")},
}
OF_HPARAMS = {"weight": P("data"), "l2": P()}


def laid_out(layout, kind="auto"):
    mesh = mesh_of(2, 2, kind=kind)
    return (
        put(mesh, PARAMS, LAYOUTS[layout]),
        put(mesh, HPARAMS, OF_HPARAMS),
        *(put(mesh, batch, P("data")) for batch in (TRAIN, VALID)),
    )


@functools.cache
def weighted_alone(method):
    return run(WEIGHTED, PARAMS, HPARAMS, TRAIN, VALID, SHARDED_METHODS[method])


def specs(tree):
    """Of every leaf, without trailing None."""

    def spec(leaf):
        axes = [*leaf.sharding.spec]
        while axes and axes[-1] is None:
            axes.pop()
        return P(*axes)

    return jax.tree.map(spec, tree)


@pytest.mark.parametrize(
    ("layout", "method"), [("data", "cg"), ("model", "cg"), *(("both", name) for name in SHARDED_METHODS)]
)
def test_what_a_run_makes_lies_as_it_was_given(layout, method):
    args = laid_out(layout)
    result = run(WEIGHTED, *args, SHARDED_METHODS[method])
    assert_same(result, weighted_alone(method))
    of_params, of_hparams = LAYOUTS[layout], OF_HPARAMS
    state = result.state
    for tree in (result.params, result.best.params, *state.point.opt_state[0][1:]):
        assert specs(tree) == of_params
    for tree in (result.hparams, result.best.hparams, state.free, *state.outer[0][1:]):
        assert specs(tree) == of_hparams
    if method == "cg":
        assert specs(state.estimator.x) == of_params
    elif method == "sgd":
        assert specs(state.estimator.v) == of_params
    elif method == "nystrom":
        assert specs(state.estimator.basis) == jax.tree.map(
            lambda s: P(None, *s), of_params, is_leaf=lambda x: isinstance(x, P)
        )
    else:
        assert specs(state.origin.params) == of_params
    # What the user gave is the user's still.
    jax.tree.map(np.testing.assert_array_equal, args, (PARAMS, HPARAMS, TRAIN, VALID))


def test_hparams_in_the_shape_of_params_keep_their_own_layout():
    def loss(params, hparams, batch):
        decay = sum(jnp.sum(jnp.exp(hparams[name]) * params[name] ** 2) for name in params)
        return plain_loss(params, hparams, batch) + 0.5 * decay

    mesh, problem = mesh_of(2, 2), bilevel.Problem(loss, plain_loss)
    hparams = jax.tree.map(lambda x: np.full(x.shape, -3.0), PARAMS)
    of_params, of_hparams = LAYOUTS["model"], LAYOUTS["data"]
    params, *_, train, valid = laid_out("model")
    result = run(problem, params, put(mesh, hparams, of_hparams), train, valid, SHARDED_METHODS["cg"])
    assert_same(result, run(problem, PARAMS, hparams, TRAIN, VALID, SHARDED_METHODS["cg"]))
    state = result.state
    assert [specs(tree) for tree in (state.estimator.x, *state.point.opt_state[0][1:])] == [of_params] * 3
    assert [specs(tree) for tree in (state.free, *state.outer[0][1:])] == [of_hparams] * 3
    assert (specs(result.best.params), specs(result.best.hparams)) == (of_params, of_hparams)


def test_arrays_on_an_explicit_mesh_come_back_there():
    result = run(WEIGHTED, *laid_out("both", kind="explicit"), SHARDED_METHODS["cg"])
    assert_same(result, weighted_alone("cg"))
    assert specs(result.state.point.params) == LAYOUTS["both"]
    leaves = jax.tree.leaves((result.state, result.params, result.best.params))
    assert {x.sharding.mesh for x in leaves} == {mesh_of(2, 2, kind="explicit")}


def test_one_device_with_an_explicit_axis():
    mesh = mesh_of(1, kind="explicit")
    args = put(mesh, (np.zeros(20), np.float64(-1.0), *DATA))
    result = run(RIDGE, *args, CG, judge_every=5)
    assert_same(result, alone(CG))
    assert result.params.sharding.mesh == mesh


def test_the_chunk_is_compiled_once_and_nothing_at_the_second_call(compiled, caplog, monkeypatch):
    monkeypatch.setattr("bilevel.run._CHUNK_SECONDS", 1e-9)  # many chunks
    method = method_of(bilevel.implicit(bilevel.cg(10, tol=1e-12)))  # seen by no test before
    args = laid_out("both")
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        first = run(WEIGHTED, *args, method)
    names = [record.getMessage() for record in caplog.records if "XLA compilation of" in record.getMessage()]
    assert sum("_chunk" in name for name in names) == 1
    compiled()
    second = run(WEIGHTED, *args, method)
    assert compiled() == 0
    np.testing.assert_array_equal(first.history["value"], second.history["value"])


# --- What moves between devices -----------------------------------------------------------------------

MANY = 8192


def looked_up_loss(params, hparams, batch):
    weight = jax.nn.sigmoid(hparams["weight"])[batch["i"]][:, None]
    fit = jnp.mean(weight * (predicted(params, batch) - batch["y"]) ** 2)
    return fit + 0.5 * hparams["l2"] * jnp.sum(params["W"] ** 2)


def chunk_of_many(problem):
    """Collectives of the chunk's program, with a weight for each of `MANY` rows that four devices share."""
    mesh = mesh_of(4)
    train = {"x": np.resize(X, (MANY, 8)), "y": np.resize(Y, (MANY, 4)), "i": np.arange(MANY)}
    hparams = put(mesh, {"weight": np.zeros(MANY), "l2": np.float64(0.1)}, OF_HPARAMS)
    with contextlib.ExitStack() as stack:
        given = Given(problem, SHARDED_METHODS["cg"], PARAMS, hparams, train, VALID, mesh=mesh)
        ready = prepare(stack, given)
        arguments = ready.first_carry(), np.int32(1), np.float64(-1.0), *ready.sources, None
        lowered = loop.compiled(ready.plan).lower(*arguments)
        return of_text(lowered.compile({"xla_backend_optimization_level": 3}).as_text())


def test_weights_used_whole_are_not_gathered():
    found = chunk_of_many(WEIGHTED)
    moved = [c for c in found if c.op != "all-reduce"]
    # What the trajectory records: a sample of the weights, once in each step.
    (sample,) = moved
    assert (sample.op, sample.bytes, len(sample.loops)) == ("all-gather", 1024 * FLOAT, 1)
    sizes = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert max(c.bytes for c in found if c.op == "all-reduce") <= FLOAT * (2 * sizes + 10)


def test_weights_looked_up_are_gathered():
    # Should this ever fail, the test above no longer tells the two apart.
    found = chunk_of_many(bilevel.Problem(looked_up_loss, plain_loss))
    assert max(c.bytes for c in found) >= MANY * FLOAT


# --- Explicit axes outside of optimize -----------------------------------------------------------------


def mean_loss(w, h, batch):
    del h
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


# The ridge problem in operations whose results have one layout only, as Explicit axes ask for.
MEANS = bilevel.Problem(lambda w, h, b: mean_loss(w, h, b) + 0.5 * jnp.exp(h) * jnp.sum(w**2), mean_loss)


def explicit_ridge():
    mesh = mesh_of(4, kind="explicit")
    variables = put(mesh, (ridge().solution(-1.0), np.float64(-1.0)))
    return mesh, *variables, *put(mesh, DATA, P("data"))


def ways(*args):
    """How arrays on a mesh are used outside of `bilevel.optimize`, each with its first argument's name."""
    w, h, train, valid = args
    fn, solve = bilevel.hypergradient(MEANS), bilevel.argmin(MEANS)

    def step(w, h, train, valid):
        state = CG.init(MEANS, w, h, train, valid, key=jax.random.key(0))
        return CG.step(MEANS, state, train, valid)[0].params

    return {
        "params": (lambda w, h, t, v: fn(w, h, t, v).grad, args),
        "hparams": (lambda h, t, w: solve(h, t, init=w), (h, train, w)),
        "state": (step, args),
    }


@pytest.mark.parametrize("name", ["params", "hparams", "state"])
def test_explicit_axes_that_are_not_in_force_are_refused(name):
    mesh, *args = explicit_ridge()
    fn, args = ways(*args)[name]
    with pytest.raises(ValueError, match=rf"^{name} lies on the mesh \(data: 4\) with Explicit .*set_mesh"):
        fn(*args)
    expected = jax.jit(fn)(*as_numpy(args))
    with jax.set_mesh(mesh):
        refuse_explicit(arguments=args)
        inside = fn(*args) if name == "hparams" else jax.jit(fn)(*args)  # eagerly only what is fast
    # Under jit the mesh of the arguments is known.
    for got in (inside, jax.jit(fn)(*args)):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


def test_what_lies_on_an_explicit_mesh_is_named():
    _, w, h, train, valid = explicit_ridge()
    fn, solve = bilevel.hypergradient(MEANS), bilevel.argmin(MEANS)
    w, h = np.asarray(w), float(h)
    with pytest.raises(ValueError, match="^valid_batch lies on"):
        fn(w, h, DATA[0], valid)
    with pytest.raises(ValueError, match="^train_batch lies on"):
        fn(w, h, bilevel.stacked(jax.tree.map(lambda x: x[None], train)), DATA[1])
    with pytest.raises(ValueError, match="^batch lies on"):
        solve(h, train, init=w)


# --- Bad input ------------------------------------------------------------------------------------------


def fails(*args, match, error=ValueError, monkeypatch, **settings):
    """The error comes before any program of the run is made."""
    for name in ("compiled", "compiled_start"):
        monkeypatch.setattr(loop, name, lambda plan: pytest.fail("a program was made"))
    with pytest.raises(error, match=match):
        run(RIDGE, *args, CG, **settings)


def test_rows_that_do_not_divide(monkeypatch):
    cut = DATA[0][0][:39], DATA[0][1][:39]
    words = 'train: 39 rows do not divide over the 4 devices of mesh axis "data". Drop rows .36 would do.'
    fails(np.zeros(20), -1.0, cut, DATA[1], mesh=mesh_of(4), match=words, monkeypatch=monkeypatch)
    fails(
        np.zeros(20), -1.0, *DATA, mesh=mesh_of(4), match="test: 39 rows", test=cut, monkeypatch=monkeypatch
    )
    source = bilevel.minibatches(cut, 4)
    fails(
        np.zeros(20), -1.0, source, DATA[1], mesh=mesh_of(2), match="39 rows.*2 dev", monkeypatch=monkeypatch
    )


def test_batches_of_iterables_that_do_not_divide(monkeypatch):
    batches = ((DATA[0][0][:10], DATA[0][1][:10]) for _ in range(9000))
    fails(
        np.zeros(20), -1.0, batches, DATA[1], mesh=mesh_of(4), match="train: 10 rows", monkeypatch=monkeypatch
    )


def test_batch_sizes_that_do_not_fit_the_shards(monkeypatch):
    words = "batch_size must be a multiple of the 4 shards that the rows lie in, got 10"
    with pytest.raises(ValueError, match=words):
        bilevel.minibatches(put(mesh_of(4), DATA[0], P("data")), 10)
    source = bilevel.minibatches(DATA[0], 10)
    fails(np.zeros(20), -1.0, source, DATA[1], mesh=mesh_of(4), match=words, monkeypatch=monkeypatch)


def test_a_mesh_that_is_none(monkeypatch):
    words = r'mesh must be a jax.sharding.Mesh such as jax.make_mesh\(\(8,\), \("data",\)\), got'
    for wrong in (4, jax.devices(), mesh_of(4).abstract_mesh):
        fails(np.zeros(20), -1.0, *DATA, mesh=wrong, match=words, error=TypeError, monkeypatch=monkeypatch)


def test_a_mesh_without_the_axis(monkeypatch):
    words = r'mesh needs an axis named "data", .* got \(model: 4\)'
    mesh = mesh_of(4, names=("model",))
    fails(np.zeros(20), -1.0, *DATA, mesh=mesh, match=words, monkeypatch=monkeypatch)
    members = bilevel.population(4, sample=lambda key: (jnp.zeros(20), -1.0))
    words = 'mesh needs an axis named "data" or "population"'
    fails(None, None, *DATA, mesh=mesh, population=members, match=words, monkeypatch=monkeypatch)


def test_arrays_on_two_meshes(monkeypatch):
    train = put(mesh_of(4), DATA[0], P("data"))
    valid = put(mesh_of(2, 2), DATA[1], P("data"))
    words = r"valid.* lies on the mesh \(data: 2, model: 2\), but train.* is \(data: 4\)"
    fails(np.zeros(20), -1.0, train, valid, match=words, monkeypatch=monkeypatch)
    words = r"train.* lies on the mesh \(data: 4\), but mesh= is \(data: 2\)"
    fails(np.zeros(20), -1.0, train, DATA[1], mesh=mesh_of(2), match=words, monkeypatch=monkeypatch)


def test_an_array_put_on_one_device(monkeypatch):
    params = jax.device_put(np.zeros(20), jax.devices()[1])
    words = r"params was put on .*1.* by itself, but mesh= is the mesh \(data: 4\)"
    fails(params, -1.0, *DATA, mesh=mesh_of(4), match=words, monkeypatch=monkeypatch)
    train = put(mesh_of(4), DATA[0], P("data"))
    words = r"params was put on .*, but train.* is the mesh \(data: 4\)"
    fails(params, -1.0, train, DATA[1], match=words, monkeypatch=monkeypatch)


def test_a_key_on_another_device(monkeypatch):
    key = jax.device_put(jax.random.key(1), jax.devices()[3])
    words = r"key was put on .*3.* by itself, but mesh= is the mesh \(data: 2\)"
    fails(np.zeros(20), -1.0, *DATA, mesh=mesh_of(2), key=key, match=words, monkeypatch=monkeypatch)
    params = jax.device_put(np.zeros(20), jax.devices()[0])
    words = "key was put on .*3, but params on .*0: all arrays of a run lie on one device or on one mesh"
    fails(params, -1.0, *DATA, key=key, match=words, monkeypatch=monkeypatch)


def test_arrays_on_two_devices(monkeypatch):
    params, hparams = (
        jax.device_put(x, d) for x, d in zip((np.zeros(20), -1.0), jax.devices()[1:3], strict=True)
    )
    words = "hparams was put on .*2, but params on .*1: all arrays of a run lie on one device or on one mesh"
    fails(params, hparams, *DATA, match=words, monkeypatch=monkeypatch)


def test_members_that_do_not_divide(monkeypatch):
    members = bilevel.population(3, sample=lambda key: (jnp.zeros(20), -1.0))
    mesh = mesh_of(2, 2, names=("population", "data"))
    words = 'population: 3 members do not divide over the 2 devices of mesh axis "population"'
    fails(None, None, *DATA, mesh=mesh, population=members, match=words, monkeypatch=monkeypatch)
