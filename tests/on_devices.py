"""The worker of `test_hosts.py`: one process of a run, started as ``python on_devices.py '{"jobs": ...}'``.

Settings are JSON: ``jobs`` (functions below), ``devices`` (of this process), ``processes``, ``index``,
``port``, ``out`` (file of the results, written by the first process), and what the jobs take.
"""

import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time

import jax

SETTINGS = json.loads(sys.argv[1]) if __name__ == "__main__" else {}

if SETTINGS:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SETTINGS["devices"])
    jax.config.update("jax_enable_x64", True)
    if SETTINGS["processes"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{SETTINGS['port']}",
            SETTINGS["processes"],
            SETTINGS["index"],
            initialization_timeout=120,
        )

import jax.numpy as jnp
import numpy as np
import optax
from implementations import ESTIMATORS, LOG_L2, METHODS
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import RIDGE, ridge

import bilevel
from bilevel import hosts

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, 8))
Y = X @ np.arange(8.0) + 0.3 * RNG.standard_normal(64)
TRAIN, VALID = (X, Y), (X[:32] + 0.1, Y[:32])
START = {"w": np.zeros(8)}, {"l2": np.full(8, 0.1)}


def outer(params, hparams, batch):
    del hparams
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


def inner(params, hparams, batch):
    return outer(params, hparams, batch) + jnp.sum(hparams["l2"] * params["w"] ** 2)


PROBLEM = bilevel.Problem(inner, outer, constraints=bilevel.positive())
METHOD = bilevel.alternating(
    bilevel.implicit(bilevel.cg(5, tol=1e-12)), optax.adam(0.05), optax.adam(0.05), inner_steps=5
)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))


def spread(tree, kind=AxisType.Auto):
    """Arrays by rows over all devices, of which each process gives its own."""
    index, processes = jax.process_index(), jax.process_count()
    sharding = NamedSharding(mesh(kind), PartitionSpec("data"))

    def put(array):
        share = len(array) // processes
        return jax.make_array_from_process_local_data(sharding, array[index * share : (index + 1) * share])

    return jax.tree.map(put, tree)


def optimize(params=START[0], hparams=START[1], train=TRAIN, valid=VALID, steps=20, **options):
    return bilevel.optimize(PROBLEM, params, hparams, train, valid, METHOD, steps, progress=False, **options)


def facts(result) -> dict[str, np.ndarray]:
    """What has to be the same on any devices; the arrays of all processes."""
    trees = hosts.fetch((result.params, result.hparams, result.best.params, result.best.hparams))
    leaves = {f"leaf {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
    return leaves | {"value": result.history["value"], "test": np.asarray(result.best.value)}


# --- Jobs ---------------------------------------------------------------------------------------------


def table():
    """Every estimator, and a few steps of every method, on data spread over the mesh."""
    found = {}
    replicated = NamedSharding(mesh(), PartitionSpec())
    train = jax.tree.map(np.asarray, ridge().train)
    valid = jax.tree.map(np.asarray, ridge().valid)
    for row in ESTIMATORS:
        params, hparams = (
            jax.make_array_from_callback(np.shape(x), replicated, lambda i, x=x: np.asarray(x)[i])
            for x in (ridge().solution(LOG_L2), np.asarray(LOG_L2))
        )
        fn = jax.jit(bilevel.hypergradient(row.problem, row.make()))
        estimate = fn(params, hparams, spread(train), spread(valid))
        found[f"estimator {row}"] = np.concatenate([np.ravel(estimate.grad), np.ravel(estimate.value)])
    smooth = dataclasses.replace(
        RIDGE, smoothness=bilevel.ridge_smoothness(train[0], valid[0], strength=jnp.exp)
    )
    rows = [(f"method {row}", RIDGE, row.method) for row in METHODS]
    rows += [("maid", smooth, bilevel.maid()), ("hoag", smooth, bilevel.hoag())]
    for name, problem, method in rows:
        result = bilevel.optimize(
            problem,
            np.full(20, 0.1),
            np.asarray(-1.0),
            train,
            valid,
            method,
            2,
            mesh=mesh(),
            progress=False,
        )
        found[name] = np.concatenate([result.history["value"], np.ravel(result.hparams)])
    return found


def whole():
    return facts(optimize(mesh=mesh()))


def minibatches():
    return facts(optimize(train=bilevel.minibatches(TRAIN, 16, strata=8), mesh=mesh(), test=VALID))


def process_local():
    return facts(optimize(train=spread(TRAIN), valid=spread(VALID)))


def explicit():
    result = optimize(train=spread(TRAIN, AxisType.Explicit), valid=spread(VALID, AxisType.Explicit))
    assert result.params["w"].sharding.mesh.axis_types == (AxisType.Explicit,)
    return facts(result)


def sharded_params():
    return facts(optimize(*map(spread, START), train=spread(TRAIN), valid=spread(VALID)))


def iterable():
    """Each process gives its own rows of each batch."""
    share = 16 // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    rows = (np.random.default_rng(k).permutation(64)[:16][mine] for k in range(90))
    result = optimize(train=((X[r], Y[r]) for r in rows), steps=30, mesh=mesh())
    assert result.status == bilevel.Status.DATA_EXHAUSTED
    return facts(result)


def pairs():
    """As `iterable`: training and validation rows of each episode, and a number that is no one's own."""
    processes, index = jax.process_count(), jax.process_index()

    def own(rows):
        return rows[index * len(rows) // processes : (index + 1) * len(rows) // processes]

    def episodes():
        for k in range(30):
            rows = np.random.default_rng(k).permutation(64)
            train, valid = own(rows[:16]), own(rows[16:24])
            yield (X[train], Y[train], np.float64(1 + k % 3)), (X[valid], Y[valid])

    def scaled(params, hparams, batch):
        return batch[2] * inner(params, hparams, batch[:2])

    problem = bilevel.Problem(scaled, outer, constraints=bilevel.positive())
    source = bilevel.episodes(episodes())
    result = bilevel.optimize(problem, *START, source, None, METHOD, 20, mesh=mesh(), progress=False)
    return facts(result) | {"test": np.asarray(0.0)}


def members():
    """The members of a population are split over the processes; halved, kept and gone on with."""

    def run(steps):
        return optimize(
            {"w": np.zeros((8, 8))},
            {"l2": np.linspace(0.05, 0.4, 64).reshape(8, 8)},
            steps=steps,
            population=bilevel.population(8, halve_every=5),
            test=VALID,
            mesh=jax.make_mesh((jax.device_count(),), ("population",)),
            checkpoint=bilevel.checkpoints(SETTINGS["folder"] + "/members", every=4),
        )

    run(6)
    result = run(12)
    keys = [x for x in jax.tree.leaves(result.state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert keys
    one = result.member(3)
    whole = hosts.fetch((keys, one.params, one.hparams))
    numbers = [np.asarray(jax.random.key_data(key)) for key in whole[0]] + jax.tree.leaves(whole[1:])
    return (
        facts(result)
        | {f"member {i}": np.asarray(number) for i, number in enumerate(numbers)}
        | {"status": result.status, "values": result.members.value, "steps": result.members.attempted}
    )


def iterable_for_members():
    """Processes along the members, devices of each along the rows: each process gives all rows."""
    shape = jax.process_count(), jax.local_device_count()
    result = optimize(
        {"w": np.zeros((8, 8))},
        {"l2": np.linspace(0.05, 0.4, 64).reshape(8, 8)},
        train=(TRAIN for _ in range(30)),
        steps=6,
        population=bilevel.population(8),
        mesh=jax.make_mesh(shape, ("population", "data"), axis_types=(AxisType.Auto,) * 2),
    )
    return facts(result)


def population():
    def sample(key):
        return {"w": jnp.zeros(8)}, {"l2": 0.1 + jax.random.uniform(key, (8,), float)}

    members = bilevel.population(4, sample, halve_every=5)
    return facts(optimize(None, None, steps=12, population=members, mesh=mesh()))


def checkpoint():
    return facts(
        optimize(
            train=bilevel.minibatches(TRAIN, 16, strata=8),
            steps=SETTINGS["steps"],
            checkpoint=bilevel.checkpoints(SETTINGS["folder"], every=5),
            mesh=mesh(),
        )
    )


def checkpoint_whole():
    folder = bilevel.checkpoints(SETTINGS["folder"], every=10)
    return facts(optimize(steps=SETTINGS["steps"], checkpoint=folder, mesh=mesh()))


def saved():
    """Results are told, drawn and written once."""
    told = []
    result = optimize(
        *map(spread, START),
        train=spread(TRAIN),
        valid=spread(VALID),
        callbacks=lambda step, rows: told.append(step),
    )
    assert told == ([10, 20] if jax.process_index() == 0 else [])
    repr(result)
    result.save(SETTINGS["file"])
    return facts(result)


def endless():
    """Runs until something ends it; says when it has begun."""

    def began(step, rows):
        del step, rows
        print("stepping", flush=True)

    return facts(
        optimize(
            steps=10**9,
            callbacks=began,
            checkpoint=bilevel.checkpoints(SETTINGS["folder"], every=10),
            mesh=mesh(),
        )
    )


def terminated():
    """As `endless`; the last process is sent SIGTERM meanwhile."""
    if jax.process_index() == jax.process_count() - 1:
        threading.Timer(SETTINGS["after"], lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    result = optimize(steps=10**9, checkpoint=bilevel.checkpoints(SETTINGS["folder"], every=10), mesh=mesh())
    assert result.status == bilevel.Status.INTERRUPTED
    print(result.message, flush=True)
    return {"done": np.asarray(len(result.history["value"]))}


def failing_callback():
    def fails(step, rows):
        raise KeyError("a mistake in a callback")

    try:
        optimize(callbacks=fails, mesh=mesh())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    return {}


def failing_iterable():
    """The data of the last process fail after some batches."""

    def batches():
        for k in range(200):
            if k == 60 and jax.process_index() == jax.process_count() - 1:
                raise OSError("a file is missing")
            yield TRAIN

    try:
        optimize(train=batches(), mesh=mesh())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    return {}


def told(**settings):
    """What a run fails with, and how soon."""
    began = time.monotonic()
    try:
        optimize(**{"mesh": mesh(), "steps": 3, **settings})
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    assert time.monotonic() - began < 15
    return {}


def empty_iterable():
    """The last process has no data."""
    return told(train=iter([TRAIN] * 20 if jax.process_index() == 0 else []))


def iterables_of_other_shapes():
    rows = 8 * (1 + jax.process_index())
    return told(train=itertools.repeat((X[:rows], Y[:rows])))


def iterables_with_a_number_of_their_own():
    return told(train=itertools.repeat((*TRAIN, np.float64(jax.process_index()))))


def iterable_that_nothing_splits():
    replicated = NamedSharding(mesh(), PartitionSpec())
    params = jax.make_array_from_callback((8,), replicated, lambda index: np.zeros(8)[index])
    return told(params={"w": params}, train=itertools.repeat(TRAIN), mesh=None)


def iterables_of_other_lengths():
    """What is kept is where each process stood when the first one had no more; all go on from there."""

    def run(lasts, folder):
        batches = ((X + 0.01 * k, Y) for k in range(5 * lasts))
        folder = bilevel.checkpoints(f"{SETTINGS['folder']}/{folder}", every=50, reread=True)
        return optimize(train=batches, steps=14, mesh=mesh(), checkpoint=folder)

    first = run(13 - 6 * jax.process_index(), "lengths")
    assert len(first.history["value"]) == 7
    print(first.message)
    np.testing.assert_array_equal(
        run(20, "lengths").history["value"][7:], run(20, "whole").history["value"][7:]
    )
    return {}


def exchanged_in_blocks():
    hosts._BLOCK = 5
    index, processes = jax.process_index(), jax.process_count()
    contents = [bytes(range(k * 7)) for k in range(processes)]
    assert hosts.gather_bytes(contents[index]) == contents
    assert hosts.gather_bytes(b"") == [b""] * processes
    for content in (None, b"", b"12345", bytes(range(23))):
        assert hosts.share(content if index == 0 else b"of another") == content
    return {}


def different_arrays():
    train = X + jax.process_index(), Y
    try:
        optimize(train=train, mesh=mesh())
    except ValueError as error:
        print(error, flush=True)
    return {}


def part_of_the_processes():
    try:
        optimize(mesh=jax.sharding.Mesh(np.array(jax.devices())[: jax.local_device_count() * 2], ("data",)))
    except ValueError as error:
        print(error, flush=True)
    return {}


def each_alone():
    """Every process runs by itself on its own devices, for its own number of steps."""
    own = jax.make_mesh((jax.local_device_count(),), ("data",), devices=jax.local_devices())
    steps = 12 + 5 * jax.process_index()
    result = optimize(steps=steps, mesh=own, checkpoint=f"{SETTINGS['folder']}/{jax.process_index()}")
    assert len(result.history["value"]) == steps
    return {}


if __name__ == "__main__":
    results = {}
    for job in SETTINGS["jobs"]:
        began = time.perf_counter()
        results |= {f"{job}: {name}": value for name, value in globals()[job]().items()}
        print(f"{job}: {time.perf_counter() - began:.1f} s", flush=True)
    if jax.process_index() == 0:
        np.savez(SETTINGS["out"], **results)
    if SETTINGS["processes"] > 1:
        jax.distributed.shutdown()
