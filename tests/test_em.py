"""Generalised EM: steps against plain loops, derivatives against closed forms, differences and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from problems import central_difference
from scipy.special import digamma, gammaln, log_softmax

import bilevel
from bilevel import em

KEY = jax.random.key(0)
CLASSES, STEPS = 4, 5
HPARAMS = {"prior_weight": 1.3, "temperature": 2.2, "scale": 1.1}
PER_STEP = {"prior_weight": True, "temperature": True}


def task(seed=0, shots=2, queries=12, features=3, classes=CLASSES):
    """Clusters that overlap, not all of them among the queries."""
    rng = np.random.default_rng(seed)
    middle = 1.5 * rng.standard_normal((classes, features))
    labels = np.repeat(np.arange(classes), shots)
    wanted = rng.integers(0, max(1, classes - 1), queries)
    noisy = [middle[k] + rng.standard_normal((k.size, features)) for k in (labels, wanted)]
    return {"support": noisy[0], "labels": labels, "query": noisy[1]}, {"labels": wanted}


def probabilities(seed=0, **settings):
    """The same with features on the simplex, one for each class."""
    train, valid = task(seed, features=settings.get("classes", CLASSES), **settings)
    return {**train, **{name: jax.nn.softmax(2 * train[name]) for name in ("support", "query")}}, valid


@functools.cache
def problem_of(kind="gaussian", classes=CLASSES):
    step, init = getattr(em, f"{kind}_step"), getattr(em, f"{kind}_init")

    def start(hparams, batch, key):
        return init(batch, classes, hparams["scale"])

    return bilevel.FixedPoint(step, em.query_loss, start=start)


TASKS = {"gaussian": task, "dirichlet": probabilities}
KINDS = pytest.mark.parametrize("kind", TASKS)


def schedules(steps=STEPS, seed=3):
    rng = np.random.default_rng(seed)
    draw = {name: jnp.asarray(HPARAMS[name] * rng.uniform(0.8, 1.2, steps)) for name in PER_STEP}
    return draw | {"scale": jnp.asarray(HPARAMS["scale"])}


@functools.cache
def compiled_estimate(problem, estimator):
    return jax.jit(bilevel.hypergradient(problem, estimator))


def at(problem, estimator, hparams, train, valid, params=None):
    return compiled_estimate(problem, estimator)(params, hparams, train, valid, key=KEY)


def started(kind, hparams, train, classes=CLASSES):
    return getattr(em, f"{kind}_init")(train, classes, hparams["scale"])


HERE = {name: jnp.float64(value) for name, value in HPARAMS.items()}
UNEM = bilevel.unrolled(steps=STEPS, per_step=PER_STEP)


def single(tree):
    """In float32."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@jax.jit
def by_diagonal(hparams, train, valid):
    """Loss of three steps with a common diagonal, and the first and the last params; slopes."""

    def loss(hparams):
        start = em.gaussian_init(train, CLASSES, hparams["scale"], "diagonal")
        params, _ = jax.lax.scan(lambda p, _: (em.gaussian_step(p, hparams, train), None), start, length=3)
        return em.query_loss(params, hparams, valid)[0], (start, params)

    return jax.value_and_grad(loss, has_aux=True)(hparams)


# --- Steps against plain loops -----------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
def test_gaussian_steps_are_those_of_a_plain_loop(covariance):
    batch, _ = task()
    params = em.gaussian_init(batch, CLASSES, HPARAMS["scale"], covariance)
    c, lam, temperature = HPARAMS["scale"], HPARAMS["prior_weight"], HPARAMS["temperature"]
    zs, zq, y = c * batch["support"], c * batch["query"], np.eye(CLASSES)[batch["labels"]]
    w, log_pi = np.stack([zs[batch["labels"] == k].mean(axis=0) for k in range(CLASSES)]), np.zeros(CLASSES)
    var = np.ones(3)
    if covariance == "diagonal":
        var = ((zs - w[batch["labels"]]) ** 2).mean(axis=0)
    np.testing.assert_allclose(params["centers"], w, rtol=1e-12)
    for _ in range(4):
        params = em.gaussian_step(params, HPARAMS, batch)
        d = np.array([[-0.5 * np.sum((z - k) ** 2 / var) for k in w] for z in zq])
        u = np.exp(log_softmax((d + lam * log_pi) / temperature, axis=1))
        log_pi = np.log(u.mean(axis=0) + 1e-6)
        w = (u.T @ zq + y.T @ zs) / (u.sum(axis=0) + y.sum(axis=0))[:, None]
        if covariance == "diagonal":
            pairs = [(z, r) for z, r in zip(np.concatenate([zs, zq]), np.concatenate([y, u]), strict=True)]
            var = sum(r @ (z - w) ** 2 for z, r in pairs) / sum(r.sum() for _, r in pairs)
            np.testing.assert_allclose(params["variances"], var, rtol=1e-10)
        np.testing.assert_allclose(np.exp(params["log_assignments"]), u, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(params["log_prior"], log_pi, rtol=1e-10)
        np.testing.assert_allclose(params["centers"], w, rtol=1e-10)


def majorised(ybar, steps=20_000):
    """Concentrations by Minka's fixed point with an inverse digamma of many Newton steps: slow and sure."""
    a = np.ones_like(ybar)
    for _ in range(steps):
        target = ybar + digamma(a.sum())
        new = np.where(target > -2.22, np.exp(target) + 0.5, -1 / (target + 0.5772156649))
        for _ in range(6):
            new = new - (digamma(new) - target) * np.square(new) / (1 + new)
        if np.max(np.abs(new - a)) < 1e-13 * np.max(a):
            return new
        a = new
    return a


def test_dirichlet_steps_are_those_of_a_plain_loop():
    batch, _ = probabilities()
    params = em.dirichlet_init(batch, CLASSES, HPARAMS["scale"])
    c, lam, temperature = HPARAMS["scale"], HPARAMS["prior_weight"], HPARAMS["temperature"]
    zs, zq = (log_softmax(c * np.log(np.asarray(batch[name])), axis=1) for name in ("support", "query"))
    y, u = np.eye(CLASSES)[batch["labels"]], np.exp(zq)
    for _ in range(3):
        params = em.dirichlet_step(params, HPARAMS, batch)
        ybar = (y.T @ zs + u.T @ zq) / (y.sum(axis=0) + u.sum(axis=0))[:, None]
        a = np.asarray(params["concentrations"])
        np.testing.assert_allclose(digamma(a) - digamma(a.sum(axis=1))[:, None], ybar, atol=1e-12)
        log_pi = np.log(u.mean(axis=0) + 1e-15)
        likelihood = gammaln(a.sum(axis=1)) - gammaln(a).sum(axis=1) + zq @ (a - 1).T
        u = np.exp(log_softmax((likelihood + lam * log_pi) / temperature, axis=1))
        np.testing.assert_allclose(np.exp(params["log_assignments"]), u, rtol=1e-9, atol=1e-14)


def test_plain_em_does_not_lower_the_likelihood():
    batch, _ = task(queries=30)
    params = em.gaussian_init(batch, CLASSES)
    known = np.eye(CLASSES)[batch["labels"]]
    objective = []
    for _ in range(20):
        params = em.gaussian_step(params, {}, batch)
        w, log_pi = params["centers"], params["log_prior"]
        d = -0.5 * ((batch["query"][:, None] - np.asarray(w)) ** 2).sum(axis=2)
        s = -0.5 * ((batch["support"][:, None] - np.asarray(w)) ** 2).sum(axis=2)
        objective.append(float(jax.nn.logsumexp(d + log_pi[None], axis=1).sum() + jnp.sum(known * s)))
    assert (np.diff(objective) > -1e-4).all()  # to the 1e-6 that shares are lifted by
    assert objective[-1] > objective[0] + 0.1


def test_one_example_a_class_starts_from_the_variance_of_all():
    train, valid = task(shots=1)
    (value, (start, params)), slopes = by_diagonal(HERE, train, valid)
    everything = np.concatenate([train["support"], train["query"]])
    np.testing.assert_allclose(start["variances"], 1.1**2 * everything.var(axis=0), rtol=1e-12)
    for x in jax.tree.leaves((value, params, slopes)):
        assert bool(jnp.isfinite(x).all())
    assert abs(slopes["scale"]) <= 1e-12 < abs(slopes["temperature"])  # variances have the same units
    # What a constant feature is does not matter.
    made = []
    for constant in (0, 3):
        changed = {
            **train,
            **{name: train[name] * [1, 1, 0] + [0, 0, constant] for name in ("support", "query")},
        }
        (value, _), slopes = by_diagonal(HERE, changed, valid)
        made.append([value, *slopes.values()])
    np.testing.assert_allclose(made[0], made[1], rtol=1e-9, atol=1e-12)


# --- What is known of the derivatives -----------------------------------------------------------------------


def test_the_first_gaussian_prior_weight_has_no_influence():
    train, valid = task()
    for estimator in (bilevel.unrolled, bilevel.forward):
        grad = at(problem_of(), estimator(steps=STEPS, per_step=PER_STEP), schedules(), train, valid).grad
        assert grad["prior_weight"][0] == 0
        assert (grad["prior_weight"][1:] != 0).all()
        assert (grad["temperature"] != 0).all()


def test_shared_strengths_have_two_directions():
    train, valid = task()
    hparams = {name: jnp.asarray(value) for name, value in HPARAMS.items()}
    problem, estimator = problem_of(), bilevel.unrolled(steps=STEPS)
    grad = at(problem, estimator, hparams, train, valid).grad
    # scale^2 : temperature : prior_weight is all that assignments depend on.
    weights = {"prior_weight": 2.0, "temperature": 2.0, "scale": 1.0}
    along = sum(weights[name] * hparams[name] * grad[name] for name in weights)
    assert abs(along) <= 1e-13 < abs(grad["scale"])

    def assignments(values):
        named = dict(zip(HPARAMS, values, strict=True))
        fn = bilevel.hypergradient(problem, estimator)
        return fn(None, named, train, valid, key=KEY).params["log_assignments"].ravel()

    values = np.linalg.svd(jax.jacfwd(assignments)(jnp.array(list(HPARAMS.values()))), compute_uv=False)
    assert values[2] <= 1e-12 * values[0]
    assert values[1] >= 1e-3 * values[0]


@KINDS
def test_forward_and_reverse_agree(kind):
    train, valid = TASKS[kind]()
    made = [
        at(problem_of(kind), estimator(steps=STEPS, per_step=PER_STEP), schedules(), train, valid)
        for estimator in (bilevel.unrolled, bilevel.forward)
    ]
    reverse, forward = (ravel_pytree(estimate.grad)[0] for estimate in made)
    np.testing.assert_allclose(forward, reverse, rtol=1e-12, atol=1e-13)


@KINDS
def test_finite_differences_and_the_share_of_the_start(kind):
    train, valid = TASKS[kind]()
    problem = problem_of(kind)
    flat, unravel = ravel_pytree(schedules())

    def value(x):
        return float(at(problem, UNEM, unravel(jnp.asarray(x)), train, valid).value)

    expected = [central_difference(value, np.asarray(flat), e, 1e-3) for e in np.eye(flat.size)]
    grad = at(problem, UNEM, schedules(), train, valid).grad
    np.testing.assert_allclose(ravel_pytree(grad)[0], expected, rtol=1e-7, atol=1e-10)
    held = dataclasses.replace(
        problem, start=lambda h, b, key: jax.lax.stop_gradient(problem.start(h, b, key))
    )
    without = at(held, UNEM, schedules(), train, valid).grad
    assert abs(without["scale"] - grad["scale"]) > 1e-3 * abs(grad["scale"])
    np.testing.assert_allclose(without["temperature"], grad["temperature"], rtol=1e-12)


# --- The M-step of Dirichlet classes ------------------------------------------------------------------------


def means(kind, classes, rows=64, seed=0):
    """Means of logarithms over points of the simplex."""
    rng = np.random.default_rng(seed)
    if kind == "mild":
        points = [rng.dirichlet(rng.uniform(0.5, 5, classes), 20) for _ in range(rows)]
        return np.stack([np.log(p).mean(axis=0) for p in points])
    logits = [
        0.5 * rng.standard_normal((20, classes)) + 4 * rng.standard_normal(classes) for _ in range(rows)
    ]
    return np.stack([log_softmax(x, axis=1).mean(axis=0) for x in logits])


@pytest.mark.parametrize("kind", ["mild", "peaked"])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_concentrations_solve_their_equation(kind, classes):
    ybar = means(kind, classes)
    a = np.asarray(jax.jit(em.dirichlet_mle)(ybar))
    assert (a > 0).all()
    residual = digamma(a) - digamma(a.sum(axis=1, keepdims=True)) - ybar
    assert np.abs(residual).max() <= 1e-12
    if classes == 10:
        np.testing.assert_allclose(a[:4], [majorised(y) for y in ybar[:4]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["mild", "peaked"])
def test_derivatives_of_concentrations(kind):
    ybar = means(kind, 10, rows=8)
    direction = 1e-2 * np.random.default_rng(1).standard_normal(ybar.shape)
    solve = jax.jit(em.dirichlet_mle)
    _, tangent = jax.jvp(solve, (ybar,), (direction,))
    expected = central_difference(lambda y: np.asarray(solve(y)), ybar, direction, 1e-3)
    np.testing.assert_allclose(tangent, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())
    back = jax.grad(lambda y: jnp.vdot(solve(y), direction))(ybar)
    np.testing.assert_allclose(np.vdot(back, direction), np.vdot(tangent, direction), rtol=1e-10)


def test_second_derivatives_of_concentrations():
    """Of the log-likelihood at its maximum the first derivative is a - 1, so that the second is that of a."""
    (y,) = means("mild", 3, rows=1)

    def likelihood(y):
        a = em.dirichlet_mle(y)
        return jax.scipy.special.gammaln(a.sum()) - jax.scipy.special.gammaln(a).sum() + (a - 1) @ y

    np.testing.assert_allclose(jax.jit(jax.grad(likelihood))(y), em.dirichlet_mle(y) - 1, rtol=1e-9)
    second, first = jax.jit(jax.hessian(likelihood))(y), jax.jit(jax.jacfwd(em.dirichlet_mle))(y)
    np.testing.assert_allclose(second, first, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_concentrations_of_points_that_are_all_the_same(dtype):
    z = np.array([[0.7, 0.2, 0.1], [1 - 2e-30, 1e-30, 1e-30], [1 / 3, 1 / 3, 1 / 3]])
    a = jax.jit(em.dirichlet_mle)(np.log(z).astype(dtype))
    assert a.dtype == dtype
    assert bool(jnp.isfinite(a).all())
    assert bool((a > 0).all())
    mean = a / a.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mean[0], z[0], rtol=1e-3)
    slopes = jax.jit(jax.jacrev(em.dirichlet_mle))(np.log(z[0]).astype(dtype))
    assert bool(jnp.isfinite(slopes).all())


@settings(max_examples=5)
@given(st.integers(2, 12), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 10**6))
def test_concentrations_of_any_shape(classes, shape, seed):
    rng = np.random.default_rng(seed)
    logits = 10 ** rng.uniform(-2, 1.5, (*shape, 1, 1)) * rng.standard_normal((*shape, 5, classes))
    ybar = log_softmax(logits, axis=-1).mean(axis=-2)
    rows = jax.jit(jax.vmap(em.dirichlet_mle))(ybar.reshape(-1, classes))
    a = np.asarray(rows).reshape(ybar.shape)
    residual = digamma(a) - digamma(a.sum(axis=-1, keepdims=True)) - ybar
    assert np.abs(residual).max() <= 1e-11


def test_rows_of_concentrations_do_not_depend_on_each_other():
    ybar = means("peaked", 3, rows=3)
    others = np.array([[np.nan, -1, -2], [-np.inf, -1, -2], [-1e9, -1, -1.5]])
    solve = jax.jit(em.dirichlet_mle)
    a = solve(np.concatenate([ybar, others]))
    for same in (solve(np.concatenate([ybar, ybar])), solve(np.concatenate([ybar, ybar[::-1]]))):
        np.testing.assert_allclose(a[:3], same[:3], rtol=1e-14)
    assert bool(jnp.isnan(a[3:5]).all())
    assert bool(jnp.isfinite(a[5]).all())
    assert jax.eval_shape(em.dirichlet_mle, np.zeros((0, 3))).shape == (0, 3)


# --- Unrolled and implicit ----------------------------------------------------------------------------------


@KINDS
def test_unrolled_and_implicit_agree_where_the_map_contracts(kind):
    train, valid = TASKS[kind]()
    hparams = {"prior_weight": jnp.float64(0.2), "temperature": jnp.float64(4.0), "scale": jnp.float64(1.0)}
    problem = problem_of(kind)
    unrolled = at(problem, bilevel.unrolled(steps=300), hparams, train, valid)
    free = dataclasses.replace(problem, start=None)
    for solver in (bilevel.gmres(200, tol=1e-13, restart=60), bilevel.neumann(300, 1.0)):
        implicit = at(free, bilevel.implicit(solver), hparams, train, valid, unrolled.params)
        for name, slope in unrolled.grad.items():
            np.testing.assert_allclose(implicit.grad[name], slope, rtol=1e-8, atol=1e-12)
    solve = bilevel.argmin(free, bilevel.picard(2000, atol=1e-13))
    init = started(kind, hparams, train)
    grad = jax.grad(lambda h: em.query_loss(solve(h, train, init), h, valid)[0])(hparams)
    for name, slope in unrolled.grad.items():
        np.testing.assert_allclose(grad[name], slope, rtol=1e-8, atol=1e-12)


def test_unrolled_and_implicit_differ_where_it_does_not():
    """Of a cycle of two no point is fixed; unrolled differentiates where the loop ends."""
    problem = bilevel.FixedPoint(lambda w, h, b: h * w * (1 - w), lambda w, h, b: w)
    args = jnp.float64(3.3), jnp.zeros(1), jnp.zeros(1)
    unrolled = bilevel.hypergradient(problem, bilevel.unrolled(steps=400))(jnp.float64(0.4), *args)
    implicit = bilevel.hypergradient(problem, bilevel.implicit(bilevel.gmres()))(unrolled.params, *args)
    assert abs(unrolled.params - 3.3 * unrolled.params * (1 - unrolled.params)) > 0.3

    def after(h):  # the cycle: w solves h^2 w^2 - h (h + 1) w + h + 1 = 0
        return ((h + 1) - np.sqrt((h - 3) * (h + 1))) / (2 * h)

    low = central_difference(after, 3.3, 1.0, 1e-4)
    high = central_difference(lambda h: ((h + 1) + np.sqrt((h - 3) * (h + 1))) / (2 * h), 3.3, 1.0, 1e-4)
    assert min(abs(unrolled.grad - low), abs(unrolled.grad - high)) <= 1e-6
    assert abs(implicit.grad - unrolled.grad) > 0.05


# --- Many tasks ---------------------------------------------------------------------------------------------


def stacked(kind="gaussian", count=4):
    made = [TASKS[kind](seed) for seed in range(count)]
    return jax.tree.map(lambda *x: jnp.stack(x), *made)


@KINDS
def test_a_lifted_estimate_is_the_mean_of_those_of_its_tasks(kind):
    train, valid = stacked(kind)
    estimator = bilevel.unrolled(steps=STEPS, per_step=PER_STEP)
    together = at(bilevel.lift(problem_of(kind)), estimator, schedules(), train, valid)
    each = [at(problem_of(kind), estimator, schedules(), *TASKS[kind](seed)) for seed in range(4)]
    np.testing.assert_allclose(together.value, np.mean([e.value for e in each]), rtol=1e-12)
    expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *(e.grad for e in each))
    for name, slope in expected.items():
        np.testing.assert_allclose(together.grad[name], slope, rtol=1e-10, atol=1e-14)


def unem(steps, train, valid, mesh=None, **settings):
    method = bilevel.alternating(
        bilevel.unrolled(per_step=PER_STEP), None, optax.adam(0.02), inner_steps=STEPS
    )
    problem = dataclasses.replace(bilevel.lift(problem_of()), constraints=bilevel.positive())
    return bilevel.optimize(
        problem,
        None,
        schedules(),
        train,
        valid,
        method,
        steps,
        key=KEY,
        progress=False,
        mesh=mesh,
        **settings,
    )


def test_tasks_over_a_mesh():
    train, valid = stacked(count=8)
    alone = unem(5, train, valid)
    over = unem(
        5, jax.tree.map(np.asarray, train), jax.tree.map(np.asarray, valid), jax.make_mesh((4,), ("data",))
    )
    assert not over.params["centers"].sharding.is_fully_replicated
    for name, value in alone.hparams.items():
        np.testing.assert_allclose(over.hparams[name], value, rtol=1e-10)
    assert alone.history["value"].min() < alone.history["value"][0]
    assert alone.history["accuracy"].shape == (5,)


# --- Float32 ------------------------------------------------------------------------------------------------


def rounding(kind, hparams, train, valid):
    """Of slopes in float32, relative to the largest."""
    exact = at(problem_of(kind), UNEM, hparams, train, valid).grad
    rough = at(problem_of(kind), UNEM, single(hparams), single(train), valid).grad
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rough))
    exact, rough = ravel_pytree(exact)[0], ravel_pytree(rough)[0]
    return np.abs(rough - exact).max() / np.abs(exact).max()


# Log-likelihoods of Dirichlet classes cancel to the sum of their concentrations, here up to 80, times eps.
# How a machine rounds decides which task is worse by a factor of ten or more: the promise is the median's.
@pytest.mark.parametrize(("kind", "promised"), [("gaussian", 2e-6), ("dirichlet", 5e-5)])
def test_float32_is_good_to_what_is_promised(kind, promised):
    assert np.median([rounding(kind, schedules(), *TASKS[kind](seed)) for seed in range(12)]) <= promised


def test_a_class_of_tiny_mass_has_a_derivative_in_float32():
    train, _ = probabilities()
    labels, share = np.arange(8) % 2, np.random.default_rng(0).uniform(0.6, 0.8, 8)
    rows = np.full((8, CLASSES), 1e-9)
    rows[np.arange(8), labels], rows[np.arange(8), 1 - labels] = share, 1 - share
    train |= {"support": rows, "labels": labels, "query": np.concatenate([rows, rows[:4]])}
    for prior_weight in (4.0, 8.0):  # of two classes the masses are about e^-70 and e^-150
        hparams = schedules() | {"prior_weight": jnp.full(STEPS, prior_weight)}
        assert rounding("dirichlet", hparams, train, {"labels": np.arange(12) % 2}) <= 5e-5


def test_features_far_from_zero_do_not_cancel_in_float32():
    train, valid = task(shots=1)
    train = {**train, **{name: np.float32(train[name] + 3000) for name in ("support", "query")}}
    exact = jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else x, train)
    (_, (start, rough)), slope = by_diagonal(single(HERE), train, valid)
    (_, (first, params)), expected = by_diagonal(HERE, exact, valid)
    # Centers are kept to 3000 times the precision.
    bound = 4 * 3000 * np.finfo(np.float32).eps
    np.testing.assert_allclose(start["variances"], first["variances"], rtol=1e-6)
    np.testing.assert_allclose(rough["variances"], params["variances"], rtol=bound)
    np.testing.assert_allclose(rough["centers"], params["centers"], atol=bound)
    for name, x in expected.items():
        np.testing.assert_allclose(slope[name], x, rtol=bound, atol=bound * abs(expected["temperature"]))


# --- Clusters without labels --------------------------------------------------------------------------------


def test_soft_kmeans_at_a_low_temperature_is_kmeans():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    # With shares, few would be taken by a center of many.
    drawn = zip(np.array([[0, 0], [3, 0], [0, 3]]), (95, 5, 6), strict=True)
    x = np.concatenate([c + 0.4 * rng.standard_normal((count, 2)) for c, count in drawn])
    params = em.soft_kmeans(x, 3, jax.random.key(1), {"temperature": 1e-3})
    found = KMeans(3, n_init=5, random_state=0).fit(x)
    centers = np.asarray(params["centers"])
    order = [int(np.argmin(np.sum((centers - c) ** 2, axis=1))) for c in found.cluster_centers_]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(centers[order], found.cluster_centers_, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(
        np.argmax(params["log_assignments"], axis=1), np.array(order)[found.labels_]
    )


def test_soft_kmeans_is_differentiable_and_takes_a_common_diagonal():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((15, 2)), [4, 0] + rng.standard_normal((15, 2))]) * [1, 50]

    def spread(temperature, covariance):
        hparams = {"prior_weight": 1.0, "temperature": temperature}
        params = em.soft_kmeans(x, 2, KEY, hparams, covariance=covariance)
        return jnp.sum(params["centers"][0] ** 2), params

    slope = jax.grad(lambda t: spread(t, "diagonal")[0])(1.5)
    expected = central_difference(lambda t: float(spread(t, "diagonal")[0]), 1.5, 1.0, 1e-3)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    found = np.argmax(spread(1.0, "diagonal")[1]["log_assignments"], axis=1)
    assert max(np.mean(found == np.repeat([0, 1], 15)), np.mean(found == np.repeat([1, 0], 15))) >= 0.9


def test_soft_kmeans_has_a_derivative_whatever_becomes_empty():
    """Of more clusters than there are, in float32, and with a feature that is constant."""
    rng = np.random.default_rng(0)
    x = np.concatenate([c + rng.standard_normal((20, 4)) for c in 3 * rng.standard_normal((3, 4))])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def spread(prior_weight, x):
        hparams = {"prior_weight": prior_weight, "temperature": 1.0}
        params = em.soft_kmeans(x, 5, KEY, hparams, covariance="diagonal")
        return jnp.sum(params["centers"] ** 2), params["log_prior"]

    for features in (x, x * [1, 1, 0, 1] + [0, 0, 7, 0]):
        (_, log_prior), slopes = spread(np.linspace(0, 20, 21, dtype=np.float32), np.float32(features))
        assert log_prior.min() < -13.8  # empty but for the 1e-6
        assert all(bool(jnp.isfinite(slope).all()) for slope in slopes)


# --- Tasks --------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_drawn_tasks_keep_the_protocol(classes, shots, present, seed):
    present = min(present, classes)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), 12))
    features = np.arange(labels.size, dtype=float)[:, None]
    train, valid = em.sample_tasks(features, labels, 3, shots, present, queries=6, seed=seed)
    again, _ = em.sample_tasks(features, labels, 3, shots, present, queries=6, seed=seed)
    assert train["support"].shape == (3, classes * shots, 1)
    assert train["query"].shape == (3, 6, 1)
    np.testing.assert_array_equal(train["query"], again["query"])
    for j in range(3):
        support, query = train["support"][j, :, 0].astype(int), train["query"][j, :, 0].astype(int)
        assert len({*support, *query}) == support.size + query.size
        np.testing.assert_array_equal(labels[support], train["labels"][j])
        np.testing.assert_array_equal(labels[query], valid["labels"][j])
        assert (np.bincount(train["labels"][j]) == shots).all()
        assert len(set(valid["labels"][j])) <= present


# --- Bad input ----------------------------------------------------------------------------------------------


X, Y = np.zeros((6, 2)), np.array([0, 0, 0, 1, 1, 1])
SIMPLEX_BUT_ONE, ROWS = np.full((5, 4), 0.5), np.array([[1.5, -0.5, 0, 0]] * 8)
BAD = [
    ("gaussian_init", {"labels": np.full(8, 7)}, ValueError, ["labels", r"\[0, 4\)", "7"]),
    ("gaussian_init", {"labels": np.zeros(8)}, TypeError, ["labels", "integers", "float64"]),
    ("gaussian_init", {"labels": [0] * 8}, TypeError, ["labels", "array", "list"]),
    ("gaussian_init", {"query": np.zeros((0, 3))}, ValueError, ["query", "at least one", r"\(0, 3\)"]),
    ("gaussian_step", {"labels": np.full(8, 7)}, ValueError, ["labels", r"\[0, 4\)", "7"]),
    ("dirichlet_step", {"labels": np.full(8, 7)}, ValueError, ["labels", r"\[0, 4\)", "7"]),
    ("dirichlet_step", {"support": ROWS}, ValueError, ["support", "simplex", "-0.5"]),
    ("gaussian_init", {"labels": np.zeros(3, int)}, ValueError, ["labels", r"\(8,\)", r"\(3,\)"]),
    ("gaussian_init", {"labels": np.zeros(8, int)}, ValueError, ["class", r"\[1, 2, 3\]", "soft_kmeans"]),
    ("gaussian_init", {"query": np.zeros((3, 5))}, ValueError, ["features", r"\(8, 3\)", r"\(3, 5\)"]),
    ("gaussian_init", {"query": np.zeros((2, 3, 5))}, ValueError, ["query", "lift"]),
    ("gaussian_init", {"query": np.zeros((3, 3), int)}, TypeError, ["query", "floating", "int64"]),
    ("dirichlet_init", {"query": SIMPLEX_BUT_ONE}, ValueError, ["query", "row 0", "sum 2", "softmax"]),
    ("dirichlet_init", {"support": ROWS}, ValueError, ["support", "simplex", "-0.5"]),
]


@pytest.mark.parametrize(("name", "arrays", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_tasks_are_named(name, arrays, error, words):
    kind, _, part = name.partition("_")
    good = TASKS[kind]()[0]
    args = (CLASSES,) if part == "init" else ({},)
    begun = (getattr(em, f"{kind}_init")(good, CLASSES),) if part == "step" else ()
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        getattr(em, name)(*begun, *args[: len(begun)], {**good, **arrays}, *args[len(begun) :])


def step(hparams=None, /, **named):
    batch = task()[0]
    return em.gaussian_step(em.gaussian_init(batch, CLASSES), named or hparams, batch)


def loss(labels):
    return em.query_loss({"log_assignments": jnp.log(jnp.full((6, 2), 0.5))}, None, labels)


CALLS = [
    (lambda: em.gaussian_init({"support": X}, CLASSES), TypeError, ["batch", "labels", "query", "support"]),
    (lambda: em.gaussian_init(task()[0], CLASSES, 1.0, "full"), ValueError, ["covariance", "full"]),
    (lambda: em.gaussian_init(task()[0], 0), ValueError, ["num_classes", "at least 1"]),
    (lambda: step(temperature=-1.0), ValueError, ["temperature", "positive", "-1.0"]),
    (lambda: step(prior_weight=jnp.ones(3)), ValueError, ["prior_weight", "scalar", "per_step"]),
    (lambda: step(None), TypeError, ["hparams", "dict of prior_weight, temperature, scale", "None"]),
    (lambda: step([1.0, 2.0]), TypeError, ["hparams", "dict", r"\[1.0, 2.0\]"]),
    (lambda: step(temperature="1"), TypeError, ["temperature", "number", "'1'"]),
    (lambda: step(temperature=None), TypeError, ["temperature", "number", "None"]),
    (lambda: step(temprature=1.0), ValueError, ["'temprature'", "prior_weight, temperature, scale"]),
    (lambda: step(scale=0.0), ValueError, ["scale", "positive", "0.0"]),
    (lambda: em.gaussian_step({}, {}, task()[0]), TypeError, ["params", "centers", "gaussian_init"]),
    (lambda: em.gaussian_init(task()[0], CLASSES, np.ones(3)), ValueError, ["scale", "scalar", r"\(3,\)"]),
    (lambda: em.gaussian_init(task()[0], CLASSES, "2"), TypeError, ["scale", "number", "'2'"]),
    (lambda: em.dirichlet_init(probabilities()[0], CLASSES, -1.0), ValueError, ["scale", "positive"]),
    (lambda: em.dirichlet_init(probabilities()[0], 1), ValueError, ["num_classes", "at least 2", "1"]),
    (lambda: em.dirichlet_mle(np.array([0.5, 0.3, 0.2])), ValueError, ["mean_log", "at most 1", "4.2199"]),
    (lambda: em.soft_kmeans(X, 2, KEY, {"temprature": 1.0}), ValueError, ["temprature", "temperature"]),
    (lambda: em.soft_kmeans(X, 2, KEY, [1.0]), TypeError, ["hparams", "dict"]),
    (lambda: em.soft_kmeans(X[0], 2, KEY), ValueError, ["^features", r"\(2,\)"]),
    (lambda: loss(Y), TypeError, ["batch", "labels", "ndarray"]),
    (lambda: loss({"labels": Y[:1]}), ValueError, ["labels", "each query", r"\(6,\)", r"\(1,\)"]),
    (lambda: loss({"labels": Y[:, None]}), ValueError, ["labels", r"\(6, 1\)"]),
    (lambda: loss({"labels": np.eye(2)[Y]}), ValueError, ["labels", r"\(6, 2\)"]),
    (lambda: loss({"labels": Y + 0.5}), TypeError, ["labels", "integers", "float64"]),
    (lambda: loss({"labels": 2 * Y}), ValueError, ["labels", r"\[0, 2\)", "2"]),
    (lambda: em.dirichlet_init(task()[0], CLASSES), ValueError, ["probabilities of the 4 classes", "3"]),
    (lambda: em.dirichlet_mle(np.array([1, 2])), TypeError, ["mean_log", "int"]),
    (lambda: em.dirichlet_mle(np.array([-1.0])), ValueError, ["mean_log", "two entries"]),
    (lambda: em.soft_kmeans(X, 7, KEY), ValueError, ["num_classes", "at most the 6", "7"]),
    (lambda: em.sample_tasks(X, Y + 1, 2, 1, 1, 1), ValueError, ["labels", r"\[1, 2\]"]),
    (lambda: em.sample_tasks(X, Y, 2, 1, 3, 1), ValueError, ["present", "2", "3"]),
    (lambda: em.sample_tasks(X, Y, 2, 1, 1, 3), ValueError, ["3 examples", "have 2", "shots=1"]),
    (lambda: em.sample_tasks(X, Y[:3], 2, 1, 1, 1), ValueError, [r"\(6, 2\)", r"\(3,\)"]),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=range(len(CALLS)))
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match="(?s)" + ".*".join(words)):
        call()


def test_what_is_traced_and_wrong_is_not_overlooked():
    train, valid = stacked()
    wrong = {**train, "labels": train["labels"].at[2, 0].set(9)}
    with pytest.raises(ValueError, match=r"start\(hparams, batch, key\).*centers.*finite, got nan"):
        unem(3, wrong, valid)
    for kind in TASKS:
        for wrong in ({"temperature": -jnp.ones(STEPS)}, {"scale": jnp.float64(-1)}, {}):
            train, valid = TASKS[kind]()
            labels = train["labels"] if wrong else train["labels"] + 1
            estimate = at(problem_of(kind), UNEM, schedules() | wrong, {**train, "labels": labels}, valid)
            assert bool(jnp.isnan(estimate.value))
    value, metrics = jax.jit(loss)({"labels": 2 * Y})
    assert bool(jnp.isnan(value))
    assert bool(jnp.isnan(metrics["accuracy"]))


def test_a_schedule_of_the_wrong_length_is_named():
    short, estimator = schedules(4), bilevel.unrolled(steps=STEPS, per_step=PER_STEP)
    with pytest.raises(ValueError, match=r"prior_weight.*per_step.*5 inner steps.*\(4,\)"):
        at(problem_of(), estimator, short, *task())
