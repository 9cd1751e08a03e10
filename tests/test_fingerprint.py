"""Digests of programs and arrays: the same where the numbers are the same, in every process, else not."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bilevel import fingerprint

X, KEY = np.linspace(0.5, 1.5, 3), jax.random.key(0)

# --- Programs ----------------------------------------------------------------------------------------------


def jitted(x, key, factor=2.0):
    return jax.jit(lambda y: jnp.sin(y) * factor)(x)


def while_loop(x, key, bound=3):
    return jax.lax.while_loop(lambda c: c[0] < bound, lambda c: (c[0] + 1, c[1] * 2), (0, x))


def cond(x, key, sign=-1.0):
    return jax.lax.cond(x.sum() > 0, lambda v: v, lambda v: sign * v, x)


def scan(x, key, length=4):
    return jax.lax.scan(lambda c, t: (c * t, c), x, jnp.arange(float(length)))


def custom_jvp(x, key, smoothing=0.1):
    def loss(x):
        labels = optax.smooth_labels(jnp.eye(3)[:1], smoothing)
        return optax.softmax_cross_entropy(jax.nn.relu(x)[None], labels).sum()

    return jax.nn.relu(x), jax.grad(loss)(x)


def custom_vjp(x, key, rule=2.0):
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, t: (rule * x * t,))
    return square(x), jax.grad(lambda x: square(x).sum())(x)


def random(x, key, seed=1):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 3)) + jax.random.normal(key, x.shape)


def adam(x, key, rate=0.1):
    optimizer = optax.adam(rate)
    return optimizer.update(x, optimizer.init(x), x)


def adam_schedule(x, key, rate=0.1):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, 10))
    return optimizer.update(x, optimizer.init(x), x)


def constant(x, key, last=2.0):
    return x + np.array([1.0, 1.5, last])


def key_constant(x, key, seed=5):
    return jax.random.normal(jax.random.key(seed)) + x


def solve(x, key, diagonal=2.0):
    matrix = jnp.eye(3) * diagonal
    return jnp.linalg.solve(matrix, x), jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, x)[0]


def callback(x, key, called=np.sin):
    return jax.pure_callback(called, x, x)


def gather(x, key, row=1):
    return x[jnp.array([0, row])], jnp.sort(x), x.at[row].add(1.0)


def cast(x, key, dtype=jnp.float32):
    return x.astype(dtype).astype(x.dtype)


# Each program, and the setting inside it that makes it another one.
PROGRAMS = {
    jitted: {"factor": np.nextafter(2.0, 3.0)},
    while_loop: {"bound": 4},
    cond: {"sign": 1.0},
    scan: {"length": 5},
    custom_jvp: {"smoothing": 0.2},
    custom_vjp: {"rule": 3.0},
    random: {"seed": 2},
    adam: {"rate": 0.2},
    adam_schedule: {"rate": 0.2},
    constant: {"last": np.nextafter(2.0, 3.0)},
    key_constant: {"seed": 6},
    solve: {"diagonal": 3.0},
    callback: {"called": np.cos},
    gather: {"row": 2},
    cast: {"dtype": jnp.bfloat16},
}
each_program = pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)


def digest(fn, *args, **settings):
    args = args or (X, KEY)
    return fingerprint.program(jax.make_jaxpr(lambda *args: fn(*args, **settings))(*args))


def all_digests():
    return {fn.__name__: digest(fn) for fn in PROGRAMS}


@each_program
def test_a_program_traced_again_is_the_same(fn):
    first = digest(fn)
    assert len(first) == 64
    assert digest(fn) == first
    jax.clear_caches()
    assert digest(fn) == first


@each_program
def test_a_setting_inside_makes_another_program(fn):
    assert digest(fn, **PROGRAMS[fn]) != digest(fn)


def test_programs_are_told_apart():
    digests = all_digests()
    assert len(set(digests.values())) == len(PROGRAMS)


def test_other_processes_see_the_same_programs():
    """With other hash seeds, other addresses, and other programs traced before."""
    code = (
        "import conftest, jax\n"
        "jax.make_jaxpr(lambda x: jax.nn.relu(x) + jax.random.normal(jax.random.key(1)))(1.0)\n"
        "import test_fingerprint as here\n"
        "for name, digest in reversed(here.all_digests().items()): print(name, digest)"
    )
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder.parent), str(folder)])
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert dict(line.split() for line in done.stdout.splitlines()) == all_digests()


def test_shapes_and_dtypes_make_another_program():
    digests = {
        digest(jitted, x, KEY) for x in (X, np.ones(4), np.ones((3, 1)), X.astype(np.float32), np.arange(3))
    }
    assert len(digests) == 5


def test_the_order_of_arguments_matters():
    assert digest(lambda x, y: x - y, X, X) != digest(lambda x, y: y - x, X, X)
    assert digest(lambda x, y: (x, y), X, X) != digest(lambda x, y: (y, x), X, X)


def test_bits_of_literals_matter():
    digests = [digest(lambda x, c=c: x + c, X) for c in (0.0, -0.0, 1e-300, np.inf, np.nan)]
    assert len(set(digests)) == 5


def test_names_do_not_matter():
    def one(x):
        return jnp.sin(x) + 1

    def two(renamed):
        return jnp.sin(renamed) + 1

    assert digest(jax.jit(one), X) == digest(jax.jit(two), X)


def test_placement_does_not_matter():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = np.ones((4, 3))
    digests = {
        digest(jitted, jax.device_put(rows, NamedSharding(mesh, PartitionSpec(*spec))), KEY)
        for spec in ((), ("data",))
    }
    assert digests == {digest(jitted, rows, KEY)}
    pinned = jax.jit(lambda x: jnp.sin(x), in_shardings=NamedSharding(mesh, PartitionSpec("data")))
    assert digest(pinned, rows) == digest(jax.jit(lambda x: jnp.sin(x)), rows)


def test_the_kind_of_random_bits_matters():
    first = digest(random)
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        assert digest(random) != first


def test_shared_parts_are_walked_once():
    """A program that calls one function twice at each of 40 levels has 2^40 calls."""

    def nested(levels):
        def call(x):
            fn = nested(levels - 1)
            return fn(x) + fn(x)

        return jax.jit(call if levels else jnp.sin)

    assert digest(nested(40), X) != digest(nested(39), X)


def test_settings_of_other_kinds():
    """Values as they occur in settings of operations; each has a text of its own."""

    def named():
        pass

    values = [
        None, True, False, 1, 1.0, 1j, "1", b"1", "0x1", "0x2", (1,), [1], (1, 2), ((1,), 2), {1}, {"a": 1},
        {"a": 2}, np.float32(1), np.ones(2), np.ones(2, np.int32), jnp.zeros(2), np.dtype("f4"), np.float32,
        named, test_names_do_not_matter, jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST,
        jax.ShapeDtypeStruct((2,), np.float32), float("nan"), 0.0, -0.0, PartitionSpec("a"), np.sin,
    ]  # fmt: skip
    texts = [fingerprint._value(value, {}) for value in values]
    assert len(set(texts)) == len(values)
    assert texts == [fingerprint._value(value, {}) for value in values]
    assert not any(" at 0x" in text for text in texts)
    partial = jax.tree_util.Partial
    assert fingerprint._value(partial(named, 1), {}) != fingerprint._value(partial(named, 2), {})
    assert fingerprint._value(object(), {}) == fingerprint._value(object(), {})
    assert fingerprint._value({"a", "b", "c"}, {}) == fingerprint._value({"c", "b", "a"}, {})


# --- Arrays ------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def checksum(words):
    """The formula, one number after the other."""
    total = 0
    for i, word in enumerate(words):
        x = (word + i * 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in MIX:
            x = (x ^ x >> shift) * factor % 2**64
        total += x
    return total % 2**64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (20_011,)], ids=str)
def test_checksums_follow_the_formula(dtype, shape):
    array = RNG.integers(np.iinfo(dtype).max, size=shape, dtype=dtype)
    array = np.asarray(array, dtype)
    assert fingerprint._checksum(array) == checksum(array.ravel().tolist())


DTYPES = [np.bool_, np.int8, np.uint16, np.float16, ml_dtypes.bfloat16, np.float32, np.int64, np.float64,
          np.complex64, np.complex128]  # fmt: skip


def filled(shape, dtype):
    bits = RNG.integers(256, size=(*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    bits = bits % 2 if dtype is np.bool_ else bits
    return bits.view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_digests_of_arrays(dtype):
    """Of the same content the same in every form; of another one another."""
    array = filled((6, 5), dtype)
    digest = fingerprint.arrays({"a": array})
    assert digest == fingerprint.arrays({"a": array.copy()})
    assert digest == fingerprint.arrays({"a": np.asfortranarray(array)})
    assert digest == fingerprint.arrays({"a": np.concatenate([array, array], 1)[:, :5]})
    assert digest == fingerprint.arrays({"a": jnp.asarray(array)})
    if dtype not in (ml_dtypes.bfloat16, np.bool_, np.int8):
        assert digest == fingerprint.arrays({"a": array.astype(array.dtype.newbyteorder(">"))})
    others = [{"b": array}, [array], array, {"a": array, "b": None}, {"a": array[None]}, {"a": array.T}]
    others += [{"a": array.reshape(5, 6)}, {"a": array[::-1]}]
    assert len({digest, *map(fingerprint.arrays, others)}) == len(others) + 1
    for place in range(array.size):
        changed = array.copy()
        changed.reshape(-1, 1).view(np.uint8)[place, 0] ^= 1
        assert fingerprint.arrays({"a": changed}) != digest


def test_two_elements_that_change_places():
    array = np.arange(50_000.0)
    digest = fingerprint.arrays(array)
    for i, j in ((0, 1), (16383, 16384), (3, 49_999)):
        swapped = array.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert fingerprint.arrays(swapped) != digest
    parts = np.array([1 + 2j, 3 + 4j])
    assert fingerprint.arrays(parts) != fingerprint.arrays(np.array([2 + 1j, 3 + 4j]))
    assert fingerprint.arrays([np.zeros(2), np.ones(2)]) != fingerprint.arrays([np.ones(2), np.zeros(2)])


def test_the_dtype_matters_where_the_bits_are_the_same():
    arrays = [np.zeros(3, dtype) for dtype in DTYPES]
    assert len({fingerprint.arrays(a) for a in arrays}) == len(DTYPES)


@pytest.mark.parametrize(
    "shape", [(8, 6), (8, 4, 6), (4, 2, 8), (2, 40_000), (40_000, 2), (4, 20_000, 2)], ids=str
)
def test_placement_leaves_digests_as_they_are(shape):
    array = filled(shape, np.float32)
    digest = fingerprint.arrays(array)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = [(), ("a",), (None, "a"), ("a", "b"), ("b", "a")]
    specs += [(("a", "b"),)] if shape[0] % 4 == 0 else []
    specs += [(None, "b", "a"), ("a", None, "b"), (None, None, "b")] if len(shape) == 3 else []
    for spec in specs:
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert fingerprint.arrays(placed) == digest, spec


def test_blocks_do_not_show(monkeypatch):
    """Blocks that end within a run, at its end, and after many runs."""
    array = filled((12, 10, 4), np.float64)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    forms = [array, array.transpose(2, 1, 0)]
    forms += [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        for spec in ((None, "a"), ("a", "b"), (None, "a", "b"))
    ]
    digests = [fingerprint.arrays(form) for form in forms]
    assert len(set(digests)) == 2
    for block in (1, 7, 16, 20, 64):
        monkeypatch.setattr(fingerprint, "_BLOCK", block)
        assert [fingerprint.arrays(form) for form in forms] == digests


def test_keys():
    keys = [
        jax.random.key(1), jax.random.key(2), jax.random.key(1, impl="rbg"), jax.random.key_data(KEY),
        jax.random.split(KEY, 2), jax.random.split(KEY, 2)[::-1],
    ]  # fmt: skip
    assert len({fingerprint.arrays(key) for key in keys}) == len(keys)
    assert fingerprint.arrays(jax.random.key(1)) == fingerprint.arrays(keys[0])


def test_numbers_and_nothing():
    leaves = [None, 0, 0.0, -0.0, 1, 1.0, True, False, 1j, float("nan"), np.zeros(0), np.zeros((0, 2))]
    assert len({fingerprint.arrays({"a": leaf}) for leaf in leaves}) == len(leaves)
    assert (
        fingerprint.arrays(1.0) == fingerprint.arrays(np.float64(1.0)) == fingerprint.arrays(jnp.asarray(1.0))
    )


def test_classes_do_not_matter():
    state = optax.adam(0.1).init(jnp.ones(2))
    assert fingerprint.arrays(state) == fingerprint.arrays(jax.tree.map(np.asarray, state))


NOT_NUMBERS = (
    "text",
    b"text",
    object(),
    np.zeros(1, "M8[s]"),
    np.zeros(1, "f4,i4"),
    np.zeros(1, np.longdouble),
)


@pytest.mark.parametrize("leaf", NOT_NUMBERS, ids=range(len(NOT_NUMBERS)))
def test_what_is_no_array_of_numbers(leaf):
    with pytest.raises(TypeError, match=r"got .* at \['a'\]"):
        fingerprint.arrays({"a": leaf})


def test_host_callbacks_by_what_they_compute():
    def scaled(factor):
        def host(x):
            return np.float32(factor) * x

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.make_jaxpr(lambda x: jax.pure_callback(host, shape, x))(jnp.float32(1))

    assert fingerprint.program(scaled(1.0)) == fingerprint.program(scaled(1.0))
    assert fingerprint.program(scaled(1.0)) != fingerprint.program(scaled(7.0))
