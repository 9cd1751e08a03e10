"""Sources: which rows batches hold, how they are shuffled, and what a draw hands out."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import bilevel
from bilevel.data import Whole, as_arrays, as_source, draw, is_iterable, permute, rows

KEY = jax.random.key(7)
SIZES = [(1, 1), (5, 2), (255, 50), (256, 64), (257, 32), (1000, 7), (4097, 128)]


def numbered(n, batch_size):
    """Minibatches of row numbers, so that a batch is the rows it holds."""
    return bilevel.minibatches({"i": jnp.arange(n), "x": 2.0 * jnp.arange(n)[:, None]}, batch_size)


@jax.jit
def indices(source, key, t):
    return jax.vmap(source.index, in_axes=(None, 0))(key, t)


def epoch_of(source, epoch, key=KEY):
    """The row numbers of an epoch, one batch a row."""
    t = epoch * source.num_batches + jnp.arange(source.num_batches)
    return np.asarray(indices(source, key, t))


# --- Minibatches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_an_epoch_visits_each_row_once(n, batch_size):
    source = numbered(n, batch_size)
    assert source.num_batches == n // batch_size
    epochs = [epoch_of(source, epoch) for epoch in (0, 1, 12)]
    for visited in map(np.ravel, epochs):
        assert visited.min() >= 0
        assert visited.max() < n
        assert len(visited) == len(set(visited.tolist())) == n - n % batch_size
    others = [epoch_of(source, epoch, jax.random.key(8)) for epoch in (0, 1, 12)]
    if n > 1:
        assert not any(np.array_equal(a, b) for a, b in itertools.combinations(epochs + others, 2))


def test_no_row_is_left_out_for_good():
    """The dropped tail changes: in 40 epochs a row of five is dropped every time once in 5^39."""
    source = numbered(5, 2)
    seen = [set(epoch_of(source, epoch).ravel().tolist()) for epoch in range(40)]
    assert set.union(*seen) == set(range(5))
    assert set.intersection(*seen) == set()


@pytest.mark.parametrize(("n", "batch_size"), [(5, 2), (257, 32)])
def test_a_batch_is_a_function_of_key_and_position(n, batch_size):
    source = numbered(n, batch_size)
    positions = jnp.array([1, source.num_batches, 12345])
    rows_of = indices(source, KEY, positions)
    expected = {"i": rows_of, "x": 2.0 * rows_of[:, :, None]}
    _, scanned = jax.lax.scan(lambda _, t: (None, source.batch(KEY, t)), None, positions)
    vmapped = jax.jit(jax.vmap(source.batch, in_axes=(None, 0)))(KEY, positions)
    jax.tree.map(np.testing.assert_array_equal, scanned, expected)
    jax.tree.map(np.testing.assert_array_equal, vmapped, expected)
    for k in (0, 2):
        last = jax.tree.map(lambda x, k=k: x[k], expected)
        jax.tree.map(np.testing.assert_array_equal, source.batch(KEY, int(positions[k])), last)


def test_whole_of_minibatches_is_all_rows():
    source = numbered(5, 2)
    np.testing.assert_array_equal(source.whole(KEY)["i"], np.arange(5))
    assert repr(source) == "minibatches(5 rows, batch_size=2)"


# --- The shuffle -----------------------------------------------------------------------------------------


shuffled = jax.jit(permute, static_argnums=2)


def is_permutation(values, n):
    return np.array_equal(np.sort(np.asarray(values)), np.arange(n))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(n=st.integers(1, 20_000), seed=st.integers(0, 2**32 - 1))
def test_permute_is_a_bijection(n, seed):
    assert is_permutation(shuffled(jax.random.key(seed), jnp.arange(n), n), n)


@pytest.mark.parametrize("n", [1, 2, 256, 257, 512, 513, 1_000_003])
def test_permute_is_a_bijection_at(n):
    values = shuffled(KEY, jnp.arange(n), n)
    assert is_permutation(values, n)
    some = jnp.array([n - 1, 0, n // 2, 0])
    np.testing.assert_array_equal(shuffled(KEY, some, n), values[some])


LEVEL = 1e-6  # of each test below; seeds are fixed


@pytest.fixture(scope="module")
def shuffles():
    """Many shuffles of 300 rows, one a row."""
    keys = jax.random.split(jax.random.key(2024), 6000)
    return np.asarray(jax.jit(jax.vmap(lambda key: permute(key, jnp.arange(300), 300)))(keys))


def test_positions_are_uniform(shuffles):
    count, n = shuffles.shape
    table = np.zeros((n, n))
    np.add.at(table, (np.broadcast_to(np.arange(n), shuffles.shape), shuffles), 1)
    assert set(table.sum(0)) == set(table.sum(1)) == {count}
    squares = (table - count / n) ** 2 / (count / n)
    # A row of the table is multinomial; all of it has variance-one sums after the factor (n - 1) / n.
    per_position = stats.chi2(n - 1)
    assert squares.sum(1).max() < per_position.isf(LEVEL / n)
    assert squares.sum(1).min() > per_position.ppf(LEVEL / n)
    whole = stats.chi2((n - 1) ** 2)
    assert whole.ppf(LEVEL) < squares.sum() * (n - 1) / n < whole.isf(LEVEL)


def test_adjacent_pairs_are_uniform(shuffles):
    """Where two neighbours go, in blocks of ten rows; neighbours differ in the lowest bits only."""
    count, n = shuffles.shape
    blocks, width = 30, 10
    share = np.full((blocks, blocks), width * width / (n * (n - 1)))
    share[np.diag_indices(blocks)] = width * (width - 1) / (n * (n - 1))
    assert share.sum() == pytest.approx(1, rel=1e-12)
    pairs = [(i, i + 1) for i in (0, 1, 127, 128, 255, 256, 298)] + [(0, 256), (3, 259), (0, 16)]
    statistic = stats.chi2(blocks**2 - 1)
    for a, b in pairs:
        table = np.zeros((blocks, blocks))
        np.add.at(table, (shuffles[:, a] // width, shuffles[:, b] // width), 1)
        square = ((table - count * share) ** 2 / (count * share)).sum()
        assert statistic.ppf(LEVEL) < square < statistic.isf(LEVEL)


def test_steps_between_neighbours_are_uniform(shuffles):
    """``values[i + 1] - values[i]`` modulo n takes its n - 1 values equally often, pooled over i."""
    count, n = shuffles.shape
    steps = np.bincount((np.diff(shuffles, axis=1) % n).ravel()[::2], minlength=n)
    assert steps[0] == 0
    expected = steps.sum() / (n - 1)
    square = ((steps[1:] - expected) ** 2 / expected).sum()
    statistic = stats.chi2(n - 2)
    assert statistic.ppf(LEVEL) < square < statistic.isf(LEVEL)


def test_shuffles_of_an_epoch_do_not_depend_on_those_before():
    """The same row in two epochs in a row, over many runs: no correlation of where it goes."""
    n, runs = 300, 2000
    source = numbered(n, 1)
    keys = jax.random.split(jax.random.key(5), runs)
    at = jnp.array([0, n])
    first, second = np.asarray(jax.vmap(indices, in_axes=(None, 0, None))(source, keys, at))[:, :, 0].T
    table = np.zeros((10, 10))
    np.add.at(table, (first // 30, second // 30), 1)
    square = ((table - runs / 100) ** 2 / (runs / 100)).sum()
    assert stats.chi2(99).ppf(LEVEL) < square < stats.chi2(99).isf(LEVEL)


# --- Draws ------------------------------------------------------------------------------------------------


def test_draw_from_minibatches():
    source, steps = numbered(100, 10), 4
    for position in (0, 4, 8):  # the last one goes over the end of an epoch
        drawn = draw(source, KEY, position, steps)
        assert drawn.steps == steps
        assert drawn.sampled
        batches = [np.asarray(drawn(j)["i"]) for j in range(2 * steps)]
        for j in range(steps):
            np.testing.assert_array_equal(batches[j], source.index(KEY, position + j))
        np.testing.assert_array_equal(drawn.last["i"], batches[steps - 1])
        sets = [frozenset(batch.tolist()) for batch in batches]
        assert len(set(sets)) == 2 * steps


def test_fresh_batches_are_independent():
    """Two of them share as many rows as two random subsets do, and are the same as rarely."""
    source, runs = numbered(20, 5), 4000

    def pair(count):
        drawn = draw(source, KEY, 0, 2, count)
        return drawn(2)["i"], drawn(3)["i"]

    one, other = jax.vmap(pair)(jnp.arange(runs))
    shared = np.asarray((one[:, :, None] == other[:, None, :]).sum((1, 2)))
    law = stats.hypergeom(20, 5, 5)
    assert abs(shared.mean() - law.mean()) < stats.norm.isf(LEVEL) * law.std() / np.sqrt(runs)


@pytest.mark.parametrize("steps", [1, 3])
def test_fresh_batches_of_a_fixed_source_are_among_its_batches(steps):
    source = bilevel.minibatches({"i": jnp.arange(300)}, 50, fixed=True)
    fixed = [tuple(np.asarray(source.numbered(KEY, i)["i"]).tolist()) for i in range(6)]
    assert len({row for batch in fixed for row in batch}) == 300
    counts = dict.fromkeys(fixed, 0)
    for count in range(20):
        for j in range(steps, steps + 3):
            counts[tuple(np.asarray(draw(source, KEY, 0, steps, count)(j)["i"]).tolist())] += 1
    assert min(counts.values()) > 0
    own = [tuple(np.asarray(source.batch(KEY, t)["i"]).tolist()) for t in range(6)]
    assert set(own) == set(fixed)


def test_fresh_batches_are_those_of_no_other_step():
    source, steps = numbered(100, 10), 2
    fresh = [
        frozenset(np.asarray(draw(source, KEY, position, steps, position)(j)["i"]).tolist())
        for position in (0, 2, 4, 10, 12)
        for j in (2, 3, 4)
    ]
    own = [frozenset(np.asarray(source.index(KEY, t)).tolist()) for t in range(14)]
    assert len({*fresh, *own}) == len(fresh) + len(own)


SOURCES = {
    "whole": Whole({"i": jnp.arange(6)}),
    "minibatches": bilevel.minibatches({"i": jnp.arange(6)}, 2),
    "stacked": bilevel.stacked({"i": jnp.arange(6).reshape(3, 2)}),
}
SOURCES.update({f"{name} with keys": bilevel.with_rng(source) for name, source in list(SOURCES.items())})


def plain(batch):
    """Keys as numbers, so that batches compare."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, batch
    )


def same(a, b):
    pairs = zip(jax.tree.leaves(plain(a)), jax.tree.leaves(plain(b)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", SOURCES)
def test_draws_are_traceable(name):
    source = SOURCES[name]
    j = jnp.arange(6)

    def drawn(source, key, position, j):
        return plain(draw(source, key, position, 3)(j))

    traced = jax.jit(jax.vmap(drawn, in_axes=(None, None, None, 0)))(source, KEY, 3, j)
    for k in j:
        eager = draw(source, KEY, 3, 3)(int(k))
        assert same(jax.tree.map(lambda x, k=k: x[k], traced), eager)


@pytest.mark.parametrize("name", ["whole", "stacked", "whole with keys", "stacked with keys"])
def test_beyond_the_own_batches_is_the_last_again(name):
    drawn = draw(SOURCES[name], KEY, 3, 3)
    assert not drawn.sampled
    for j in (3, 4, 100):
        assert same(drawn(j), drawn.last)


def test_stacked_gives_each_step_its_own():
    for position in (0, 3, 300):
        drawn = draw(SOURCES["stacked"], KEY, position, 3)
        assert [drawn(j)["i"].tolist() for j in range(3)] == [[0, 1], [2, 3], [4, 5]]
    source = SOURCES["stacked"]
    assert source.num_batches == 3
    assert source.batch(KEY, 99)["i"].tolist() == [4, 5]
    assert [int(source.index(KEY, t)[0]) for t in (0, 2, 99)] == [0, 2, 2]


def test_whole_gives_all_at_every_step():
    drawn = draw(SOURCES["whole"], KEY, 5, 3)
    assert [drawn(j)["i"].tolist() for j in (0, 2, 7)] == [list(range(6))] * 3
    assert SOURCES["whole"].index(KEY, 4).tolist() == list(range(6))
    assert SOURCES["whole"].num_batches == 1


@pytest.mark.parametrize("name", ["whole", "minibatches", "stacked"])
def test_keys_of_with_rng(name):
    """Another key at every inner step and every outer step, the same one for the same batch."""
    source, steps = SOURCES[f"{name} with keys"], 3
    draws = [draw(source, KEY, steps * count, steps, count) for count in range(3)]
    keys = [tuple(np.asarray(jax.random.key_data(d(j)[1])).tolist()) for d in draws for j in range(steps)]
    assert len(set(keys)) == 9
    again = draw(source, KEY, 3, steps, 1)
    for j in range(steps):
        assert same(draws[1](j), again(j))
        assert same(draws[1](j)[0], draw(SOURCES[name], KEY, 3, steps, 1)(j))
        assert draws[1](j)[1].shape == ()


def test_a_step_that_takes_no_batches_draws_fresh_ones():
    source, steps = numbered(100, 10), 2
    own = [frozenset(np.asarray(source.index(KEY, t)).tolist()) for t in range(20)]
    skipped = [draw(source, KEY, 4, steps, count, own=jnp.bool_(False)) for count in (3, 4)]
    drawn = [frozenset(np.asarray(d(j)["i"]).tolist()) for d in skipped for j in range(3)]
    assert len({*own, *drawn}) == 26
    taken = draw(source, KEY, 4, steps, 3, own=jnp.bool_(True))
    assert frozenset(np.asarray(taken(1)["i"]).tolist()) == own[5]


def test_keys_of_fresh_batches_are_new():
    drawn = draw(SOURCES["minibatches with keys"], KEY, 3, 3)
    keys = [tuple(np.asarray(jax.random.key_data(drawn(j)[1])).tolist()) for j in range(9)]
    assert len(set(keys)) == 9


def test_with_rng_passes_on_what_it_wraps():
    source, wrapped = SOURCES["minibatches"], SOURCES["minibatches with keys"]
    assert (wrapped.num_batches, wrapped.sampled, wrapped.restarts) == (3, True, False)
    np.testing.assert_array_equal(wrapped.index(KEY, 4), source.index(KEY, 4))
    arrays, key = wrapped.whole(KEY)
    np.testing.assert_array_equal(arrays["i"], np.arange(6))
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert SOURCES["stacked with keys"].restarts
    assert not SOURCES["whole with keys"].sampled
    np.testing.assert_array_equal(bilevel.with_rng(np.arange(3.0)).batch(KEY, 0)[0], np.arange(3.0))


# --- Pytrees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_pytrees(name):
    source = SOURCES[name]
    leaves, treedef = jax.tree.flatten(source)
    again = jax.tree.unflatten(treedef, leaves)
    through = jax.jit(lambda source: source)(source)
    for other in (again, through, jax.tree.map(lambda x: x, source)):
        assert type(other) is type(source)
        assert jax.tree.structure(other) == treedef
        assert other.num_batches == source.num_batches
        assert same(other.batch(KEY, 1), source.batch(KEY, 1))
    assert [leaf.size for leaf in leaves] == [6]
    assert as_source(source, "train") is source


def test_settings_of_a_source_are_its_structure():
    arrays = jnp.arange(6.0)
    two, three = (bilevel.minibatches(arrays, size) for size in (2, 3))
    assert jax.tree.structure(two) != jax.tree.structure(three)
    assert jax.tree.structure(two) == jax.tree.structure(bilevel.minibatches(arrays + 1, 2))


# --- Arrays and iterables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (np.arange(3), np.int64),
        (np.arange(3, dtype=np.uint8), np.uint8),
        (np.array([True, False]), np.bool_),
        (np.arange(3, dtype=np.float32), np.float32),
        (np.arange(3).astype(ml_dtypes.bfloat16), jnp.bfloat16),
        (np.arange(3, dtype=np.float16), np.float16),
        (np.arange(3) + 1j, np.complex128),
        (jnp.arange(3, dtype=jnp.bfloat16), jnp.bfloat16),
        (1.5, np.float64),
        (2, np.int64),
        (True, np.bool_),
    ],
)
def test_arrays_keep_their_dtype(leaf, dtype):
    array = as_arrays({"x": leaf}, "train")["x"]
    assert isinstance(array, jax.Array)
    assert array.dtype == dtype
    np.testing.assert_array_equal(np.asarray(array), np.asarray(leaf))


def test_keys_are_data():
    keys = jax.random.split(KEY, 4)
    source = bilevel.minibatches({"key": keys, "i": jnp.arange(4)}, 2)
    batch = source.batch(KEY, 0)
    assert same(batch["key"], keys[batch["i"]])


def test_lists_are_pytrees_of_numbers():
    assert [x.shape for x in as_arrays([1.0, 2.0, np.zeros(2)], "train")] == [(), (), (2,)]
    assert as_arrays((1.0, None), "train")[1] is None


@pytest.mark.parametrize(
    "leaf",
    [
        np.array(["a"]),
        np.array([None]),
        np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        "text",
        b"bytes",
        object(),
    ],
    ids=["text", "objects", "records", "dates", "str", "bytes", "object"],
)
def test_what_is_no_array(leaf):
    with pytest.raises(TypeError, match=r"^train\['x'\] must be numeric, got "):
        as_arrays({"x": leaf}, "train")


class Loader:
    """As data loaders of other libraries are."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([np.zeros(2), np.ones(2)])


class OldLoader:
    """Iterable by number only."""

    def __getitem__(self, i):
        if i > 1:
            raise IndexError
        return np.full(2, float(i))


@pytest.mark.parametrize(
    "data",
    [(x for x in [np.zeros(2)]), iter([np.zeros(2)]), map(float, [1, 2]), Loader(), OldLoader(), range(3)],
    ids=["generator", "iterator", "map", "loader", "old loader", "range"],
)
def test_iterables(data):
    assert is_iterable(data)
    with pytest.raises(TypeError, match=r"^train is a Python iterable \("):
        as_source(data, "train")


@pytest.mark.parametrize(
    "data",
    [
        [np.zeros(2), np.ones(3)],
        (np.zeros(2),),
        {"x": np.zeros(2)},
        [],
        {},
        None,
        np.zeros(2),
        np.float32(1),
        jnp.zeros(2),
        1.0,
        "text",
        b"bytes",
        SOURCES["minibatches"],
        SOURCES["stacked with keys"],
    ],
    ids=[
        "list", "tuple", "dict", "no list", "no dict", "None", "numpy", "scalar", "jax", "float", "str",
        "bytes", "minibatches", "stacked",
    ],
)  # fmt: skip
def test_pytrees_are_no_iterables(data):
    assert not is_iterable(data)


def test_rows_are_the_longest_leading_axis():
    assert rows({"x": jnp.zeros((4, 2)), "w": jnp.zeros(3), "s": jnp.zeros(())}) == 4
    assert rows({"s": jnp.zeros(())}) == 1


def test_minibatches_print_their_settings():
    plain = bilevel.minibatches(np.arange(60.0), 6)
    assert repr(plain) == "minibatches(60 rows, batch_size=6)"
    assert repr(bilevel.minibatches(np.arange(60.0), 6, strata=2, fixed=np.bool_(True))) == (
        "minibatches(60 rows, batch_size=6, strata=2, fixed=True)"
    )
