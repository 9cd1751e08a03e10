"""Regularisers for pictures, their problems, and that every constant bounds what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import certificates, imaging
from bilevel.problem import CERTIFIED, ESTIMATED

PICTURES, SIDE = 2, 12
TV = imaging.tv_denoising(PICTURES)
KERNEL = ((0.0, 0.1, 0.0), (0.1, 0.6, 0.1), (0.0, 0.1, 0.0))
DEBLURRING = imaging.tv_deblurring(PICTURES, KERNEL, ridge=0.1)
EXPERTS = imaging.experts_denoising(PICTURES, peak=1.5)


@functools.cache
def pictures(side=SIDE):
    """A square and two ramps; noise of .1."""
    rng = np.random.default_rng(0)
    clean = np.zeros((PICTURES, side, side))
    clean[0, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    clean[1] = np.linspace(0, 1, side)
    clean[1, :, : side // 3] = 0.8
    return {"noisy": clean + 0.1 * rng.standard_normal(clean.shape), "clean": clean}


@functools.cache
def blurred():
    noisy = np.stack([imaging.blur(x, KERNEL) for x in pictures()["clean"]])
    return {"noisy": noisy + 0.03 * np.random.default_rng(1).standard_normal(noisy.shape)} | {
        "clean": pictures()["clean"]
    }


def experts(count=3, size=3):
    found = imaging.first_experts(jax.random.key(0), count, size)
    return found | {"filters": 4 * found["filters"], "strength": jnp.array(0.8)}


def strengths():
    return jnp.asarray(np.random.default_rng(2).uniform(0.05, 0.15, (SIDE, SIDE)))


CASES = {
    "tv": (TV, pictures, lambda: {"strength": jnp.array(0.1), "smoothing": jnp.array(0.08)}),
    "map": (TV, pictures, lambda: {"strength": strengths(), "smoothing": jnp.array(0.08)}),
    "deblurring": (DEBLURRING, blurred, lambda: {"strength": jnp.array(0.03), "smoothing": jnp.array(0.1)}),
    "experts": (EXPERTS, pictures, experts),
}
cases = pytest.mark.parametrize("case", CASES)


def solved(problem, data, hparams):
    known = problem.smoothness
    solver = bilevel.accelerated(
        20_000, atol=1e-12, strong_convexity=known.strong_convexity, smoothness=known.inner
    )
    return bilevel.argmin(problem, solver)(hparams, data, init=jnp.asarray(data["clean"]))


# --- Regularisers ----------------------------------------------------------------------------------


def test_total_variation_is_its_sum():
    x = np.random.default_rng(0).standard_normal((4, 5))
    weight = np.random.default_rng(1).uniform(0, 1, x.shape)
    total = 0.0
    for i in range(4):
        for j in range(5):
            if i < 3:
                total += weight[i, j] * np.hypot(x[i + 1, j] - x[i, j], 0.3)
            if j < 4:
                total += weight[i, j] * np.hypot(x[i, j + 1] - x[i, j], 0.3)
    assert float(imaging.total_variation(x, 0.3, weight)) == pytest.approx(total)
    ones = imaging.total_variation(x, 0.3, 2 * np.ones_like(x))
    assert float(ones) == pytest.approx(2 * float(imaging.total_variation(x, 0.3)))


def test_experts_are_correlations_where_they_fit():
    rng = np.random.default_rng(0)
    x, filters = rng.standard_normal((6, 8)), rng.standard_normal((2, 3, 3))
    weight, smoothing = np.array([0.5, 2.0]), np.array([0.1, 0.3])
    total = 0.0
    for k in range(2):
        for i in range(4):
            for j in range(6):
                response = np.sum(x[i : i + 3, j : j + 3] * filters[k])
                total += weight[k] * np.hypot(response, smoothing[k])
    got = imaging.field_of_experts(x, {"weight": weight, "smoothing": smoothing, "filters": filters})
    assert float(got) == pytest.approx(total)


def test_total_variation_is_a_field_of_two_experts():
    # In 2 x 2 filters the differences of the last row and column do not fit.
    x = np.random.default_rng(0).standard_normal((7, 7))
    filters = np.array([[[-1.0, 0], [1, 0]], [[-1, 1], [0, 0]]])
    got = imaging.field_of_experts(
        x, {"weight": np.ones(2), "smoothing": np.full(2, 0.2), "filters": filters}
    )
    whole = imaging.total_variation(x, 0.2)
    last = sum(np.sum(np.hypot(np.diff(edge), 0.2)) for edge in (x[-1], x[:, -1]))
    assert float(got) == pytest.approx(float(whole) - last)


def test_the_first_experts_are_those_of_the_paper():
    first = imaging.first_experts(jax.random.key(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(first)) == 2449
    assert np.allclose(first["weight"], np.exp(-3))
    assert np.allclose(first["smoothing"], np.exp(-3.5))
    assert np.allclose(np.sum(first["filters"], axis=(1, 2)), 0)
    assert float(jnp.std(first["filters"])) == pytest.approx(np.sqrt(2 / (49 + 48 * 49)), rel=0.05)


def test_psnr():
    clean = np.zeros((2, 3, 4))
    x = np.stack([np.full((3, 4), 0.1), np.full((3, 4), 0.01)])
    assert np.allclose(imaging.psnr(x, clean), [20, 40])


# --- Problems --------------------------------------------------------------------------------------


@cases
def test_hypergradients_are_those_of_finite_differences(case):
    problem, data, hparams = CASES[case][0], CASES[case][1](), CASES[case][2]()
    estimator = bilevel.implicit(bilevel.cg(500, tol=1e-13))

    @jax.jit
    def value(hparams):
        return problem.outer(solved(problem, data, hparams), hparams, data)

    @jax.jit
    def gradient(hparams):
        return bilevel.hypergradient(problem, estimator)(solved(problem, data, hparams), hparams, data, data)

    rng = np.random.default_rng(0)
    estimate = gradient(hparams)
    assert estimate.error_kind == (CERTIFIED if case in ("tv", "deblurring") else ESTIMATED)
    assert 0 < float(estimate.error) < 1e-4
    direction = jax.tree.map(lambda h: h * rng.standard_normal(h.shape), hparams)
    step = 1e-5
    ahead, behind = (
        value(jax.tree.map(lambda h, d, s=s: h + s * step * d, hparams, direction)) for s in (1, -1)
    )
    slope = sum(
        jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (estimate.grad, direction)), strict=True)
    )
    assert float(slope) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-6)


@cases
def test_the_bound_holds(case):
    problem, data, hparams = CASES[case][0], CASES[case][1](), CASES[case][2]()
    exact = solved(problem, data, hparams)
    accurate = bilevel.implicit(bilevel.cg(500, tol=1e-13))
    true = bilevel.hypergradient(problem, accurate)(exact, hparams, data, data)
    rough = jax.jit(bilevel.hypergradient(problem, bilevel.implicit(bilevel.cg(4, tol=0.0))))
    value = float(problem.outer(exact, hparams, data))
    rng = np.random.default_rng(0)
    for away in (1e-4, 1e-2, 1.0):
        direction = rng.standard_normal(exact.shape)
        found = rough(exact + away * direction / np.linalg.norm(direction), hparams, data, data)
        difference = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), found.grad, true.grad)
        assert np.sqrt(sum(jax.tree.leaves(difference))) <= float(found.error)
        assert abs(float(found.value) - value) <= float(found.value_error) < 1e3


def test_pictures_are_solved_as_alone():
    data, hparams = pictures(), CASES["tv"][2]()
    one = imaging.tv_denoising(1)
    together = solved(TV, data, hparams)
    values, grads = [], []
    for i in range(PICTURES):
        alone = {name: stack[i : i + 1] for name, stack in data.items()}
        params = solved(one, alone, hparams)
        assert np.allclose(params[0], together[i], atol=1e-11)
        estimate = bilevel.hypergradient(one)(params, hparams, alone, alone)
        values.append(estimate.value)
        grads.append(estimate.grad["strength"])
    both = bilevel.hypergradient(TV)(together, hparams, data, data)
    assert float(both.value) == pytest.approx(np.mean(values))
    assert float(both.grad["strength"]) == pytest.approx(np.mean(grads), rel=1e-6)


def test_a_constant_map_is_a_number():
    data, hparams = pictures(), CASES["tv"][2]()
    flat = hparams | {"strength": jnp.full((SIDE, SIDE), 0.1)}
    params = solved(TV, data, hparams)
    assert np.allclose(params, solved(TV, data, flat), atol=1e-11)
    number, each = (bilevel.hypergradient(TV)(params, h, data, data).grad for h in (hparams, flat))
    assert float(number["strength"]) == pytest.approx(float(jnp.sum(each["strength"])), rel=1e-6)
    assert float(each["strength"][-1, -1]) == 0  # it has no difference to weigh


def test_a_margin_is_not_judged():
    data, params = pictures(), np.random.default_rng(0).standard_normal((PICTURES, SIDE, SIDE))
    middle = data["clean"][:, 3:-3, 3:-3]
    expected = 0.5 * np.sum((params[:, 3:-3, 3:-3] - middle) ** 2) / PICTURES
    assert float(TV.outer(params, NUMBERS, {"clean": middle})) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"'clean' pictures must have shape \(12, 12\).*got \(10, 12\)"):
        TV.outer(params, NUMBERS, {"clean": data["clean"][:, 1:-1]})


def test_problems_of_equal_settings_are_equal():
    for make in (
        lambda: imaging.tv_denoising(3),
        lambda: imaging.tv_deblurring(3, KERNEL),
        lambda: imaging.experts_denoising(3),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert imaging.tv_deblurring(3, KERNEL) != imaging.tv_deblurring(3, KERNEL, ridge=0.1)


@pytest.mark.parametrize(("case", "gain"), [("tv", 4.0), ("map", 4.0), ("experts", 2.0)])
def test_maid_learns_to_denoise(case, gain):
    problem, _, hparams = CASES[case]
    data = pictures(16)
    strength = {"tv": jnp.array(0.02), "map": jnp.full((16, 16), 0.05)}.get(case)
    start = hparams() if strength is None else {"strength": strength, "smoothing": jnp.array(0.05)}
    method = bilevel.maid(step_size=0.05, certify=case == "tv")
    result = bilevel.optimize(
        problem, jnp.asarray(data["noisy"]), start, data, data, method, 15, progress=False
    )
    values = result.history["value"]
    assert result.status == bilevel.Status.BUDGET
    assert np.all(values[1:] < values[:-1])
    assert np.all(
        imaging.psnr(result.params, data["clean"]) > imaging.psnr(data["noisy"], data["clean"]) + gain
    )


# --- Constants -------------------------------------------------------------------------------------


def ratios(fn, pairs):
    """``|fn(x) - fn(x')| / |x - x'|``, operator norms of matrices."""

    def one(x, other):
        difference = fn(x) - fn(other)
        difference = difference.reshape(x.size, -1) if difference.ndim > 1 else difference
        size = jnp.linalg.norm(difference, 2) if difference.ndim > 1 else jnp.linalg.norm(difference)
        return size / jnp.linalg.norm(x - other)

    return np.asarray(jax.jit(lambda xs, others: jax.lax.map(lambda p: one(*p), (xs, others)))(*pairs))


def near_and_far(scale, offset, shape):
    """Pairs of flat pictures on the scale at which the square roots bend, and along what filters see most."""
    rng = np.random.default_rng(0)
    checkers = (np.indices(shape[1:]).sum(0) % 2 * 2.0 - 1) * np.ones(shape)
    xs, others = [], []
    for i in range(24):
        x = scale * rng.uniform(0.1, 1) * (rng.standard_normal(shape) if i % 3 else checkers)
        direction = rng.standard_normal(shape) if i % 2 else checkers
        xs.append(offset + x.ravel())
        others.append(xs[-1] + 10.0 ** rng.uniform(-6, 0) * scale * direction.ravel())
    return jnp.asarray(np.stack(xs)), jnp.asarray(np.stack(others))


# How far above the largest ratio found may be: inner, cross, inverse_hessian.
LOOSE = {"tv": (1.2, 2, 8), "map": (2, 3, 8), "deblurring": (1.6, 2, 12), "experts": (2, 20, 8)}


@cases
def test_constants_bound_and_are_not_idle(case):
    problem, hparams = CASES[case][0], CASES[case][2]()
    side = 8
    shape = PICTURES, side, side
    if case == "map":
        hparams |= {"strength": hparams["strength"][:side, :side]}
    seen = side - 2 if case == "deblurring" else side
    data = {"noisy": jnp.zeros((PICTURES, seen, seen)), "clean": jnp.zeros(shape)}
    bend, offset = (4, 1.2) if case == "experts" else (1, 0.0)
    pairs = near_and_far(bend * float(jnp.max(hparams["smoothing"])), offset, shape)
    flat, unflat = jax.flatten_util.ravel_pytree(hparams)

    def slope(x, h):
        return jax.grad(lambda x: problem.inner(x.reshape(shape), unflat(h), data))(x)

    def hessian(x):
        return jax.jacfwd(lambda x: slope(x, flat))(x)

    known = certificates.constants(problem.smoothness, hparams, float)
    curvatures = np.linalg.eigvalsh(np.asarray(jax.lax.map(hessian, pairs[0])))
    found = {
        "inner": ratios(lambda x: slope(x, flat), pairs),
        "outer": ratios(jax.grad(lambda x: problem.outer(x.reshape(shape), hparams, data)), pairs),
        "cross": ratios(lambda x: jax.jacfwd(lambda h: slope(x, h))(flat), pairs),
        "inverse_hessian": ratios(lambda x: jnp.linalg.inv(hessian(x)), pairs),
    }
    found["inner"] = np.append(found["inner"], curvatures.max())
    assert known.strong_convexity <= curvatures.min() * (1 + 1e-12)
    for name, factor in zip(found, (LOOSE[case][0], 1 + 1e-9, *LOOSE[case][1:]), strict=True):
        constant = float(getattr(known, name))
        assert found[name].max() <= constant * (1 + 1e-9), name
        assert constant <= factor * found[name].max(), name


def test_the_supremum_of_filters_is_bounded_from_above_and_closely():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 7):
        filters, weights = rng.standard_normal((4, size, size)), rng.uniform(0, 1, 4)
        fine = np.fft.fft2(filters, s=(700, 700))
        exact = np.max(np.tensordot(weights, np.abs(fine) ** 2, 1))
        bound = float(imaging._supremum(weights, imaging._power(filters)))
        assert exact <= bound * (1 + 1e-12)
        assert bound <= 1.05 * exact


# --- Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: imaging.tv_denoising(0), ValueError, "pictures must be at least 1"),
        (lambda: imaging.tv_denoising(2.0), TypeError, "pictures must be a whole number"),
        (lambda: imaging.tv_deblurring(2, np.ones((2, 2))), ValueError, r"odd side, got shape \(2, 2\)"),
        (lambda: imaging.tv_deblurring(2, np.ones((3, 5))), ValueError, r"square.*got shape \(3, 5\)"),
        (lambda: imaging.tv_deblurring(2, np.zeros((3, 3))), ValueError, "not zero everywhere"),
        (lambda: imaging.tv_deblurring(2, KERNEL, ridge=0.0), ValueError, "ridge must be a positive"),
        (lambda: imaging.experts_denoising(2, peak=-1.0), ValueError, "peak must be a positive"),
        (lambda: imaging.first_experts(jax.random.key(0), 0), ValueError, "filters must be at least 1"),
        (lambda: imaging.psnr(np.ones((3, 3)), np.ones((3, 4))), ValueError, "pictures of one shape"),
        (lambda: imaging.total_variation(np.ones(3), 0.1), ValueError, r"x must be one picture.*\(3,\)"),
        (
            lambda: imaging.total_variation(np.ones((3, 3)), 0.1, np.ones(3)),
            ValueError,
            r"weight must be a number or of x's shape \(3, 3\), got shape \(3,\)",
        ),
        (
            lambda: imaging.field_of_experts(np.ones((2, 9)), experts()),
            ValueError,
            r"of side 3 do not fit into a picture of shape \(2, 9\)",
        ),
        (
            lambda: imaging.field_of_experts(np.ones((9, 9)), experts() | {"weight": jnp.ones(4)}),
            ValueError,
            r"experts\['weight'\] must have shape \(3,\), got \(4,\)",
        ),
        (
            lambda: imaging.field_of_experts(np.ones((9, 9)), experts() | {"filters": jnp.ones((3, 2, 3))}),
            ValueError,
            r"experts\['filters'\] must have shape \(K, size, size\), got \(3, 2, 3\)",
        ),
        (lambda: imaging.field_of_experts(np.ones((9, 9)), {}), TypeError, "experts must be a dict"),
    ],
)
def test_bad_settings_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


STACK = np.zeros((PICTURES, SIDE, SIDE))
NUMBERS = {"strength": 0.1, "smoothing": 0.1}


@pytest.mark.parametrize(
    ("params", "hparams", "batch", "error", "message"),
    [
        (STACK, NUMBERS, STACK, TypeError, "must be a dict with 'noisy'.*got ndarray"),
        (STACK[:, :9], NUMBERS, {"noisy": STACK}, ValueError, r"shape \(9, 12\).*got \(12, 12\)"),
        (STACK[0], NUMBERS, {"noisy": STACK}, ValueError, r"params must be.*\(2, H, W\).*got \(12, 12\)"),
        (STACK[:1], NUMBERS, {"noisy": STACK[:1]}, ValueError, r"pictures=2, got \(1, 12, 12\)"),
        (STACK, NUMBERS, {"noisy": list(STACK)}, ValueError, "'noisy' must be one array.*got list"),
        (STACK, NUMBERS, {"noisy": STACK[:, 2:-2]}, ValueError, r"'noisy'.*\(12, 12\).*got \(8, 12\)"),
        (STACK, {"strength": 0.1}, {"noisy": STACK}, TypeError, "hparams must be a dict with 'smoothing'"),
        (
            STACK,
            NUMBERS | {"strength": np.ones(3)},
            {"noisy": STACK},
            ValueError,
            r"hparams\['strength'\] must have shape \(\) or \(12, 12\), got \(3,\)",
        ),
    ],
)
def test_what_is_no_picture_is_named(params, hparams, batch, error, message):
    with pytest.raises(error, match=message):
        TV.inner(params, hparams, batch)


def test_optimize_names_unlike_pictures():
    data = pictures() | {"clean": STACK[:, :9]}
    with pytest.raises(ValueError, match=r"'clean' pictures must have shape \(12, 12\).*got \(9, 12\)"):
        bilevel.optimize(TV, STACK, NUMBERS, data, data, bilevel.maid(), 2, progress=False)
