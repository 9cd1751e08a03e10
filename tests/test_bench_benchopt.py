"""The solver file for the public benchmark, with a stand-in for the package that would load it."""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "benchopt" / "solver.py"
RNG = np.random.default_rng(0)
# Row i of the inner loss pulls z to x + p_i with weight h_i, row j of the outer one z to q_j, and x to 0.
INNER = {"h": RNG.uniform(0.5, 1.5, 10), "p": RNG.normal(size=(10, 2))}
OUTER = {"q": RNG.normal(size=(5, 2))}
SHIFT = np.average(INNER["p"], axis=0, weights=INNER["h"])
SOLUTION = (OUTER["q"].mean(0) - SHIFT) / 2
SETTINGS = {"step_size": 0.4, "outer_ratio": 1.0, "period_frac": 1.0, "eval_freq": 100, "random_state": 1}


def of_rows(arrays, row_loss):
    """A loss in the benchmark's form."""

    def loss(z, x, start=0, batch_size=1):
        def taken(leaf):
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), start, batch_size)

        return jnp.mean(jax.vmap(lambda row: row_loss(z, x, row))(jax.tree.map(taken, arrays)))

    return jax.jit(loss, static_argnames="batch_size")


F_INNER = of_rows(INNER, lambda z, x, row: 0.5 * row["h"] * jnp.sum((z - x - row["p"]) ** 2))
F_OUTER = of_rows(OUTER, lambda z, x, row: 0.5 * jnp.sum((z - row["q"]) ** 2) + 0.5 * jnp.sum(x**2))


@pytest.fixture
def module(monkeypatch):
    """The file, loaded by its path."""

    class BaseSolver:
        def __init__(self, **settings):
            vars(self).update(settings)

    stub, criteria = types.ModuleType("benchopt"), types.ModuleType("benchopt.stopping_criterion")
    stub.BaseSolver, criteria.SufficientProgressCriterion = BaseSolver, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "benchopt", stub)
    monkeypatch.setitem(sys.modules, "benchopt.stopping_criterion", criteria)
    spec = importlib.util.spec_from_file_location("solver", FILE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def solved(module, calls, **settings):
    """What the benchmark sees at first and in the end."""
    solver = module.Solver(**{**SETTINGS, **settings})
    solver.set_objective(F_INNER, F_OUTER, 10, 5, jnp.zeros(2), -2 * jnp.ones(2))
    seen = []

    def callback():
        seen.append(solver.get_result())
        return len(seen) <= calls

    solver.run(callback)
    return seen[0], solver.get_result()


def test_the_mean_over_blocks_is_that_over_rows(module):
    z, x = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5])
    expected = F_INNER(z, x, batch_size=10)
    for size in (4, 5):  # with two rows left over, with none
        loss, starts = module.blocks(F_INNER, 10, size)
        each = [loss(z, x, starts[i : i + 1]) for i in range(len(starts))]
        assert starts.tolist() == list(range(0, 10, size))
        np.testing.assert_allclose(np.mean(each), expected, rtol=1e-12)
        np.testing.assert_allclose(loss(z, x, starts), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "batch_size", "calls"), [("saba", 4, 4), ("srba", 5, 3), ("implicit", 4, 1)]
)
def test_every_method_comes_to_the_closed_form(module, method, batch_size, calls):
    first, last = solved(module, calls, method=method, batch_size=batch_size)
    np.testing.assert_array_equal(first["outer_var"], [-2.0, -2.0])
    np.testing.assert_allclose(last["outer_var"], SOLUTION, atol=1e-6)
    np.testing.assert_allclose(last["inner_var"], SOLUTION + SHIFT, atol=1e-6)


def test_another_method_is_named(module):
    with pytest.raises(ValueError, match="method must be one of implicit, saba, srba; got 'soba'"):
        solved(module, 1, method="soba", batch_size=4)


def test_what_the_benchmark_chooses_from_is_what_the_solver_reads(module):
    names = [name for key in module.Solver.parameters for name in key.split(", ")]
    assert set(names) == {*SETTINGS, "method", "batch_size"}
    assert module.Solver.get_next(3) == 4
