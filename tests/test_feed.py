"""Python iterables as data: order, ends, failures, bad batches, chunks and threads."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.data import Stacked
from bilevel.feed import Feed

INNER_STEPS = 2


def inner_loss(params, hparams, batch):
    return 0.5 * jnp.mean((params - hparams["scale"] * batch["x"]) ** 2)


def outer_loss(params, hparams, batch):
    return 0.5 * jnp.mean((params - batch["x"]) ** 2)


PROBLEM = bilevel.Problem(inner_loss, outer_loss)
METHOD = bilevel.alternating(
    bilevel.implicit(bilevel.cg(max_steps=2)),
    inner=optax.sgd(0.3),
    outer=optax.sgd(0.1),
    inner_steps=INNER_STEPS,
)
KEY = jax.random.key(3)
PARAMS, HPARAMS = 0.5, {"scale": 0.7}
VALID = {"x": np.array([1.0, 2.0, 3.0])}


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(1.0, 0.1, size=4)} for _ in range(count)]


def run(train, valid=VALID, steps=100, **changes):
    settings = {"key": KEY, "progress": False, **changes}
    return bilevel.optimize(PROBLEM, PARAMS, HPARAMS, train, valid, METHOD, steps, **settings)


jitted_step = jax.jit(lambda state, train, valid: METHOD.step(PROBLEM, state, train, valid))


def by_hand(train, valid):
    """Params, hparams and values of a loop over the method's step; ``valid`` has a batch for each step."""
    stack = [
        bilevel.stacked(jax.tree.map(lambda *xs: np.stack(xs), *train[i : i + INNER_STEPS]))
        for i in range(0, len(train), INNER_STEPS)
    ]
    state = METHOD.init(PROBLEM, PARAMS, HPARAMS, stack[0], valid[0], key=KEY)
    values = []
    for source, valid_batch in zip(stack, valid, strict=True):
        state, info = jitted_step(state, source, jax.tree.map(jnp.asarray, valid_batch))
        values.append(float(info.value))
    return float(state.params), float(state.hparams["scale"]), values


def close(values):
    """Two programs for the same steps agree to rounding, which compilers are free to choose."""
    return pytest.approx(values, rel=1e-13, abs=0)


def agrees(result, train, valid):
    params, scale, values = by_hand(train, valid)
    assert float(result.params) == close(params)
    assert float(result.hparams["scale"]) == close(scale)
    assert result.history["value"].tolist() == close(values)


def same_history(a, b):
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds"}:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


# --- Order ---------------------------------------------------------------------------------------------


class Loader:
    """As data loaders of other libraries are: a fresh iterator for each pass."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def __iter__(self):
        return iter(self.items)


KINDS_OF_ITERABLES = {
    "generator": lambda items: (item for item in items),
    "iterator": iter,
    "loader": Loader,
    "jax arrays": lambda items: (jax.tree.map(jnp.asarray, item) for item in items),
}


@pytest.mark.parametrize("kind", KINDS_OF_ITERABLES)
def test_training_batches_come_in_order(kind):
    """The first batch, taken for its shapes, is the first batch of the first step."""
    train = batches(12)
    result = run(KINDS_OF_ITERABLES[kind](train), steps=6)
    assert result.status == bilevel.Status.BUDGET
    assert len(result.history["step"]) == 6
    agrees(result, train, [VALID] * 6)


@pytest.mark.parametrize("kind", KINDS_OF_ITERABLES)
def test_validation_batches_come_in_order(kind):
    train, valid = batches(12), batches(6, seed=1)
    result = run(iter(train), KINDS_OF_ITERABLES[kind](valid), steps=6)
    agrees(result, train, valid)


def test_validation_alone_may_be_an_iterable():
    train, valid = batches(1)[0], batches(6, seed=1)
    result = run(train, iter(valid), steps=6)
    repeated = [train] * INNER_STEPS * 6
    params, scale, values = by_hand(repeated, valid)
    np.testing.assert_allclose(result.history["value"], values, rtol=1e-14)
    np.testing.assert_allclose([result.params, result.hparams["scale"]], [params, scale], rtol=1e-14)


def keyed_inner_loss(params, hparams, batch):
    arrays, key = batch
    return inner_loss(params, hparams, arrays) + 0 * jax.random.uniform(key)


def test_batches_may_hold_keys():
    train = batches(6)
    keyed = ((batch, jax.random.key(i)) for i, batch in enumerate(train))
    problem = bilevel.Problem(keyed_inner_loss, outer_loss)
    result = bilevel.optimize(problem, PARAMS, HPARAMS, keyed, VALID, METHOD, 3, KEY, progress=False)
    agrees(result, train, [VALID] * 3)


def test_best_of_validation_batches_is_the_last():
    result = run(iter(batches(12)), iter(batches(6, seed=1)), steps=6)
    assert result.best.step == 5
    assert result.best.value == result.history["value"][-1]
    assert result.best.hparams == result.hparams


def test_training_batches_keep_a_best():
    result = run(iter(batches(12)), steps=6)
    assert result.best.step == int(np.argmin(result.history["value"]))
    assert result.best.value == result.history["value"].min()


def test_no_more_is_taken_than_fetched_ahead():
    taken = itertools.count()
    last = 0

    def endless():
        nonlocal last
        for batch in itertools.cycle(batches(4)):
            last = next(taken)
            yield batch

    run(endless(), steps=3)
    assert 3 * INNER_STEPS - 1 <= last <= 3 * INNER_STEPS + 70


# --- Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 7, 12, 45])
def test_training_data_dries_up(count):
    """Also in the middle of an outer step, whose first batches are then unused."""
    train = batches(count)
    steps = count // INNER_STEPS
    result = run(batch for batch in train)
    assert result.status == bilevel.Status.DATA_EXHAUSTED
    assert f"train ended after {count} batches" in result.message
    assert result.history["step"].tolist() == list(range(steps))
    assert np.all(result.history["accepted"])
    agrees(result, train[: steps * INNER_STEPS], [VALID] * steps)


def test_validation_data_dries_up():
    train, valid = batches(40), batches(5, seed=1)
    result = run(iter(train), iter(valid))
    assert result.status == bilevel.Status.DATA_EXHAUSTED
    assert "valid ended after 5 batches" in result.message
    agrees(result, train[:10], valid)


def test_less_than_one_step():
    result = run(iter(batches(1)))
    assert result.status == bilevel.Status.DATA_EXHAUSTED
    assert len(result.history["value"]) == 0
    assert result.history["accepted"].dtype == bool
    assert float(result.params) == PARAMS
    assert float(result.hparams["scale"]) == HPARAMS["scale"]
    assert "DATA_EXHAUSTED after 0 outer steps" in repr(result)


@pytest.mark.parametrize(
    "odd",
    [{"x": np.ones(3)}, {"x": np.ones(4, np.float32)}, {"x": np.ones(4), "y": np.ones(4)}, [np.ones(4)]],
    ids=["shorter", "another dtype", "another part", "another structure"],
)
def test_a_batch_of_another_shape_ends_the_run(odd):
    train = batches(8)
    result = run(iter([*train, odd, *batches(8)]))
    assert result.status == bilevel.Status.DATA_EXHAUSTED
    for fragment in ("train", "other shapes", "after 8 batches", "float64[4]", "drop it"):
        assert fragment in result.message
    agrees(result, train, [VALID] * 4)


@pytest.mark.parametrize(("trains", "valids"), [(200, 7), (14, 100)], ids=["valid ends", "train ends"])
def test_data_that_last_longer_than_others_go_on_where_the_run_ended(trains, valids, tmp_path):
    train, valid = batches(40), batches(20, seed=1)
    folder = bilevel.checkpoints(tmp_path, every=50, reread=True)
    first = run(iter((train * 5)[:trains]), iter((valid * 5)[:valids]), checkpoint=folder)
    assert first.status == bilevel.Status.DATA_EXHAUSTED
    assert len(first.history["value"]) == 7
    assert [path.name for path in tmp_path.glob("*.npz")] == ["step-00000007.npz"]
    again = run(iter(train), iter(valid), steps=15, checkpoint=folder)
    whole = run(iter(train), iter(valid), steps=15)
    same_history(again.history, whole.history)
    assert again.params == whole.params


def test_what_a_chunk_did_not_use_comes_again():
    feed = Feed(({"x": np.full(3, k)} for k in range(11)), "train", 2, single=False)
    assert feed.chunk(0, 3, 4)[1] == 3
    fed, lasts = feed.chunk(2, 3, 4)  # two of the three steps were done
    assert fed.batches["x"][:, :, 0].tolist() == [[4, 5], [6, 7], [8, 9], [8, 9]]
    assert lasts == 3
    assert [feed.position(step)[0] for step in (2, 3, 4, 5)] == [4, 6, 8, 10]
    assert feed.chunk(3, 4, 4)[1] == 2
    assert feed.position(3)[0] == 6
    assert feed.why_ended is not None
    assert feed.chunk(5, 4, 4) == (None, 0)
    feed.close()


class LoaderError(Exception):
    pass


def failing(items):
    yield from items
    raise LoaderError("disk")


@pytest.mark.parametrize("steps", [1, 10])
def test_an_iterable_that_raises(steps):
    """The steps whose batches arrived are done and handed over."""
    train = batches(steps * INNER_STEPS + 1)
    with pytest.raises(LoaderError, match="disk") as caught:
        run(failing(train))
    partial = caught.value.partial_result
    assert partial.status == bilevel.Status.INTERRUPTED
    assert any("partial_result" in note for note in caught.value.__notes__)
    assert partial.history["step"].tolist() == list(range(steps))
    agrees(partial, train[: steps * INNER_STEPS], [VALID] * steps)


def test_an_iterable_that_raises_while_another_one_goes_on(tmp_path):
    train, folder = batches(40), bilevel.checkpoints(tmp_path, reread=True)
    with pytest.raises(LoaderError, match="disk") as caught:
        run(iter(train), failing([VALID] * 7), checkpoint=folder)
    agrees(caught.value.partial_result, train[:14], [VALID] * 7)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["step-00000007.npz"]


def test_an_iterable_that_raises_at_once():
    with pytest.raises(LoaderError, match="disk"):
        run(failing([]))


# --- Steps that are not finite ------------------------------------------------------------------------

BAD = {"x": np.array([1.0, np.nan, 1.0, 1.0])}


def test_a_bad_training_batch_is_rejected():
    """The run goes on as if the step had not been."""
    train = batches(16)
    spoiled = [*train[:9], BAD, *train[10:]]
    result = run(iter(spoiled), steps=8)
    assert result.status == bilevel.Status.BUDGET
    assert np.flatnonzero(~result.history["accepted"]).tolist() == [4]
    assert np.flatnonzero(result.history["nonfinite"]).tolist() == [4]
    assert np.isfinite(result.params)
    params, scale, values = by_hand(train[:8] + train[10:], [VALID] * 7)
    assert float(result.params) == close(params)
    assert float(result.hparams["scale"]) == close(scale)
    assert np.delete(result.history["value"], 4).tolist() == close(values)


@pytest.mark.parametrize("train", ["iterable", "whole"])
def test_a_bad_validation_batch_is_rejected(train):
    valid = [*batches(3, seed=1), BAD, *batches(4, seed=2)]
    result = run(iter(batches(16)) if train == "iterable" else batches(1)[0], iter(valid), steps=8)
    assert result.status == bilevel.Status.BUDGET
    assert np.flatnonzero(~result.history["accepted"]).tolist() == [3]
    assert np.isfinite(result.params)
    assert np.isfinite(result.hparams["scale"])


def test_bad_batches_now_and_then():
    """Two in a row are survived, again and again."""
    good = batches(2 * INNER_STEPS)
    result = run(iter((good + [BAD] * 2 * INNER_STEPS) * 3), steps=12)
    assert result.status == bilevel.Status.BUDGET
    assert result.history["accepted"].tolist() == [True, True, False, False] * 3


def test_three_bad_steps_in_a_row_diverge():
    train = batches(8)
    result = run(iter(train + [BAD] * 6 + batches(20)))
    assert result.status == bilevel.Status.DIVERGED
    assert result.history["accepted"].tolist() == [True] * 4 + [False] * 3
    params, scale, _ = by_hand(train, [VALID] * 4)
    assert float(result.params) == close(params)
    assert float(result.hparams["scale"]) == close(scale)
    assert "outer step 6" in result.message.lower()


def sudden_outer_loss(params, hparams, batch):
    """Not finite where the scale is above 0.75."""
    return outer_loss(params, hparams, batch) + 0 * jnp.log(0.75 - hparams["scale"])


@pytest.mark.parametrize(
    "train", [bilevel.stacked({"x": np.ones((INNER_STEPS, 4))}), {"x": np.ones(4)}], ids=["stacked", "whole"]
)
def test_a_step_that_would_only_repeat_itself_diverges_at_once(train):
    """Hyperparameters at which the step fails, and batches that are the same at every step."""
    sudden = bilevel.Problem(inner_loss, sudden_outer_loss)
    result = bilevel.optimize(sudden, PARAMS, HPARAMS, train, VALID, METHOD, 50, progress=False)
    assert result.status == bilevel.Status.DIVERGED
    assert result.history["accepted"][0]
    assert np.count_nonzero(~result.history["accepted"]) == 1


# --- Chunks and threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 3])
def test_results_do_not_depend_on_the_capacity_of_a_chunk(capacity, monkeypatch):
    train, valid = batches(43), batches(30, seed=1)
    train[20] = BAD
    whole = run(iter(train), iter(valid))
    monkeypatch.setattr("bilevel.feed._STEPS", capacity)
    chunked = run(iter(train), iter(valid))
    assert whole.status == chunked.status == bilevel.Status.DATA_EXHAUSTED
    assert whole.message == chunked.message
    same_history(whole.history, chunked.history)
    assert len(whole.history["value"]) == 21
    for name in ("params", "hparams"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, name), getattr(chunked, name))
    jax.tree.map(np.testing.assert_array_equal, whole.trajectory.hparams, chunked.trajectory.hparams)


def endless(item):
    while True:
        yield item


def a_run_that_ends():
    run(iter(batches(7)), iter(batches(7)))


def a_run_with_more_data():
    run(endless(batches(1)[0]), endless(batches(1)[0]), steps=2)


def a_run_that_raises():
    with pytest.raises(LoaderError):
        run(failing(batches(3)), endless(VALID))


def a_refused_problem():
    with pytest.raises(ValueError, match="failed on what it was given"):
        run(endless({"y": np.ones(4)}), endless(VALID))


def a_refused_batch():
    with pytest.raises(TypeError, match=r"train\[0\].* must be numeric"):
        run(endless({"x": "text"}))


def a_refused_validation_batch():
    with pytest.raises(TypeError, match=r"valid\[0\].* must be numeric"):
        run(endless(batches(1)[0]), endless({"x": "text"}))


@pytest.mark.parametrize(
    "used",
    [
        a_run_that_ends,
        a_run_with_more_data,
        a_run_that_raises,
        a_refused_problem,
        a_refused_batch,
        a_refused_validation_batch,
    ],
    ids=lambda used: used.__name__,
)
def test_threads_end(used):
    before = set(threading.enumerate())
    used()
    deadline = time.monotonic() + 3
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def test_the_stack_of_a_step_is_a_source():
    """What the driver hands to the method for an iterable: a stack that is another one at every step."""
    source = Stacked({"x": jnp.ones((2, 4))}, renewed=True)
    assert source.restarts
    assert not source.sampled
    assert jax.tree.structure(source) != jax.tree.structure(bilevel.stacked({"x": jnp.ones((2, 4))}))
