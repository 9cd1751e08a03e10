"""Inner problems with kinks: proximal maps, and hypergradients against closed forms and differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import central_difference

import bilevel
from bilevel import diagnosis, prox
from bilevel.problem import Draw, NonFinite, Point

# --- Proximal maps ------------------------------------------------------------------------------------------

PENALTIES = {
    "l1": (lambda z: prox.l1(z, 0.7), lambda x: 0.7 * np.abs(x).sum()),
    "elastic net": (
        lambda z: prox.elastic_net(z, 0.5, 0.3),
        lambda x: 0.5 * np.abs(x).sum() + 0.15 * np.sum(x**2),
    ),
    "groups": (
        lambda z: prox.group_l2(z, jnp.array([0.5, 1.5]), axis=1),
        lambda x: np.array([0.5, 1.5]) @ np.linalg.norm(x, axis=1),
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
@given(st.integers(0, 10**6))
def test_proximal_maps_minimise(name, seed):
    shrink, penalty = PENALTIES[name]
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((2, 3))
    x = np.asarray(shrink(z))

    def objective(x):
        return 0.5 * np.sum((x - z) ** 2) + penalty(x)

    away = [objective(x + 10 ** rng.uniform(-6, 0) * rng.standard_normal(x.shape)) for _ in range(50)]
    away += [objective(t * x) for t in (0, 0.9, 1.1)]
    assert objective(x) <= min(away) + 1e-12


def test_derivatives_where_things_vanish():
    at_kink = jnp.array([0.5, -0.5, 0.0])
    for jacobian in (jax.jacrev, jax.jacfwd):
        by_both = jax.jit(jacobian(prox.l1, (0, 1)))(at_kink, 0.5)
        assert all((part == 0).all() for part in by_both)
    shrink = jax.jit(jax.jacrev(prox.group_l2))
    assert (shrink(jnp.zeros(2), 0.5) == 0).all()
    assert (shrink(jnp.array([3.0, 4.0]), 5.0) == 0).all()
    assert (jax.grad(lambda t: prox.group_l2(jnp.ones(3), t).sum())(5.0)) == 0
    z = jnp.array([1.0, -2.0, 0.5])
    for t in (0.3, 0.9):
        slope = jax.grad(lambda t: jnp.sum(prox.group_l2(z, t) ** 3))(t)
        expected = central_difference(lambda t: float(jnp.sum(prox.group_l2(z, t) ** 3)), t, 1.0, 1e-4)
        np.testing.assert_allclose(slope, expected, rtol=1e-9)


@pytest.mark.parametrize("shrink", [prox.l1, prox.group_l2, lambda z, t: prox.elastic_net(z, t, 0.0)])
def test_a_strength_of_zero_is_the_identity(shrink):
    jacobians = jax.jit(jax.jacrev(shrink)), jax.jit(jax.jacfwd(shrink))
    for z in (jnp.zeros(3), jnp.array([0.0, -2.0, 0.5]), jnp.full(3, 1e-200)):
        np.testing.assert_array_equal(shrink(z, 0.0), z)
        for jacobian in jacobians:
            np.testing.assert_array_equal(jacobian(z, 0.0), np.eye(3))


@pytest.mark.parametrize(
    ("shrink", "strength"),
    [
        (prox.l1, -0.5),
        (prox.l1, np.array([0.1, -0.1])),
        (prox.group_l2, -1.0),
        (functools.partial(prox.group_l2, axis=()), jnp.array([0.1, -0.1])),
        (lambda z, t: prox.elastic_net(z, t, 0.1), -1e-9),
        (lambda z, t: prox.elastic_net(z, 0.1, t), -2.0),
    ],
)
def test_a_negative_strength_is_refused_or_no_number(shrink, strength):
    z = jnp.zeros(2)
    with pytest.raises(ValueError, match="strength must not be negative, got -"):
        shrink(z, strength)
    expected = np.where(np.broadcast_to(strength, 2) < 0, np.nan, 0)
    np.testing.assert_array_equal(jax.jit(shrink)(z, strength), expected)
    np.testing.assert_array_equal(shrink(z, np.where(np.less(strength, 0), np.nan, strength)), expected)


def test_strengths_of_groups_have_the_shape_of_the_groups():
    words = r"a scalar or have the shape \(4,\) of the groups of z\(4, 3\) along axis -1, got shape \(3,\)"
    with pytest.raises(ValueError, match=words):
        prox.group_l2(jnp.ones((4, 3)), jnp.ones(3))
    assert prox.group_l2(jnp.ones((4, 3, 2)), jnp.ones(3), axis=(0, 2)).shape == (4, 3, 2)


# --- Hypergradients -----------------------------------------------------------------------------------------


def squares(w, hparams, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def logistic(w, hparams, batch):
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))


def lasso_prox(w, hparams, step_size):
    return prox.l1(w, step_size * hparams["l1"])


def elastic_prox(w, hparams, step_size):
    return prox.elastic_net(w, step_size * hparams["l1"], step_size * hparams["l2"])


def group_prox(w, hparams, step_size):
    return prox.group_l2(w.reshape(-1, 2), step_size * hparams["l1"]).ravel()


def box_prox(w, hparams, step_size):
    """A constraint, not a penalty: on its ends D is zero and the derivative by hparams is not."""
    return jnp.clip(w, -hparams["l1"], hparams["l1"])


@functools.cache
def data(n=40, d=12, seed=0):
    rng = np.random.default_rng(seed)
    w = np.where(np.arange(d) % 3 == 0, rng.standard_normal(d) + 1, 0)
    x, v = rng.standard_normal((2, n, d))
    return (x, x @ w + 0.5 * rng.standard_normal(n)), (v, v @ w + 0.5 * rng.standard_normal(n))


def signs(pair):
    return tuple((x, np.where(y > 0, 1.0, -1.0)) for x, y in pair)


def step_size_of(x):
    return len(x) / np.linalg.norm(x, 2) ** 2


def problem_of(loss, shrink, x):
    return bilevel.FixedPoint(bilevel.proximal_gradient(loss, shrink, step_size_of(x)), loss)


def solved(problem, hparams, train, start):
    solver, point = bilevel.picard(20_000, 1e-14, anderson=8), Point(jnp.asarray(start))
    draw = Draw(lambda j: train, 1, False)
    end, _, info = solver.solve(problem, (), point, hparams, draw, None)
    return end.params, info


def lasso_gradient(w, hparams, train, valid):
    """Closed form, for one penalty or one for each feature."""
    (x, y), (v, c) = train, valid
    on = w != 0
    outer = v.T @ (v @ w - c) / len(c)
    adjoint = np.zeros_like(w)
    adjoint[on] = np.linalg.solve(x[:, on].T @ x[:, on] / len(y), outer[on])
    each = -np.sign(w) * adjoint
    return each if np.ndim(hparams["l1"]) else each.sum()


SOLVERS = {
    "default": None,
    "cg": bilevel.implicit(bilevel.cg(tol=1e-13)),
    "gmres": bilevel.implicit(bilevel.gmres(100, tol=1e-13, restart=20)),
    "neumann": bilevel.implicit(bilevel.neumann(3000, 1.0)),
    "dense": bilevel.implicit(bilevel.dense()),
}


@pytest.mark.parametrize("each", [False, True], ids=["one penalty", "one per feature"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_lasso_has_a_closed_form(name, each):
    train, valid = data()
    rng = np.random.default_rng(1)
    hparams = {"l1": jnp.asarray(0.2 * rng.uniform(0.5, 1.5, 12) if each else 0.2)}
    problem = problem_of(squares, lasso_prox, train[0])
    w, info = jax.jit(solved, static_argnums=0)(problem, hparams, train, np.zeros(12))
    assert info.residual <= 1e-14
    assert 0 < jnp.sum(w != 0) < 12
    estimate = jax.jit(bilevel.hypergradient(problem, SOLVERS[name]))(w, hparams, train, valid)
    expected = lasso_gradient(np.asarray(w), hparams, train, valid)
    rtol = 1e-6 if name == "default" else 1e-10
    np.testing.assert_allclose(estimate.grad["l1"], expected, rtol=rtol, atol=1e-12)
    assert estimate.error <= 1e-7
    assert estimate.contraction == 0  # nothing but rounding moves it
    assert estimate.counts.inner_grad == 2 * len(train[1])  # two maps, to measure that


@pytest.mark.parametrize(("times", "which"), [(1.0, 0), (4.0, -1)])
def test_the_contraction_is_that_of_the_map_on_the_support(times, which):
    """At the solution, moved along the eigenvector that is the slowest, or the first to be lost."""
    train, valid = data()
    hparams, step_size = {"l1": jnp.asarray(0.2)}, step_size_of(train[0])
    w, _ = solved(problem_of(squares, lasso_prox, train[0]), hparams, train, np.zeros(12))
    on = np.flatnonzero(w)
    values, vectors = np.linalg.eigh(train[0][:, on].T @ train[0][:, on] / len(train[1]))
    step = bilevel.proximal_gradient(squares, lasso_prox, times * step_size)
    fn = bilevel.hypergradient(bilevel.FixedPoint(step, squares))
    estimate = fn(w.at[on].add(1e-4 * vectors[:, which]), hparams, train, valid)
    expected = abs(1 - times * step_size * values[which])
    assert (expected > 1) == (times > 2)
    np.testing.assert_allclose(estimate.contraction, expected, rtol=1e-8)


CASES = {
    "elastic net": (squares, elastic_prox, {"l1": 0.15, "l2": 0.3}),
    "groups": (squares, group_prox, {"l1": 0.3}),
    "sparse logistic": (logistic, lasso_prox, {"l1": 0.05}),
    "box": (squares, box_prox, {"l1": 0.6}),
}


@pytest.mark.parametrize("case", CASES)
def test_other_penalties_against_differences(case):
    loss, shrink, hparams = CASES[case]
    train, valid = signs(data()) if loss is logistic else data()
    problem = problem_of(loss, shrink, train[0])
    run = jax.jit(solved, static_argnums=0)

    def value(name, x):
        w, info = run(problem, hparams | {name: jnp.asarray(x)}, train, np.zeros(12))
        assert info.residual <= 1e-13
        return float(loss(w, {}, valid))

    w, _ = run(problem, hparams, train, np.zeros(12))
    for solver in (bilevel.cg(tol=1e-13), bilevel.gmres(200, tol=1e-13)):
        estimate = jax.jit(bilevel.hypergradient(problem, bilevel.implicit(solver)))(w, hparams, train, valid)
        for name, at in hparams.items():
            expected = central_difference(functools.partial(value, name), at, 1.0, 1e-4)
            np.testing.assert_allclose(estimate.grad[name], expected, rtol=1e-7, atol=1e-9)
        assert estimate.error <= 1e-10


def test_argmin_and_other_estimators_agree():
    train, valid = data()
    hparams, problem = {"l1": jnp.asarray(0.2)}, problem_of(squares, lasso_prox, train[0])
    w, _ = solved(problem, hparams, train, np.zeros(12))
    expected = lasso_gradient(np.asarray(w), hparams, train, valid)
    solve = bilevel.argmin(problem, bilevel.picard(20_000, 1e-14, anderson=8))
    by_argmin = jax.grad(lambda h: squares(solve(h, train, np.zeros(12)), h, valid))(hparams)
    unrolled = bilevel.hypergradient(problem, bilevel.unrolled(steps=2000))(w, hparams, train, valid)
    for grad in (by_argmin, unrolled.grad):
        np.testing.assert_allclose(grad["l1"], expected, rtol=1e-7)


def test_lifted_over_folds_and_tuned_to_where_the_slope_vanishes():
    pairs = [data(seed=seed) for seed in range(3)]
    train, valid = jax.tree.map(lambda *x: np.stack(x), *pairs)
    step_size = min(step_size_of(x) for x in train[0])
    problem = bilevel.FixedPoint(
        bilevel.proximal_gradient(squares, lasso_prox, step_size), squares, {"l1": bilevel.positive()}
    )
    hparams = {"l1": jnp.asarray(0.2)}
    ws = [solved(problem, hparams, pair[0], np.zeros(12))[0] for pair in pairs]
    estimate = bilevel.hypergradient(bilevel.lift(problem))(jnp.stack(ws), hparams, train, valid)
    each = [lasso_gradient(np.asarray(w), hparams, *pair) for w, pair in zip(ws, pairs, strict=True)]
    np.testing.assert_allclose(estimate.grad["l1"], np.mean(each), rtol=1e-6)
    method = bilevel.alternating(
        bilevel.implicit(), bilevel.picard(5000, 1e-10, anderson=8), optax.adam(0.1, b1=0.8, b2=0.9)
    )
    start = hparams | {"l1": 0.5}
    result = bilevel.optimize(
        bilevel.lift(problem), np.zeros((3, 12)), start, train, valid, method, 150, progress=False
    )
    grid = np.linspace(0.01, 0.5, 200)
    run = jax.jit(solved, static_argnums=0)
    losses = [
        np.mean([squares(run(problem, {"l1": l1}, pair[0], np.zeros(12))[0], {}, pair[1]) for pair in pairs])
        for l1 in grid
    ]
    assert result.best.value <= min(losses) + 1e-6
    assert abs(result.best.hparams["l1"] - grid[np.argmin(losses)]) <= 2 * (grid[1] - grid[0])
    rates = result.history["contraction"]
    assert ((rates > 0) & (rates < 1)).mean() > 0.5
    assert (rates < 1).all()


# --- Anderson acceleration ----------------------------------------------------------------------------------


def test_acceleration_takes_fewer_steps_to_the_same_point():
    train, _ = data()
    problem, hparams = problem_of(squares, lasso_prox, train[0]), {"l1": jnp.asarray(0.02)}
    ends = {}
    for depth in (0, 1, 8):
        solver = bilevel.picard(20_000, 1e-13, anderson=depth)
        end, _, info = solver.solve(
            problem, (), Point(jnp.zeros(12)), hparams, Draw(lambda j: train, 1, False), None
        )
        assert info.residual <= 1e-13
        ends[depth] = np.asarray(end.params), int(info.steps)
    assert ends[8][1] < 0.4 * ends[0][1]
    assert ends[1][1] < ends[0][1]
    for w, _ in ends.values():
        np.testing.assert_allclose(w, ends[0][0], atol=1e-11)


def test_acceleration_of_a_linear_map_ends_in_as_many_steps_as_it_has_unknowns():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 6))
    a *= 0.95 / np.abs(np.linalg.eigvals(a)).max()
    problem = bilevel.FixedPoint(lambda w, h, b: {"w": a @ w["w"] + b}, lambda w, h, b: 0.0)
    solver = bilevel.picard(60, 1e-9, anderson=8)
    end, _, info = solver.solve(
        problem, (), Point({"w": jnp.zeros(6)}), 0.0, Draw(lambda j: jnp.ones(6), 1, False), None
    )
    assert info.steps <= 12
    np.testing.assert_allclose(end.params["w"], np.linalg.solve(np.eye(6) - a, np.ones(6)), rtol=1e-7)


def test_acceleration_finds_back_where_it_has_left_the_domain():
    """Combined steps may land where a logarithm is nan; the plain map never does."""
    problem = bilevel.FixedPoint(lambda w, h, b: jnp.log(w) + 1.5 + b, lambda w, h, b: 0.0)
    solver = bilevel.picard(500, 1e-12, anderson=3)
    for start in (0.35, 2.0, 50.0):
        end, _, info = solver.solve(
            problem, (), Point(jnp.float64(start)), 0.0, Draw(lambda j: jnp.float64(0), 1, False), None
        )
        assert info.residual <= 1e-12
        np.testing.assert_allclose(end.params, np.log(end.params) + 1.5, rtol=1e-11)


# --- Maps that do not contract ------------------------------------------------------------------------------

LOGISTIC_MAP = bilevel.FixedPoint(
    lambda w, h, b: h * w * (1 - w) + 0 * b, lambda w, h, b: (w - 0.6) ** 2 + 0 * b
)


@pytest.mark.parametrize(("h", "contracts"), [(2.5, True), (3.4, False)])
def test_a_map_that_does_not_contract_is_told(h, contracts):
    method = bilevel.alternating(bilevel.implicit(bilevel.gmres()), outer=optax.sgd(1e-6), inner_steps=201)
    args = LOGISTIC_MAP, np.float64(0.3), np.float64(h), np.zeros(1)[0], np.zeros(1)[0], method, 20
    if contracts:
        result = bilevel.optimize(*args, progress=False)
        assert result.status == bilevel.Status.BUDGET
        assert (result.history["contraction"] == 0).all()
        return
    with pytest.warns(RuntimeWarning, match=r"does not contract: in 20 of 20 .*factor 1,.*unrolled"):
        result = bilevel.optimize(*args, progress=False)
    assert result.status == bilevel.Status.STALLED
    assert "does not contract" in result.message
    estimate = bilevel.hypergradient(LOGISTIC_MAP)(
        result.params, np.float64(h), np.zeros(1)[0], np.zeros(1)[0]
    )
    assert estimate.contraction >= 1 - 1e-5


def single(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def lasso_run(times, l1, steps, **settings):
    """In float32, with so many times the longest step that is safe."""
    train, valid = single(data())
    update = bilevel.proximal_gradient(squares, lasso_prox, times * float(step_size_of(train[0])))
    problem = bilevel.FixedPoint(update, squares, {"l1": bilevel.positive()})
    method = bilevel.alternating(bilevel.implicit(), bilevel.picard(500, atol=1e-5), optax.adam(0.1))
    hparams = {"l1": np.float32(l1)}
    args = problem, np.zeros(12, np.float32), hparams, train, valid, method, steps
    return bilevel.optimize(*args, progress=False, **settings)


def test_a_proximal_step_that_is_far_too_long_is_told():
    """Squares overflow before params do, so that no step is rejected and no factor is a number."""
    with pytest.warns(RuntimeWarning, match=r"does not contract: in 5 of 5.*factor inf.*lower its step_size"):
        result = lasso_run(100.0, 0.1, 5)
    assert result.status == bilevel.Status.STALLED
    assert (result.history["contraction"] == np.inf).all()


def test_a_proximal_step_that_is_too_long_is_told_where_the_loss_overflows():
    result = lasso_run(2.5, 0.1, 2)
    assert result.status == bilevel.Status.DIVERGED
    assert "the map of the fixed point does not contract" in result.message
    assert "lower its step_size" in result.message


def test_a_nan_in_the_data_is_not_laid_to_the_map():
    """Where the map contracts the message is the general one."""
    history = {"step": [0], "nonfinite": [NonFinite.VALUE], "contraction": np.array([0.3])}
    assert "look for a nan in the data" in diagnosis.why_ended(bilevel.Status.DIVERGED, history, None)


def test_a_penalty_that_leaves_nothing_is_told():
    with pytest.warns(
        RuntimeWarning, match=r"has a penalty shrunk all of them to zero\? Then start with a sm"
    ):
        result = lasso_run(1.0, 50.0, 2)
    assert result.status == bilevel.Status.STALLED


@pytest.mark.parametrize("apart", [True, False], ids=["leaves", "one leaf"])
def test_a_cycle_in_float32_is_not_hidden_by_large_numbers(apart):
    def update(w, h, batch):
        cycle, rest = h * w["cycle"] * (1 - w["cycle"]), w["rest"]
        return {"cycle": cycle, "rest": rest if apart else rest.at[0].set(h * rest[0] * (1 - rest[0]))}

    at = 0.84215444  # 3.4 maps it to 0.45196, and back
    params = {"cycle": np.float32(at if apart else 1 - 1 / 3.4), "rest": np.full(101, 300, np.float32)}
    if not apart:
        params["rest"][0] = at
    problem = bilevel.FixedPoint(update, lambda w, h, batch: jnp.sum(w["cycle"]))
    estimate = bilevel.hypergradient(problem)(params, np.float32(3.4), np.float32(0), np.float32(0))
    assert estimate.contraction.dtype == np.float32
    assert abs(estimate.contraction - 1) <= 1e-5


def ended(rates, status=bilevel.Status.BUDGET):
    rows = len(rates)
    history = {
        "step": np.arange(rows),
        "accepted": np.ones(rows, bool),
        "grad_norm": np.ones(rows),
        "error": np.zeros(rows),
        "solver_steps": np.ones(rows),
        "negative_curvature": np.zeros(rows, bool),
        "contraction": rates,
    }
    return diagnosis.final(status, history, may_rest=False, bounded=False)[0]


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        (np.array([1, 1, 1, 1, 0.5]), True),  # one at the end is no more than one
        (np.array([1, 1, 1, 0.5, 0.5]), False),  # it contracts by now
        (np.array([0.5, 0.5, 0.5, 1, 1]), False),
        (np.full(3, np.nan), True),
        (np.full(3, 1 - 1e-5), False),
        (np.full(3, 1 - 1e-5, np.float32), True),  # a cycle that is still being reached
        (np.full(3, 1 - 1e-3, np.float32), False),
        (np.array([]), False),
    ],
)
def test_the_majority_of_steps_says_whether_a_map_contracts(rates, told):
    assert ended(rates) == (bilevel.Status.STALLED if told else bilevel.Status.BUDGET)


def test_rounding_is_no_slow_map():
    """In float32 a map of rate 0.9 jitters by a rounding unit in the end, which does not shrink."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((50, 50))
    a = jnp.asarray(0.9 * a / np.abs(np.linalg.eigvals(a)).max(), jnp.float32)
    problem = bilevel.FixedPoint(lambda w, h, b: a @ w + h, lambda w, h, b: jnp.sum(w))
    fn = jax.jit(bilevel.hypergradient(problem))
    step = jax.jit(lambda w: problem.update(w, jnp.float32(1), None))
    w, jitter = jnp.zeros(50, jnp.float32), []
    for j in range(500):
        w, before = step(w), w
        if j >= 490:
            jitter.append(jnp.linalg.norm(w - before))
            assert fn(w, jnp.float32(1), jnp.float32(0), jnp.float32(0)).contraction < 0.9
    ratios = np.divide(jitter[1:], jitter[:-1])
    assert (ratios > 1).any()
    # A step of 84 rounding units that shrinks by 1e-5 of its length: too little to be seen.
    slow = bilevel.FixedPoint(lambda w, h, b: w + h * (b - w), lambda w, h, b: jnp.sum(w))
    estimate = bilevel.hypergradient(slow)(np.float32(1), np.float32(1e-5), np.float32(2), np.float32(0))
    assert 0.8 < estimate.contraction < 0.99


def test_the_rate_is_the_largest_eigenvalue_after_many_steps():
    problem = bilevel.FixedPoint(
        lambda w, h, b: h * jnp.array([0.9, 0.2]) * w + b, lambda w, h, b: jnp.sum(w)
    )
    params = bilevel.hypergradient(problem, bilevel.unrolled(steps=15))(
        jnp.zeros(2), 1.0, jnp.ones(2), jnp.ones(2)
    ).params
    rate = bilevel.hypergradient(problem)(params, 1.0, jnp.ones(2), jnp.ones(2)).contraction
    np.testing.assert_allclose(rate, 0.9, rtol=1e-6)


# --- Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bilevel.proximal_gradient(3, lasso_prox, 0.1), TypeError, "loss must be a function"),
        (lambda: bilevel.proximal_gradient(squares, None, 0.1), TypeError, "prox must be a function"),
        (
            lambda: bilevel.proximal_gradient(squares, lasso_prox, 0),
            ValueError,
            "step_size must be a positive",
        ),
        (
            lambda: bilevel.proximal_gradient(squares, prox.l1, 0.1),
            TypeError,
            r"got bilevel\.prox\.l1, which takes one array .* instance lambda w, hparams, step_size: bil",
        ),
        (lambda: bilevel.proximal_gradient(squares, prox.group_l2, 0.1), TypeError, "bilevel.prox.group_l2"),
        (
            lambda: bilevel.proximal_gradient(squares, lambda w, h: w, 0.1),
            TypeError,
            r"prox is called as prox\(params, hparams, step_size\), which it does not take: too many",
        ),
        (
            lambda: bilevel.proximal_gradient(lambda w, h, batch, state: 0.0, lasso_prox, 0.1),
            TypeError,
            r"loss is called as loss\(params, hparams, batch\), which it does not take: missing .*'state'",
        ),
        (
            lambda: bilevel.proximal_gradient(squares, lasso_prox, np.ones(3)),
            TypeError,
            "step_size must be a number",
        ),
        (
            lambda: jax.jit(lambda s: bilevel.proximal_gradient(squares, lasso_prox, s).step_size)(0.1),
            TypeError,
            "step_size must be a number",
        ),
        (
            lambda: bilevel.FixedPoint(
                bilevel.proximal_gradient(squares, lasso_prox, 0.1), squares, has_state=True
            ),
            TypeError,
            "has_state=True: a bilevel.proximal_gradient step has no model state",
        ),
        (lambda: bilevel.picard(anderson=-1), ValueError, "anderson must be at least 0"),
        (lambda: bilevel.picard(anderson=True), TypeError, "anderson must be a whole number"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (
            lambda w, h, batch: (squares(w, h, batch), {}),
            TypeError,
            "loss must return one scalar, got a tuple of 2",
        ),
        (lambda w, h, batch: batch[0] @ w, ValueError, r"loss must return a scalar, got shape \(40,\); take"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(loss, error, words):
    update = bilevel.proximal_gradient(loss, lasso_prox, 0.1)
    with pytest.raises(error, match=words):
        update(np.zeros(12), {"l1": 0.1}, data()[0])


@pytest.mark.parametrize(
    "step_size", [np.float32(0.125), jnp.float32(0.125), np.array(0.125), jnp.array(0.125)]
)
def test_a_step_size_may_be_any_number_that_can_be_read(step_size):
    update = bilevel.proximal_gradient(squares, lasso_prox, step_size)
    assert type(update.step_size) is float
    assert update == bilevel.proximal_gradient(squares, lasso_prox, 0.125)


def test_a_proximal_problem_is_a_value():
    make = functools.partial(bilevel.proximal_gradient, squares, lasso_prox, 0.1)
    assert bilevel.FixedPoint(make(), squares) == bilevel.FixedPoint(make(), squares)
    lifted = bilevel.lift(bilevel.FixedPoint(make(), squares))
    assert hash(lifted) == hash(bilevel.lift(bilevel.FixedPoint(make(), squares)))
    assert dataclasses.replace(lifted).update.step_size == 0.1
