"""Natural units outside, free units inside: maps, saturation, structure, and whole runs in closed form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.constraints import Constraint, bind

DTYPES = [np.float32, np.float64]
KINDS = {
    "real": bilevel.real(),
    "positive": bilevel.positive(),
    "interval": bilevel.interval(-0.3, 0.9),
    "box": bilevel.box(-2, 3),
    "fixed": bilevel.fixed(),
}


# --- The maps ------------------------------------------------------------------------------------------


def there_and_back(constraint, values):
    free = constraint.to_free(values)
    back = constraint.to_natural(free)
    assert free.dtype == back.dtype == values.dtype
    assert free.shape == back.shape == values.shape
    assert np.all(np.isfinite(free))
    return np.asarray(back)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_positive_there_and_back(dtype, share):
    limits = np.finfo(dtype)
    lo, hi = np.log(float(limits.tiny)), np.log(float(limits.max))
    shares = np.array(share)
    values = np.exp(np.where(shares < 0, -shares * lo, shares * hi)).astype(dtype)
    values = np.clip(values, limits.tiny, limits.max)
    back = there_and_back(bilevel.positive(), values)
    assert np.all(back > 0)
    # exp turns the rounding of log(value), relative to its size, into one relative to the value.
    bound = (np.abs(np.log(values.astype(float))) + 4) * float(limits.eps)
    assert np.all(np.abs(back.astype(float) / values - 1) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [(0, 1), (-1, 1), (0, 0.9), (-0.3, 0.1), (100, 101), (-3, 0)])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_interval_there_and_back(dtype, ends, share):
    lo, hi = (np.asarray(end, dtype) for end in ends)
    values = np.asarray(lo + (hi - lo) * np.array(share), dtype)
    values = np.clip(values, np.nextafter(lo, hi), np.nextafter(hi, lo))
    values = np.where(np.abs(values) < np.finfo(dtype).tiny, np.finfo(dtype).eps * (hi - lo) + lo, values)
    back = there_and_back(bilevel.interval(*ends), values.astype(dtype))
    assert np.all((back > lo) & (back < hi))
    bound = 4 * float(np.finfo(dtype).eps) * max(abs(lo), abs(hi))
    assert np.all(np.abs(back.astype(float) - values) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["real", "box", "fixed"])
def test_identity_there_and_back(dtype, name):
    values = np.linspace(-2, 3, 7).astype(dtype)
    np.testing.assert_array_equal(there_and_back(KINDS[name], values), values)


@pytest.mark.parametrize("free", [-200.0, -80.0, -50.0, -17.5, 17.5, 50.0, 80.0, 200.0])
@pytest.mark.parametrize("ends", [(0, 1), (-1, 1), (0, 0.9), (0.7, 1.3), (-1, 0), (1e6, 1e6 + 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_interval_stays_strictly_inside(dtype, ends, free):
    natural = bilevel.interval(*ends).to_natural(jnp.asarray(free, dtype))
    assert natural.dtype == dtype
    assert ends[0] < float(natural) < ends[1]


@pytest.mark.parametrize("free", [-80.0, -50.0, -17.5, -1.0, 0.0, 2.0, 17.5, 50.0, 80.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_a_saturated_interval_keeps_its_gradient(dtype, rtol, free):
    hparams = jnp.asarray(free, dtype)
    pulled = bind(bilevel.interval(-1, 3), hparams).pull_back(hparams, jnp.ones((), dtype))
    assert pulled.dtype == dtype
    small = np.exp(-abs(free))
    np.testing.assert_allclose(pulled, 4 * small / (1 + small) ** 2, rtol=rtol)


@pytest.mark.parametrize("free", [-200.0, 200.0])
def test_positive_stays_finite_and_positive(free):
    free = jnp.float32(free)
    natural = bilevel.positive().to_natural(free)
    assert natural.dtype == np.float32
    assert 0 < natural < np.inf
    pulled = bind(bilevel.positive(), free).pull_back(free, jnp.float32(1.0))
    assert np.isfinite(pulled)


def test_pull_back_is_the_chain_rule():
    free = {name: jnp.array([-1.2, 0.3, 0.9]) for name in KINDS}
    bound = bind(KINDS, free)

    def objective(hparams):
        return sum(jnp.sum(jnp.sin((1 + i / 5) * x)) for i, x in enumerate(jax.tree.leaves(hparams)))

    pulled = bound.pull_back(free, jax.grad(objective)(bound.to_natural(free)))
    assert not np.any(pulled["fixed"])
    # Central differences: rounding 1e-15 / h, truncation below 150 h^2 / 6.
    h = 1e-5
    for name in set(KINDS) - {"fixed"}:
        for i in range(3):

            def shifted(by, name=name, i=i):
                return objective(bound.to_natural({**free, name: free[name].at[i].add(by)}))

            slope = (shifted(h) - shifted(-h)) / (2 * h)
            np.testing.assert_allclose(pulled[name][i], slope, rtol=0, atol=5e-9)
            assert abs(slope) > 1e-3


# --- Box and fixed in the outer update --------------------------------------------------------------------


def test_box_projects():
    bound = bind(bilevel.box(-2, 3), jnp.zeros(4))
    before, proposed = jnp.zeros(4), jnp.array([-7.0, -2.0, 1.5, 3.25])
    assert bound.project(proposed, before).tolist() == [-2.0, -2.0, 1.5, 3.0]
    half_open = bind(bilevel.box(0, float("inf")), jnp.zeros(2))
    assert half_open.project(jnp.array([-1.0, 1e30]), jnp.zeros(2)).tolist() == [0.0, 1e30]


def test_box_measures_the_projected_step():
    free = jnp.array([-2.0, -2.0, 2.5, 1.0])
    grad = jnp.array([5.0, -5.0, -2.0, 0.25])
    # Outwards at an end nothing is left; 0.5 to the upper end; inside all of it.
    expected = np.sqrt(0.0 + 5.0**2 + 0.5**2 + 0.25**2)
    assert bind(bilevel.box(-2, 3), free).grad_norm(free, grad) == pytest.approx(expected, rel=1e-15)
    assert bind(bilevel.real(), free).grad_norm(free, grad) == pytest.approx(np.linalg.norm(grad), rel=1e-15)
    assert bind(bilevel.fixed(), free).grad_norm(free, grad) == 0


def test_fixed_keeps_what_stood_before():
    bound = bind(bilevel.fixed(), jnp.zeros(2))
    assert bound.project(jnp.array([5.0, 6.0]), jnp.array([1.0, 2.0])).tolist() == [1.0, 2.0]


# --- Structure ------------------------------------------------------------------------------------------

REAL, POSITIVE, UNIT, FIXED = bilevel.real(), bilevel.positive(), bilevel.interval(0, 1), bilevel.fixed()


class Pair(NamedTuple):
    a: Any
    b: Any


NESTED = {"layers": [{"l2": 0.1, "rate": 0.5}, {"l2": 0.2, "rate": 0.6}], "scale": 1.0}
STRUCTURES = [
    ("none", None, NESTED, [REAL] * 5),
    ("one for all", POSITIVE, NESTED, [POSITIVE] * 5),
    ("prefix", {"layers": POSITIVE, "scale": UNIT}, NESTED, [POSITIVE] * 4 + [UNIT]),
    ("some names", {"scale": UNIT}, NESTED, [REAL] * 4 + [UNIT]),
    (
        "nested names",
        {"layers": [{"rate": UNIT}, {"l2": POSITIVE}]},
        NESTED,
        [REAL, UNIT, POSITIVE, REAL, REAL],
    ),
    ("half a list", {"layers": [POSITIVE, None]}, NESTED, [POSITIVE, POSITIVE, REAL, REAL, REAL]),
    (
        "full tree",
        {"layers": [{"l2": POSITIVE, "rate": UNIT}, {"l2": FIXED, "rate": UNIT}], "scale": REAL},
        NESTED,
        [POSITIVE, UNIT, FIXED, UNIT, REAL],
    ),
    ("named tuple", Pair(POSITIVE, UNIT), Pair(0.1, 0.2), [POSITIVE, UNIT]),
    ("part of a named tuple", Pair(None, UNIT), Pair([0.1, 0.3], 0.2), [REAL, REAL, UNIT]),
    ("tuple", (POSITIVE, UNIT), (0.1, 0.2), [POSITIVE, UNIT]),
    ("one array", POSITIVE, 0.1, [POSITIVE]),
]


@pytest.mark.parametrize(
    ("spec", "hparams", "leaves"), [row[1:] for row in STRUCTURES], ids=[row[0] for row in STRUCTURES]
)
def test_constraints_follow_hparams(spec, hparams, leaves):
    problem = bilevel.Problem(inner_loss, outer_loss, constraints=spec)
    bound = bind(problem.constraints, hparams)
    assert list(bound.leaves) == leaves
    assert bound.treedef == jax.tree.structure(hparams)
    hparams = jax.tree.map(jnp.asarray, hparams)
    back = bound.to_natural(bound.to_free(hparams))
    assert jax.tree.structure(back) == jax.tree.structure(hparams)
    np.testing.assert_allclose(jax.tree.leaves(back), jax.tree.leaves(hparams), rtol=1e-15)


@pytest.mark.parametrize(
    ("spec", "hparams", "words"),
    [
        ({"l3": POSITIVE}, {"l2": 0.1}, ["constraints", "['l3']", "['l2']"]),
        ({"layers": [{"l3": POSITIVE}, None]}, NESTED, ["constraints['layers'][0]", "['l3']", "['rate']"]),
        ({"layers": [POSITIVE]}, NESTED, ["constraints['layers']", "some parts"]),
        ({"layers": [POSITIVE] * 3}, NESTED, ["constraints['layers']", "[2]"]),
        ({"scale": {"of": POSITIVE}}, NESTED, ["constraints['scale']", "one array"]),
        ([POSITIVE], {"l2": 0.1}, ["constraints", "[0]"]),
        (Pair(POSITIVE, None), {"a": 0.1, "b": 0.2}, ["constraints", ".a"]),
    ],
)
def test_names_that_hparams_do_not_have(spec, hparams, words):
    with pytest.raises(ValueError, match="constraints") as caught:
        bind(spec, hparams)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (bilevel.real(), "real()"),
        (bilevel.positive(), "positive()"),
        (bilevel.fixed(), "fixed()"),
        (bilevel.interval(0, 0.9), "interval(0, 0.9)"),
        (bilevel.box(float("-inf"), 2), "box(-inf, 2)"),
    ],
)
def test_constraints_print_as_they_are_written(constraint, text):
    assert repr(constraint) == text
    again = eval(text, {name: getattr(bilevel, name) for name in KINDS}, {"inf": float("inf")})
    assert isinstance(again, Constraint)
    assert again == constraint
    assert hash(again) == hash(constraint)


def test_constraints_differ_where_they_should():
    values = [*KINDS.values(), bilevel.interval(-0.3, 0.8), bilevel.box(-0.3, 0.9)]
    assert len(set(values)) == len(values)
    assert all(a != b for i, a in enumerate(values) for b in values[:i])


def test_numbers_become_floats():
    """Numpy and JAX scalars as ends neither break the hash nor tell equal constraints apart."""
    for ends in [(np.float32(0.5), np.int64(2)), (jnp.array(0.5), jnp.array(2))]:
        assert bilevel.interval(*ends) == bilevel.interval(0.5, 2)
        assert hash(bilevel.box(*ends)) == hash(bilevel.box(0.5, 2))


def test_equal_problems_are_equal():
    def make(**changes):
        constraints = {"a": {"b": bilevel.interval(0, 1)}, "c": bilevel.positive()}
        return bilevel.Problem(inner_loss, outer_loss, **{"constraints": constraints, **changes})

    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({make(), make(), make(constraints=None), make(constraints=bilevel.positive())}) == 3
    assert repr(make()) == (
        "Problem(inner=inner_loss, outer=outer_loss, "
        "constraints={'a': {'b': interval(0, 1)}, 'c': positive()})"
    )


# --- Whole runs, in closed form ----------------------------------------------------------------------------
# inner = |w - h x|^2 / 2 is solved by one gradient step of size 1; F(h) = |h x - y|^2 / 2 and its
# gradient is (h x - y) x.


def inner_loss(params, hparams, batch):
    return 0.5 * sum(jnp.sum((params[k] - hparams[k] * batch[k]) ** 2) for k in hparams)


def outer_loss(params, hparams, batch):
    return 0.5 * sum(jnp.sum((params[k] - batch[k]) ** 2) for k in hparams)


PROBLEM = bilevel.Problem(inner_loss, outer_loss, constraints=KINDS)
FREE_PROBLEM = bilevel.Problem(inner_loss, outer_loss)
STEP = 0.1
METHOD = bilevel.alternating(
    bilevel.implicit(bilevel.cg(max_steps=2)), inner=optax.sgd(1.0), outer=optax.sgd(STEP)
)
START = {"real": 0.4, "positive": 0.5, "interval": 0.6, "box": 2.5, "fixed": 0.8}
TRAIN = {"real": 1.1, "positive": 1.2, "interval": 1.3, "box": 1.4, "fixed": 1.5}
VALID = {"real": 3.0, "positive": 2.0, "interval": -1.0, "box": 9.0, "fixed": 2.0}
PARAMS = dict.fromkeys(KINDS, 0.0)


def run(problem=PROBLEM, hparams=START, steps=8, **changes):
    return bilevel.optimize(problem, PARAMS, hparams, TRAIN, VALID, METHOD, steps, progress=False, **changes)


def expected_run(steps):
    """The run by hand: hparams before each step, values, norms in free units, and the last hparams."""
    lo, hi = -0.3, 0.9
    h = dict(START)
    u = {
        **h,
        "positive": np.log(h["positive"]),
        "interval": np.log((h["interval"] - lo) / (hi - h["interval"])),
    }
    rows, values, norms = [], [], []
    for _ in range(steps):
        rows.append(dict(h))
        gap = {k: h[k] * TRAIN[k] - VALID[k] for k in h}
        values.append(0.5 * sum(g**2 for g in gap.values()))
        slope = {k: gap[k] * TRAIN[k] for k in h}
        slope["positive"] *= h["positive"]
        slope["interval"] *= (h["interval"] - lo) * (hi - h["interval"]) / (hi - lo)
        slope["fixed"] = 0.0
        reached = np.clip(u["box"] - slope["box"], -2, 3)
        norms.append(np.linalg.norm([u["box"] - reached, *(slope[k] for k in h if k != "box")]))
        u = {k: u[k] - STEP * slope[k] for k in u}
        u["box"] = np.clip(u["box"], -2, 3)
        h = {
            **u,
            "positive": np.exp(u["positive"]),
            "interval": lo + (hi - lo) / (1 + np.exp(-u["interval"])),
        }
    return rows, values, norms, h


def test_a_run_speaks_natural_units():
    steps = 8
    result = run(steps=steps)
    rows, values, norms, last = expected_run(steps)
    np.testing.assert_allclose(result.history["value"], values, rtol=1e-13)
    np.testing.assert_allclose(result.history["grad_norm"], norms, rtol=1e-13)
    for name in KINDS:
        np.testing.assert_allclose(result.hparams[name], last[name], rtol=1e-13)
        trajectory = [row[name] for row in rows] + [last[name]]
        np.testing.assert_allclose(result.trajectory.hparams[name], trajectory, rtol=1e-13)
        best = rows[result.best.step][name]
        np.testing.assert_allclose(result.best.hparams[name], best, rtol=1e-13)
    assert result.best.step == int(np.argmin(values))
    assert result.hparams["box"] == 3.0
    assert result.hparams["fixed"] == START["fixed"]


def test_an_estimate_speaks_natural_units():
    params = {k: START[k] * TRAIN[k] for k in KINDS}
    constrained = bilevel.hypergradient(PROBLEM)(params, START, TRAIN, VALID)
    unconstrained = bilevel.hypergradient(FREE_PROBLEM)(params, START, TRAIN, VALID)
    for name in KINDS:
        expected = (START[name] * TRAIN[name] - VALID[name]) * TRAIN[name]
        np.testing.assert_allclose(constrained.grad[name], expected, rtol=1e-13)
        assert constrained.grad[name] == unconstrained.grad[name]


def test_a_state_shows_natural_units():
    state = METHOD.init(PROBLEM, PARAMS, START, TRAIN, VALID, key=jax.random.key(0))
    for name in KINDS:
        np.testing.assert_allclose(state.hparams[name], START[name], rtol=1e-15)


BOXED = bilevel.Problem(inner_loss, outer_loss, constraints=bilevel.box(-2, 1))


def boxed_run(start, **changes):
    """A run whose optimum lies beyond the end of the box, for both hyperparameters."""
    params, train, valid = ({k: tree[k] for k in ("real", "positive")} for tree in (PARAMS, TRAIN, VALID))
    assert all(valid[k] / train[k] > 1 for k in train)
    hparams = dict.fromkeys(train, start)
    return bilevel.optimize(BOXED, params, hparams, train, valid, METHOD, progress=False, **changes)


def test_a_box_converges_at_its_end():
    result = boxed_run(0.9, tol=0.0, steps=50, judge_every=1)
    assert result.status == bilevel.Status.CONVERGED
    assert result.hparams == {"real": 1.0, "positive": 1.0}
    norms = result.history["grad_norm"]
    assert norms[0] == pytest.approx(0.1 * np.sqrt(2), rel=1e-12)
    assert np.flatnonzero(norms == 0).tolist() == [len(norms) - 1]
    assert len(norms) > 1


def test_a_run_that_starts_and_stays_at_the_end_of_its_box():
    """The gradient is not zero there, it points outwards: no advice that hparams do not matter."""
    result = boxed_run(1.0, steps=3, judge_every=1)
    assert result.hparams == {"real": 1.0, "positive": 1.0}
    assert result.history["grad_norm"].tolist() == [0.0] * 3
    assert "zero" not in result.message


def test_fixed_is_traced(compiled):
    """Another value of a fixed hyperparameter gives another result, and compiles nothing."""
    problem = bilevel.Problem(inner_loss, outer_loss, constraints={**KINDS, "real": bilevel.fixed()})

    def values(fixed):
        result = run(problem, {**START, "fixed": fixed})
        assert result.hparams["fixed"] == fixed
        assert np.all(result.trajectory.hparams["fixed"] == fixed)
        assert result.hparams["real"] == START["real"]
        return result.history["value"]

    compiled()
    first = values(0.8)
    assert compiled() > 0
    second = values(0.7)
    assert compiled() == 0
    step = 0.5 * ((0.7 * TRAIN["fixed"] - VALID["fixed"]) ** 2 - (0.8 * TRAIN["fixed"] - VALID["fixed"]) ** 2)
    np.testing.assert_allclose(second - first, step, rtol=1e-12)
