"""A run that goes on from a checkpoint ends with the bits of one that was never interrupted."""

import dataclasses
import errno
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import bilevel
from benchmarks import kills
from bilevel import Status, archive
from bilevel.preparation import Prepared
from bilevel.run import Run

RNG = np.random.default_rng(0)
W = np.array([0.5, -0.2, 0.1])
H = {"l2": np.full(3, 0.3), "shift": np.float64(0.1)}
TRAIN = {"x": RNG.standard_normal((16, 3)), "y": RNG.standard_normal(16)}
VALID = {"x": RNG.standard_normal((8, 3)), "y": RNG.standard_normal(8)}
TEST = {"x": RNG.standard_normal((8, 3)), "y": RNG.standard_normal(8)}
WIDE = {"l2": np.full(40, 0.3), "shift": np.float64(0.1)}
EVERY, CUT, STEPS = 4, 14, 26


def error(w, shift, batch):
    return jnp.mean((batch["x"] @ w - batch["y"] - shift) ** 2)


def inner(w, h, batch):
    return error(w, h["shift"], batch) + 0.5 * jnp.sum(h["l2"][:3] * w**2)


def outer(w, h, batch):
    return error(w, 0.0, batch), {"tail": jnp.sum(h["l2"][3:] ** 2)}


def noisy_inner(w, h, batch):
    arrays, key = batch
    return inner(w, h, arrays) + 0.1 * w[0] * jax.random.normal(key, dtype=w.dtype)


def counted_inner(w, h, batch, state):
    mean = 0.9 * state["mean"] + 0.1 * jnp.mean(batch["x"] * h["shift"], 0)
    return inner(w - mean, h, batch), {"mean": mean, "steps": state["steps"] + 1}


def counted_outer(w, h, batch, state):
    return outer(w - state["mean"], h, batch)


def drawn(h, batch, key):
    return h["shift"] * jax.random.normal(key, (3,)) + jnp.mean(batch["x"], 0)


def sample(key):
    return 0.1 * jax.random.normal(key, (3,)), {
        "l2": jax.random.uniform(key, (3,)),
        "shift": jnp.float64(0.1),
    }


CONSTRAINTS = {"l2": bilevel.positive(), "shift": bilevel.real()}
PROBLEM = bilevel.Problem(inner, outer, constraints=CONSTRAINTS)
NOISY = bilevel.Problem(noisy_inner, outer, constraints=CONSTRAINTS)
COUNTED = bilevel.Problem(counted_inner, counted_outer, constraints=CONSTRAINTS, has_state=True)
STARTED = bilevel.Problem(inner, outer, constraints=CONSTRAINTS, start=drawn)
MOMENTUM = optax.sgd(0.05, momentum=0.5)


def alternating(estimator, inner=MOMENTUM, outer_rate=0.02, **settings):
    return bilevel.alternating(estimator, inner, optax.adam(outer_rate), **{"inner_steps": 3, **settings})


IMPLICIT = bilevel.implicit(bilevel.cg(max_steps=5))
METHOD = alternating(IMPLICIT)


def single(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def arguments(problem=PROBLEM, params=W, hparams=H, train=TRAIN, valid=VALID, method=METHOD, **settings):
    return {"problem": problem, "params": params, "hparams": hparams, "train": train, "valid": valid,
            "method": method, "key": jax.random.key(5), "progress": False, **settings}  # fmt: skip


POPULATION = {"params": None, "hparams": None}
STACK = jax.tree.map(lambda x: x[:15].reshape(3, 5, *x.shape[1:]), TRAIN)
CASES = {
    "whole": {},
    "float32": {"params": single(W), "hparams": single(H), "train": single(TRAIN), "valid": single(VALID)},
    "minibatches": {"train": bilevel.minibatches(TRAIN, 5)},
    "strata": {"train": bilevel.minibatches(TRAIN, 4, strata=2)},
    "with_rng": {"problem": NOISY, "train": bilevel.with_rng(TRAIN)},
    "minibatches with_rng": {"problem": NOISY, "train": bilevel.with_rng(bilevel.minibatches(TRAIN, 5))},
    "stacked": {"train": bilevel.stacked(STACK)},
    "population": {**POPULATION, "population": bilevel.population(4, sample)},
    "halving": {**POPULATION, "population": bilevel.population(4, sample, halve_every=6)},
    "model_state": {"problem": COUNTED, "model_state": {"mean": np.zeros(3), "steps": np.int32(0)}},
    "start": {"problem": STARTED, "params": None},
    "restart": {"method": alternating(IMPLICIT, restart=True)},
    "neumann": {"method": alternating(bilevel.implicit(bilevel.neumann(3, 0.1), batches=2)),
                "train": bilevel.minibatches(TRAIN, 5)},
    "unrolled": {"method": alternating(bilevel.unrolled())},
    "forward": {"method": alternating(bilevel.forward())},
    "one_step": {"method": alternating(bilevel.one_step())},
    "newton": {"method": alternating(bilevel.implicit(), bilevel.newton_cg(1))},
    "period": {"method": alternating(IMPLICIT, period=3, warmup=5)},
    "test": {"test": TEST, "judge_every": 3},
    "sampled valid": {"valid": bilevel.minibatches(VALID, 2), "judge_every": 3},
    "no best": {"keep_best": False},
    "quantiles": {"hparams": WIDE, "judge_every": 3},
    "the default": {"method": None},
}  # fmt: skip


# --- What is the same -------------------------------------------------------------------------------------


def bits(tree):
    """Every leaf by its path, to the last bit."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        found[jax.tree_util.keystr(path)] = array.dtype.name, array.shape, array.tobytes()
    return found


def facts(result):
    """Everything in a result but the time it took."""
    out = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    for name in ("best", "trajectory", "members"):
        value = out[name]
        out[name] = value and {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    del out["seconds"]
    out["history"] = {name: column for name, column in result.history.items() if name != "seconds"}
    texts = {name: out.pop(name) for name in ("message", "status")}
    if out["members"]:
        texts["messages"] = out["members"].pop("messages")
    return bits(out), {name: str(text) for name, text in texts.items()}


def same(result, expected, message=True):
    (found, texts), (wanted, words) = facts(result), facts(expected)
    assert [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)] == []
    if message:
        assert texts == words
    assert len(result.history["seconds"]) == len(expected.history["seconds"])
    assert (np.diff(result.history["seconds"]) >= 0).all()


def run(options, path=None, steps=STEPS, every=EVERY, reread=False, **changes):
    settings = {**arguments(**options), **changes}
    if path is not None:
        settings["checkpoint"] = bilevel.checkpoints(path, every=every, reread=reread)
    return bilevel.optimize(**settings, steps=steps)


def files(path):
    return sorted(entry.name for entry in Path(path).iterdir() if entry.name != "lock")


class Left:
    """Copies a folder at the first call from a step on: what a run leaves that is killed there."""

    def __init__(self, path, at):
        self.path, self.at, self.copy = path, at, path.with_name("left")

    def __call__(self, step, rows):
        del rows
        while step >= self.at and not self.copy.exists():
            try:
                shutil.copytree(self.path, self.copy, ignore=shutil.ignore_patterns(".*"))
            except shutil.Error:  # a thread writes and removes files meanwhile
                shutil.rmtree(self.copy)


# --- Resumed runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_to_the_last_bit(tmp_path, options):
    expected = run(options)
    assert len(expected.history["value"]) == STEPS
    # Ended at a step that is no multiple of anything, then given more steps: from its last checkpoint.
    first = run(options, tmp_path / "a", CUT)
    assert len(first.history["value"]) == CUT
    assert files(tmp_path / "a")[-1] == f"step-{CUT:08}.npz"
    same(run(options, tmp_path / "a"), expected)
    # What a run that is killed leaves: a checkpoint that is some steps old.
    left = Left(tmp_path / "b", 15 if options.get("judge_every") == 3 else 10)
    same(run(options, tmp_path / "b", callbacks=left), expected)
    assert files(left.copy)[-1] in ("step-00000004.npz", "step-00000008.npz", "step-00000012.npz")
    same(run(options, left.copy), expected)


def test_twice_interrupted(tmp_path):
    expected = run(CASES["minibatches"])
    for steps in (5, 6, 17, STEPS):
        result = run(CASES["minibatches"], tmp_path, steps)
    same(result, expected)


def test_the_interval_may_change(tmp_path):
    run({}, tmp_path, 7, every=3)
    same(run({}, tmp_path, every=5), run({}))


def test_a_finished_run_is_not_computed_again(tmp_path, monkeypatch):
    options = CASES["sampled valid"] | {"test": TEST}
    expected = run(options, tmp_path)
    content = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(Run, "_advance", never)
    monkeypatch.setattr(Prepared, "first_carry", never)
    again = run(options, tmp_path, callbacks=never)
    same(again, expected)
    assert again.history["seconds"].tolist() == expected.history["seconds"].tolist()
    assert again.seconds >= expected.history["seconds"][-1]
    same(run(options, tmp_path, steps=STEPS - 5), expected, message=False)  # nothing is undone
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == content


def test_a_smaller_tolerance_goes_on(tmp_path, monkeypatch):
    method = alternating(IMPLICIT, outer_rate=0.1)
    norms = run({"method": method}, steps=60).history["grad_norm"]
    large, small = float(norms[20] * 1.0001), float(np.min(norms) * 0.5)
    first = run({"method": method}, tmp_path, 60, tol=large)
    assert first.status == Status.CONVERGED
    assert len(first.history["value"]) < 60
    expected = run({"method": method}, steps=60, tol=small)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_advance", None)
        same(run({"method": method}, tmp_path, 60, tol=large), first)
        same(run({"method": method}, tmp_path, 60, tol=2 * large), first, message=False)
    same(run({"method": method}, tmp_path, 60, tol=small), expected)


def test_callbacks_see_each_row_once(tmp_path):
    """Interrupted at a checkpoint: no row is missed, and none comes twice."""
    seen = []

    def note(step, rows):
        assert rows["step"].tolist() == list(range(step - len(rows["step"]), step))
        seen.append((step, rows["value"]))

    whole = run({}, callbacks=note, judge_every=5)
    steps, seen = [step for step, _ in seen], []
    assert steps == [5, 10, 15, 20, 25, 26]
    run({}, tmp_path, steps=12, callbacks=note, judge_every=5)
    run({}, tmp_path, steps=20, callbacks=note, judge_every=5)
    run({}, tmp_path, callbacks=note, judge_every=5)
    run({}, tmp_path, callbacks=note, judge_every=5)
    assert [step for step, _ in seen] == [5, 10, 12, 15, 20, 25, 26]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in seen]), whole.history["value"])


def test_rows_that_no_callback_saw_before_a_kill_come_later(tmp_path):
    seen, left = [], Left(tmp_path / "a", 20)

    def note(step, rows):
        seen.append((step, rows["step"][0]))

    run({}, tmp_path / "a", callbacks=[note, left], every=6)
    for path in left.copy.glob("step-00000018.npz"):  # is it there already?
        path.unlink()
    seen.clear()
    run({}, left.copy, callbacks=note, every=6)
    assert seen == [(20, 10), (26, 20)]  # from step 12


def test_a_callback_that_stops_or_fails_leaves_a_checkpoint(tmp_path):
    expected = run({})

    def fail(step, rows):
        raise OSError("no network")

    with pytest.raises(OSError, match="no network") as caught:
        run({}, tmp_path / "a", every=100, callbacks=fail)
    assert len(caught.value.partial_result.history["value"]) == 10
    same(run({}, tmp_path / "a"), expected)
    stopped = run({}, tmp_path / "b", every=100, callbacks=lambda step, rows: bilevel.STOP)
    assert stopped.status == Status.INTERRUPTED
    assert files(tmp_path / "b") == ["step-00000010.npz"]
    same(run({}, tmp_path / "b"), expected)


# --- Iterables -------------------------------------------------------------------------------------------


class Stateful:
    """Batches without end that an iterator draws by a position, which is its state."""

    def __init__(
        self, encode=lambda n: {"next": n, "more": [1, {"a": None}]}, decode=lambda s: s["next"], pause=0
    ):
        self.encode, self.decode, self.pause, self.at, self.drawn = encode, decode, pause, 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.pause)
        rng = np.random.default_rng(self.at)
        self.at, self.drawn = self.at + 1, self.drawn + 1
        return {"x": rng.standard_normal((4, 3)), "y": rng.standard_normal(4)}

    def get_state(self):
        return self.encode(self.at)

    def set_state(self, state):
        self.at = self.decode(state)


class Reread:
    """The same batches each time, without a state."""

    def __init__(self, count=1000):
        self.count = count

    def __iter__(self):
        source = Stateful()
        return (next(source) for _ in range(self.count))


def by_bytes(**settings):
    return Stateful(lambda n: json.dumps(n).encode(), json.loads, **settings)


@pytest.mark.parametrize("make", [Stateful, by_bytes], ids=["dict", "bytes"])
@pytest.mark.parametrize("problem", [PROBLEM, NOISY], ids=["plain", "with_rng"])
def test_iterators_with_a_state(tmp_path, make, problem):
    def source():
        return bilevel.with_rng(make()) if problem is NOISY else make()

    expected = run({"problem": problem, "train": source()})
    run({"problem": problem, "train": source()}, tmp_path, CUT)
    train = make()
    given = bilevel.with_rng(train) if problem is NOISY else train
    same(run({"problem": problem, "train": given}, tmp_path), expected)
    assert (
        train.drawn < 3 * (STEPS - CUT) + 2 * 16 * 3 + 4
    )  # it did not begin anew: the rest, and those ahead


def test_both_sources_are_iterables(tmp_path):
    def options():
        return {"train": Stateful(), "valid": Reread()}

    expected = run(options())
    run(options(), tmp_path, CUT, reread=True)
    same(run(options(), tmp_path, reread=True), expected)


def test_a_slow_iterator_is_set_only_when_its_thread_has_ended(tmp_path):
    options = {"method": alternating(IMPLICIT, inner_steps=1)}
    expected = run({**options, "train": Stateful()}, steps=4)
    run({**options, "train": Stateful()}, tmp_path, 3)
    slow = Stateful(pause=1.2)
    same(run({**options, "train": slow}, tmp_path, steps=4), expected)


def test_iterables_that_are_read_again(tmp_path):
    expected = run({"train": Reread()})
    run({"train": Reread()}, tmp_path, CUT, reread=True)
    same(run({"train": Reread()}, tmp_path, reread=True), expected)


def test_an_iterable_that_ended_stays_at_its_end(tmp_path):
    options = {"train": Reread(3 * CUT + 1)}
    expected = run(options)
    assert expected.status == Status.DATA_EXHAUSTED
    run(options, tmp_path, 9, reread=True)
    same(run(options, tmp_path, reread=True), expected)
    same(run(options, tmp_path, reread=True), expected)


def test_an_iterable_that_is_shorter_than_before(tmp_path):
    run({"train": Reread()}, tmp_path, CUT, reread=True)
    with pytest.raises(ValueError, match="does not give the same batches"):
        run({"train": Reread(7)}, tmp_path, reread=True)


def test_episodes(tmp_path):
    def pairs():
        return bilevel.episodes(list(zip(Reread(100), Reread(100), strict=True)))

    expected = run({"train": pairs(), "valid": None})
    run({"train": pairs(), "valid": None}, tmp_path, CUT, reread=True)
    same(run({"train": pairs(), "valid": None}, tmp_path, reread=True), expected)


@pytest.mark.parametrize(
    "make",
    [
        Reread,
        lambda: Stateful(lambda n: object()),
        lambda: Stateful(lambda n: (n,)),
        lambda: Stateful(lambda n: {n: 1}),
    ],
    ids=["none", "not JSON", "a tuple", "number keys"],
)
def test_iterables_that_cannot_go_on_are_refused_at_once(tmp_path, make, compiled):
    compiled()
    with pytest.raises(TypeError, match=r"train is an iterable without get_state .*reread=True"):
        run({"train": make()}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_grain(tmp_path, kind):
    grain = pytest.importorskip("grain")
    rows = [
        {"x": x, "y": y} for x, y in zip(np.tile(TRAIN["x"], (9, 1)), np.tile(TRAIN["y"], 9), strict=True)
    ]

    def source():
        if kind == "dataset":
            return grain.MapDataset.source(rows).seed(3).shuffle().repeat(4).batch(4).to_iter_dataset()
        shards = grain.sharding.NoSharding()
        sampler = grain.samplers.IndexSampler(len(rows), shards, shuffle=True, num_epochs=4, seed=3)
        batches = [grain.transforms.Batch(4)]
        return grain.DataLoader(data_source=rows, sampler=sampler, operations=batches, worker_count=0)

    expected = run({"train": source()})
    assert len(np.unique(expected.history["value"])) == STEPS
    run({"train": source()}, tmp_path, CUT)
    same(run({"train": source()}, tmp_path), expected)


# --- Devices ---------------------------------------------------------------------------------------------


def close(result, expected):
    for name in ("params", "hparams", "state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            *(jax.tree.map(plain, getattr(r, name)) for r in (result, expected)),
        )
    for name in ("value", "grad_norm"):
        np.testing.assert_allclose(result.history[name], expected.history[name], rtol=1e-10)


def plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


MESHES = {
    "whole": {},
    "strata": {"train": bilevel.minibatches(TRAIN, 4, strata=4)},
    "halving": {**POPULATION, "population": bilevel.population(4, sample, halve_every=6)},
}


@pytest.mark.parametrize("options", MESHES.values(), ids=MESHES.keys())
def test_on_another_number_of_devices(tmp_path, options):
    fixed = {**options, "method": alternating(bilevel.implicit(bilevel.neumann(3, 0.1)))}
    four = jax.make_mesh((4,), ("data",))
    expected = run(fixed)
    run(fixed, tmp_path / "one", CUT)
    close(run(fixed, tmp_path / "one", mesh=four), expected)
    run(fixed, tmp_path / "four", CUT, mesh=four)
    same(run(fixed, tmp_path / "four", 20, mesh=four), run(fixed, steps=20, mesh=four))
    close(run(fixed, tmp_path / "four"), expected)


def test_losses_that_name_axes_of_the_mesh(tmp_path):
    def split(w, h, batch):
        return inner(w, h, jax.lax.with_sharding_constraint(batch, PartitionSpec("data")))

    method = alternating(bilevel.implicit(bilevel.neumann(3, 0.1)))
    options = {"problem": dataclasses.replace(PROBLEM, inner=split), "method": method}
    two, four = (jax.make_mesh((n,), ("data",), devices=jax.devices()[:n]) for n in (2, 4))
    expected = run(options, mesh=two)
    run(options, tmp_path, CUT, mesh=two)
    same(run(options, tmp_path, 20, mesh=two), run(options, steps=20, mesh=two))
    close(run(options, tmp_path, mesh=four), expected)


def test_strata_that_come_from_the_mesh_are_another_run(tmp_path):
    options = {"train": bilevel.minibatches(TRAIN, 4)}
    run(options, tmp_path, CUT)
    with pytest.raises(ValueError, match="another run"):
        run({"train": bilevel.minibatches(TRAIN, 4, strata=4)}, tmp_path)


def test_members_over_devices(tmp_path):
    options = CASES["population"]
    mesh = jax.make_mesh((2,), ("population",), devices=jax.devices()[:2])
    expected = run(options)
    run(options, tmp_path, CUT, mesh=mesh)
    close(run(options, tmp_path), expected)


def injected(rate):
    outer = optax.inject_hyperparams(optax.adam)(rate)
    return {"method": bilevel.alternating(IMPLICIT, MOMENTUM, outer)}


def test_numbers_that_live_in_the_first_state_alone(tmp_path):
    run(injected(0.02), tmp_path, 4)
    with pytest.raises(ValueError, match="another run: the method"):
        run(injected(0.03), tmp_path)


@pytest.mark.parametrize("cut", [6, 12])
def test_a_halving_that_was_due_where_the_run_ended(tmp_path, cut):
    options = CASES["halving"]
    expected = run(options)
    assert sorted(expected.members.attempted.tolist()) == [6, 6, 12, STEPS]
    if cut == 12:
        run(options, tmp_path, cut)
        same(run(options, tmp_path), expected)
        return
    expected = run(options, judge_every=cut)
    stopped = run(options, tmp_path / "b", judge_every=cut, callbacks=lambda step, rows: bilevel.STOP)
    assert len(stopped.history["value"]) == cut
    same(run(options, tmp_path / "b", judge_every=cut), expected)


def test_another_halving_is_another_run(tmp_path):
    run(CASES["halving"], tmp_path, 7)
    with pytest.raises(ValueError, match="another run: population differs"):
        run(CASES["population"], tmp_path)


def test_members_that_converged_cannot_catch_up(tmp_path):
    options = {**CASES["population"], "method": alternating(IMPLICIT, outer_rate=0.1), "judge_every": 1}
    norms = np.sort(run(options).history["grad_norm"].min(axis=0))
    tol = float(norms[1] + norms[2]) / 2
    assert (run(options, tmp_path, tol=tol).status == Status.CONVERGED).any()
    with pytest.raises(ValueError, match="converged to tol = .* before the others"):
        run(options, tmp_path, 2 * STEPS, tol=tol / 2)
    run(options, tmp_path, 2 * STEPS, tol=tol)


def test_members_that_the_devices_cannot_share(tmp_path):
    run(CASES["halving"], tmp_path, 10)
    mesh = jax.make_mesh((4,), ("population",), devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="2 members .* which the 4 devices .* cannot share"):
        run(CASES["halving"], tmp_path, mesh=mesh)


def test_fewer_steps_than_are_done(tmp_path):
    run({}, tmp_path, 8)
    assert "All 8 outer steps are done; steps=5 asked for fewer." in run({}, tmp_path, 5).message


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    expected = run({})
    run({}, tmp_path, 8)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.warns(RuntimeWarning, match="No space left on device. The run goes on"):
            same(run({}, tmp_path), expected)


def test_checkpoints_trace_nothing_more(tmp_path):
    """The name of a run is read from the programs that it runs."""
    traced = []

    def run_of_its_own(**settings):
        def counted(w, h, batch):
            traced.append(1)
            return inner(w, h, batch)

        traced.clear()
        run({"problem": dataclasses.replace(PROBLEM, inner=counted)}, **settings)
        return len(traced)

    assert run_of_its_own(path=tmp_path) == run_of_its_own() > 0


@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_callback_that_overwrites_what_was_given_renames_no_run(tmp_path, steps):
    """A run is named after what it began with, although that is done while it runs."""
    state = {"mean": np.zeros(3), "steps": np.int32(0)}

    def overwrite(step, rows):
        state["mean"][:] = step

    run(CASES["model_state"] | {"model_state": state}, tmp_path, steps, every=100, callbacks=overwrite)
    assert state["mean"].all()
    run(CASES["model_state"], tmp_path, steps, every=100)


# --- Another run -----------------------------------------------------------------------------------------


def steeper(w, h, batch):
    return 1.01 * inner(w, h, batch)


CHANGED_DATA = {**TRAIN, "y": TRAIN["y"] + 1e-12}
OTHERS = {
    "losses": ({"problem": dataclasses.replace(PROBLEM, inner=steeper)}, "the problem's losses"),
    "constraints": ({"constraints": bilevel.real()}, "the problem's losses"),
    "learning rate": ({"method": alternating(IMPLICIT, outer_rate=0.021)}, "the method"),
    "inner steps": ({"method": alternating(IMPLICIT, inner_steps=4)}, "the method"),
    "judge_every": ({"judge_every": 7, "valid": VALID, "test": TEST}, "test differs"),
    "train": ({"train": CHANGED_DATA}, "train differs"),
    "valid": ({"valid": {**VALID, "y": VALID["y"] + 1}}, "valid differs"),
    "params": ({"params": W + 1e-15}, "params differ"),
    "hparams": ({"hparams": {**H, "shift": np.float64(0.2)}}, "hparams differ"),
    "key": ({"key": jax.random.key(6)}, "key differs"),
    "float32": ({"params": single(W), "hparams": single(H)}, "params and hparams differ"),
    # Numbers that live in the first state alone.
    "injected": ({"method": alternating(IMPLICIT, optax.inject_hyperparams(optax.sgd)(0.05))}, "the method"),
    "minibatches": ({"train": bilevel.minibatches(TRAIN, 5)}, "sampling of train"),
    "population": ({**POPULATION, "population": bilevel.population(2, sample)}, "hparams and key differ"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_another_run_is_refused(tmp_path_factory, tmp_path, options, words):
    path = tmp_path_factory.getbasetemp() / "another-run"
    if not path.exists():
        run({}, path, 4)
    shutil.copytree(path, tmp_path / "run")
    before = (tmp_path / "run" / "step-00000004.npz").read_bytes()
    with pytest.raises(ValueError, match="another run") as caught:
        run(options, tmp_path / "run")
    assert words in str(caught.value)
    assert (tmp_path / "run" / "step-00000004.npz").read_bytes() == before
    assert files(tmp_path / "run") == ["step-00000004.npz"]


@pytest.mark.parametrize(
    "other", [bilevel.minibatches(TRAIN, 5), bilevel.minibatches(TRAIN, 4, strata=2)], ids=["size", "strata"]
)
def test_another_sampling_is_refused(tmp_path, other):
    run({"train": bilevel.minibatches(TRAIN, 4)}, tmp_path, 4)
    with pytest.raises(ValueError, match="sampling of train differs") as caught:
        run({"train": other}, tmp_path)
    advised = "with strata=1, and now with strata=2: by default" in str(caught.value)
    assert advised == (other.strata == 2)
    assert ("strata=1) goes on from there" in str(caught.value)) == advised


def test_a_result_is_no_checkpoint(tmp_path):
    run({}, steps=2).save(tmp_path / "step-00000002.npz")
    with pytest.raises(ValueError, match="holds a result, not a checkpoint"):
        run({}, tmp_path)


# --- When the disk fails ---------------------------------------------------------------------------------


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("quiet", [False, True], ids=["warned", "warnings are errors"])
def test_a_full_disk(tmp_path, monkeypatch, quiet):
    """The run goes on, says so once, and tries again."""
    expected, write, tried = run({}), archive.write, []

    def failing(path, trees, meta):
        tried.append(meta["step"])
        return full() if meta["step"] in (8, 12, 20) else write(path, trees, meta)

    monkeypatch.setattr(archive, "write", failing)
    with warnings.catch_warnings(record=not quiet) as caught:
        warnings.simplefilter("error" if quiet else "always")
        result = run({}, tmp_path)
    assert tried == [4, 8, 12, 16, 20, 24, 26]
    same(result, expected, message=False)
    assert result.status == Status.BUDGET
    assert "could not be written" not in result.message  # later ones were
    assert files(tmp_path) == ["step-00000016.npz", "step-00000024.npz", "step-00000026.npz"]
    if not quiet:
        assert [w.category for w in caught] == [RuntimeWarning]
        assert "step 8" in str(caught[0].message)


def test_a_disk_that_stays_full(tmp_path, monkeypatch):
    expected = run({})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(RuntimeWarning, match="No space left") as caught:
            result = run({}, tmp_path)
    assert len(caught) == 1
    same(result, expected, message=False)
    assert files(tmp_path) == []
    same(run({}, tmp_path), expected)


def test_a_folder_that_vanishes(tmp_path):
    expected, path = run({}), tmp_path / "run"

    def remove(step, rows):
        if step == 10:
            path.rename(tmp_path / "moved")  # at once: a file may be on its way into it

    with pytest.warns(RuntimeWarning, match="could not be written") as caught:
        result = run({}, path, callbacks=remove)
    assert len(caught) == 1
    same(result, expected, message=False)
    assert "The checkpoint of step 26 could not be written" in result.message
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_a_folder_that_becomes_read_only(tmp_path):
    def lock(step, rows):
        tmp_path.chmod(0o500 if step == 10 else 0o700)

    try:
        with pytest.warns(RuntimeWarning, match="Permission denied") as caught:
            result = run({}, tmp_path, callbacks=lock)
    finally:
        tmp_path.chmod(0o700)
    assert len(caught) == 1
    same(result, run({}), message=False)
    assert files(tmp_path)[-1] == "step-00000026.npz"


def test_a_damaged_file_costs_some_steps(tmp_path):
    expected = run({})
    run({}, tmp_path, CUT)
    newest = tmp_path / f"step-{CUT:08}.npz"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(RuntimeWarning, match="going on from step 12"):
        result = run({}, tmp_path)
    same(result, expected)
    assert f"damaged-step-{CUT:08}.npz" in files(tmp_path)


# --- Killed processes ------------------------------------------------------------------------------------

# A few of what `python -m benchmarks kills` does a hundred times.
KILLED = (
    ("float64", "whole", "single"),
    ("float64", "minibatches", "single"),
    ("float32", "whole", "population"),
)


@pytest.mark.parametrize(("kind", "delay"), list(zip(KILLED, (0, 7, 12), strict=True)), ids=lambda x: str(x))
def test_killed_processes(tmp_path, kind, delay):
    """SIGKILL some milliseconds after the first checkpoint is there."""
    path, steps = tmp_path / "run", 60
    kills.start(kind, steps, tmp_path / "alone", None)
    marks = kills.start(kind, steps, tmp_path / "killed", path, lambda: _killed_after(path, delay))[0]
    assert not marks.endswith("e")
    assert files(path)
    marks = kills.start(kind, steps, tmp_path / "killed", path)[0]
    resumed = kills.resumed(marks)
    assert 5 <= resumed < steps
    assert kills.differences(tmp_path / "alone", tmp_path / "killed") == []


def _killed_after(path, delay):
    deadline = time.perf_counter() + 60
    while time.perf_counter() < deadline and not any(path.glob("step-*.npz")):
        time.sleep(5e-4)
    time.sleep(delay / 1000)
