"""What data-parallel hypergradients move between four devices: counted in their compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import bilevel
from benchmarks import communication as comm
from benchmarks.collectives import collectives, moved, of_text, optimised

DEVICES = 4
DEPTH, WIDTH, ROWS = 2, 8, 64
FLOAT = 4  # bytes
NAMES = [name for name in comm.ESTIMATORS if name != "forward"]


@pytest.fixture(scope="module")
def mesh():
    return comm.mesh_of(DEVICES)


def arguments(mesh, depth=DEPTH):
    return comm.placed(mesh, *comm.arrays(depth, WIDTH, ROWS))


@functools.cache
def of_estimator(mesh, name, depth=DEPTH):
    return collectives(comm.estimate(comm.ESTIMATORS[name]), *arguments(mesh, depth))


def whole(mesh):
    return NamedSharding(mesh, comm.ONE)


def gathers(found):
    return [c for c in found if c.op != "all-reduce"]


# --- Counting -------------------------------------------------------------------------------------------


def test_a_program_that_gathers_is_caught(mesh):
    x = jax.device_put(jnp.zeros((ROWS, 3), jnp.float32), NamedSharding(mesh, comm.DATA))
    (found,) = collectives(lambda x: jax.lax.with_sharding_constraint(x, whole(mesh)), x)
    assert (found.op, found.sizes, found.loops) == ("all-gather", (ROWS * 3 * FLOAT,), ())


def test_loops_are_counted(mesh):
    x = jax.device_put(jnp.ones((ROWS, 3), jnp.float32), NamedSharding(mesh, comm.DATA))

    def step(x, _):
        return x - jnp.mean(x, axis=0, keepdims=True), None

    def nested(x, _):
        return jax.lax.scan(step, x, length=5)

    (found,) = collectives(lambda x: jax.lax.scan(nested, x, length=7)[0], x)
    assert (found.op, found.bytes, found.loops) == ("all-reduce", 3 * FLOAT, (7, 5))
    assert found.moved() == 35 * 3 * FLOAT

    def unknown(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1e-3, lambda x: step(x, None)[0], x)

    found = collectives(unknown, x)  # one in the condition, one in the body
    assert sorted((c.bytes, c.loops) for c in found) == [(FLOAT, (None,)), (3 * FLOAT, (None,))]
    assert moved(found, unknown=10) == 10 * 4 * FLOAT


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        of_text("jit(f)")


def test_shapes_of_many_arrays():
    text = """
%sum (a: f32[]) -> f32[] {
  ROOT %a = f32[] parameter(0)
}
ENTRY %main (x: f32[2]) -> bf16[4] {
  %y = (f32[2,3]{1,0}, pred[5]{0}, s64[]{:T(128)}, f32[1], f32[1], /*index=5*/f8e4m3fn[7]{0}) \
all-reduce-start(%x), channel_id=1, to_apply=%sum, metadata={op_name="jit(f)/dot"}
  ROOT %z = bf16[4]{0} collective-permute(%y)
}
"""
    reduced, permuted = of_text(text)
    assert (reduced.op, reduced.sizes, reduced.source) == ("all-reduce", (24, 5, 8, 4, 4, 7), "jit(f)/dot")
    assert (permuted.op, permuted.bytes) == ("collective-permute", 8)


# --- Hypergradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "forward"])
def test_nothing_moves_but_what_the_formula_says(mesh, name):
    sizes = comm.sizes_of(*arguments(mesh)[:2])
    found = of_estimator(mesh, name)
    assert not gathers(found)
    asked = FLOAT * comm.numbers(name, sizes)
    assert abs(moved(found, comm.LOOP) - asked) <= comm.REMAINDER
    # Of weights beyond the first layer two parts are reduced; of all directions at once, one set for each.
    together = {"forward": 1 + sizes.hparams, "nystrom": comm.RANK}.get(name, 1)
    largest = 2 * FLOAT * together * (sizes.params + sizes.hparams) + comm.REMAINDER
    assert max(c.bytes for c in found) <= largest


def test_a_step_of_a_method(mesh):
    args = arguments(mesh)
    found = collectives(*comm.program_of_step(mesh, *args))
    assert not gathers(found)
    asked = FLOAT * comm.numbers("step", comm.sizes_of(*args[:2]))
    assert abs(moved(found, comm.LOOP) - asked) <= comm.REMAINDER


@pytest.mark.parametrize("name", ["cg", "unrolled"])
def test_no_more_of_them_for_more_layers(mesh, name):
    few, many = (of_estimator(mesh, name, depth) for depth in (2, 6))
    assert comm.reduces(few) == comm.reduces(many)
    assert moved(many, comm.LOOP) > moved(few, comm.LOOP)


@pytest.mark.parametrize("name", ["cg", "unrolled, no remat"])
def test_no_more_than_by_hand(mesh, name):
    args = arguments(mesh)
    sizes = comm.sizes_of(*args[:2])
    by_hand = collectives(comm.hand_mapped(name, mesh), *args)
    assert moved(by_hand) == FLOAT * comm.hand_numbers(name, sizes)
    assert len(of_estimator(mesh, name)) <= len(by_hand)
    # With sums over devices at the losses: by hand nothing measures the error, H v - b.
    explicit = collectives(comm.averaged(comm.ESTIMATORS[name], mesh), *args)
    error = sizes.params if name == "cg" else 0
    assert moved(explicit, comm.LOOP) <= moved(by_hand) + FLOAT * error + comm.REMAINDER


@pytest.mark.parametrize("name", ["cg", "unrolled, no remat"])
def test_the_program_by_hand_computes_the_same(mesh, name):
    args = comm.placed(mesh, *comm.arrays(DEPTH, WIDTH, ROWS, np.float64))
    got = jax.jit(comm.hand_mapped(name, mesh))(*args)
    expected = jax.jit(comm.estimate(comm.ESTIMATORS[name]))(*args)[:2]
    assert comm.largest_difference(got, expected) < 1e-10


def test_layouts_agree_with_one_device():
    host = comm.arrays(DEPTH, WIDTH, ROWS, np.float64)
    fn = jax.jit(comm.estimate(comm.ESTIMATORS["cg"]))
    expected = jax.tree.map(np.asarray, fn(*host)[:2])
    for mesh, sharding in comm.layouts(host[0], DEVICES).values():
        got = fn(*comm.in_layout(mesh, sharding, *host))[:2]
        assert comm.largest_difference(got, expected) < 1e-10


# --- Examples ----------------------------------------------------------------------------------------------


def test_weights_used_whole_stay_where_they_are(mesh):
    args = comm.with_weights(mesh, DEPTH, WIDTH, ROWS)
    estimator = comm.ESTIMATORS["cg"]
    program = optimised(comm.estimate(estimator, comm.WEIGHTED), *args)
    assert not gathers(of_text(program.as_text()))
    assert program.output_shardings[1]["weight"].spec == comm.DATA
    # Looked up by number something is gathered: why docs/scaling.md says to use them whole.
    assert gathers(collectives(comm.estimate(estimator, comm.LOOKED_UP), *args))


def sampled(mesh, rows, strata):
    arrays = jax.device_put(comm.arrays(DEPTH, WIDTH, rows)[2], NamedSharding(mesh, comm.DATA))
    return comm.batch_of(bilevel.minibatches(arrays, 4 * DEVICES, strata=strata))


@pytest.mark.parametrize("rows", [ROWS, 300 * DEVICES])  # a table and a keyed shuffle
def test_strata_are_sampled_where_they_are(mesh, rows):
    program = optimised(*sampled(mesh, rows, DEVICES))
    # At most whether any device draws again.
    assert all(c.op == "all-reduce" and c.bytes == 1 for c in of_text(program.as_text()))
    assert all(sharding.spec[0] == "data" for sharding in jax.tree.leaves(program.output_shardings))


def test_without_strata_rows_move(mesh):
    assert moved(collectives(*sampled(mesh, ROWS, 1))) >= FLOAT * 4 * DEVICES * (WIDTH + 1)
