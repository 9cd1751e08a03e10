"""Penalties with traced strengths: closed forms in numpy, and derivatives by finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import central_difference

import bilevel
from bilevel import penalties

RNG = np.random.default_rng(0)
PARAMS = {
    "layer": {"kernel": RNG.standard_normal((3, 2)), "bias": RNG.standard_normal(2)},
    "out": RNG.standard_normal(4),
}
KERNEL, BIAS, OUT = PARAMS["layer"]["kernel"], PARAMS["layer"]["bias"], PARAMS["out"]
START = jax.tree.map(lambda x: x - 0.5, PARAMS)
ROWS, ENTRIES = RNG.uniform(1, 2, 3), RNG.uniform(1, 2, (3, 2))


def half_squares(kernel, bias, out):
    """``sum s w^2 / 2`` with the strengths of each leaf, as they multiply it."""
    return (np.sum(kernel * KERNEL**2) + np.sum(bias * BIAS**2) + np.sum(out * OUT**2)) / 2


# --- Strengths ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "one": (2.0, (2, 2, 2)),
    "subtrees": ({"layer": 2.0, "out": 3}, (2, 2, 3)),
    "leaves": ({"layer": {"kernel": 1.0, "bias": 2.0}, "out": 0.0}, (1, 2, 0)),
    "some": ({"layer": {"kernel": np.float32(1.5)}}, (1.5, 0, 0)),
    "none": ({}, (0, 0, 0)),
    "rows": ({"layer": {"kernel": ROWS}, "out": 1.0}, (ROWS[:, None], 0, 1)),
    "entries": ({"layer": {"kernel": ENTRIES, "bias": BIAS}, "out": OUT**2}, (ENTRIES, BIAS, OUT**2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strengths_are_for_all_for_subtrees_leaves_rows_or_entries(name):
    given, expected = LAYOUTS[name]
    np.testing.assert_allclose(penalties.l2(PARAMS, given), half_squares(*expected), rtol=1e-13)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 1.0}, r"strengths names \['layers'\], but params has \['layer'\], \['out'\]"),
        ({"layer": {"kernel": np.ones(2)}}, r"strengths\['layer'\]\['kernel'\].*\(3, 2\) or \(3,\) or \(\)"),
        ({"out": np.ones((4, 1))}, r"strengths\['out'\].* params\['out'\].*got shape \(4, 1\)"),
        (np.ones(3), r"strengths\['layer'\]\['bias'\].*got shape \(3,\)"),
        ([1.0, 2.0], "strengths names .* but params has"),
    ],
)
def test_strengths_of_another_tree_or_shape_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        penalties.l2(PARAMS, given)


@pytest.mark.parametrize("given", ["0.1", True, 1j, {"out": np.ones(4, bool)}])
def test_strengths_are_real_numbers(given):
    with pytest.raises(TypeError, match=r"strengths.* must be"):
        penalties.l1(PARAMS, given)


def test_params_are_floating():
    with pytest.raises(TypeError, match=r"params\['a'\] must be floating"):
        penalties.l2({"a": np.arange(3)}, 1.0)


# --- Sizes and distances -----------------------------------------------------------------------------------


def test_l1_elastic_net_and_distances_are_their_formulas():
    rows = {"layer": {"kernel": ROWS}}
    by_hand = np.sum(ROWS[:, None] * np.abs(KERNEL))
    np.testing.assert_allclose(penalties.l1(PARAMS, rows), by_hand, rtol=1e-13)
    np.testing.assert_allclose(
        penalties.elastic_net(PARAMS, rows, 2.0), by_hand + half_squares(2, 2, 2), rtol=1e-13
    )
    np.testing.assert_allclose(penalties.l2_to(PARAMS, {"out": 3.0}, START), 3 * 4 * 0.25 / 2, rtol=1e-13)
    assert penalties.l2_to(PARAMS, 3.0, PARAMS) == 0


def test_elastic_net_is_what_its_proximal_map_is_of():
    z, a, b = np.array([2.0, 0.3, -1.0]), np.array([0.5, 0.4, 0.1]), 0.7
    x = bilevel.prox.elastic_net(z, a, b)
    slope = jax.jit(jax.grad(lambda x: jnp.sum((x - z) ** 2) / 2 + penalties.elastic_net(x, a, b)))(x)
    np.testing.assert_allclose(slope[jnp.array([0, 2])], 0, atol=1e-15)
    assert x[1] == 0
    assert abs(slope[1]) < 0.4  # within the kink


@jax.jit
def slopes(by, params):
    """Derivatives of the sum of four penalties by params and strengths, and the mixed one."""

    def value(params, s):
        return (
            penalties.elastic_net(params, s["l1"], s["l2"])
            + penalties.l2_to(params, s["to"], START)
            + penalties.ewc(params, s["ewc"], START, jax.tree.map(jnp.abs, START))
        )

    first = jax.grad(value, (0, 1))(params, by)
    return *first, jax.jvp(lambda s: jax.grad(value)(params, s), (by,), (jax.tree.map(jnp.ones_like, by),))[1]


def test_derivatives_by_strengths_are_right_at_zero_too():
    by = {
        "l1": jnp.array(0.0),
        "l2": {"layer": {"kernel": jnp.zeros(3)}},
        "to": {"out": jnp.zeros(4)},
        "ewc": jnp.array(0.0),
    }
    by_params, grads, mixed = slopes(by, PARAMS)
    assert all(np.all(g == 0) for g in jax.tree.leaves(by_params))
    flat = np.concatenate([KERNEL.ravel(), BIAS, OUT])
    fisher = np.abs(flat - 0.5)
    np.testing.assert_allclose(grads["l1"], np.abs(flat).sum(), rtol=1e-13)
    np.testing.assert_allclose(grads["l2"]["layer"]["kernel"], np.sum(KERNEL**2, 1) / 2, rtol=1e-13)
    np.testing.assert_allclose(grads["to"]["out"], 0.125, rtol=1e-13)
    np.testing.assert_allclose(grads["ewc"], np.sum(fisher) / 8, rtol=1e-13)
    np.testing.assert_allclose(
        mixed["out"], np.sign(OUT) + 0.5 + 0.5 * np.abs(OUT - 0.5), rtol=1e-13
    )  # by all strengths at once
    np.testing.assert_allclose(
        mixed["layer"]["kernel"], np.sign(KERNEL) + KERNEL + 0.5 * np.abs(KERNEL - 0.5), rtol=1e-13
    )


def test_they_work_under_vmap_and_keep_float32():
    params = jax.tree.map(jnp.float32, PARAMS)
    many = jax.vmap(lambda s: penalties.elastic_net(params, s, {"out": s}))(jnp.float32([0.0, 1.0]))
    assert many.dtype == jnp.float32
    expected = np.abs(np.concatenate([KERNEL.ravel(), BIAS, OUT])).sum() + np.sum(OUT**2) / 2
    np.testing.assert_allclose(many, [0, expected], rtol=1e-6)


@pytest.mark.parametrize("name", ["start", "fisher"])
def test_other_trees_must_be_like_params(name):
    good = {"start": START, "fisher": START}
    with pytest.raises(ValueError, match=f"{name} must have the structure of params"):
        penalties.ewc(PARAMS, 1.0, **good | {name: START["layer"]})
    with pytest.raises(ValueError, match=rf"{name}\['out'\] must have the shape \(4,\).*got \(1,\)"):
        penalties.ewc(PARAMS, 1.0, **good | {name: START | {"out": np.ones(1)}})


def test_forgetting_is_that_of_recurrent_hypernetworks():
    like = {"kernel": np.ones((3, 2)), "bias": np.ones(2)}
    network = bilevel.nn.recurrent_hypernetwork(like, 3)

    @jax.jit
    def outputs():
        old, new = (network.init(jax.random.key(seed), like) for seed in range(2))
        each = (jax.vmap(lambda t, p=p: network(p, t))(jnp.arange(2)) for p in (old, new))
        return *each, bilevel.nn.forgetting(network, new, old, 2)

    before, now, expected = outputs()
    assert expected > 0.01
    by_hand = sum(np.sum((now[name] - before[name]) ** 2) for name in like) / 2
    np.testing.assert_allclose(expected, by_hand, rtol=1e-12)
    np.testing.assert_allclose(penalties.forgetting(now, 0.3, before), 0.3 * expected, rtol=1e-12)
    weighted = penalties.forgetting(now, {"bias": np.array([1.0, 0.0])}, before)  # of the first task alone
    np.testing.assert_allclose(weighted, np.sum((now["bias"] - before["bias"])[0] ** 2) / 2, rtol=1e-12)
    for outputs in ({"a": np.ones(2), "b": np.ones(3)}, np.float64(1.0)):
        with pytest.raises(ValueError, match="one leading axis of tasks"):
            penalties.forgetting(outputs, 1.0, outputs)


# --- Fisher information ------------------------------------------------------------------------------------

X = RNG.standard_normal((7, 3))


def linear(w, x):
    return x @ w


def losses(w, family, labels):
    """Negative log-likelihood of an average example."""
    z = X @ w
    if family == "categorical":
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, labels))
    if family == "bernoulli":
        return jnp.mean(optax.sigmoid_binary_cross_entropy(z, labels))
    return jnp.mean((z - labels) ** 2) / 2


FAMILIES = {
    "categorical": (RNG.standard_normal((3, 4)), RNG.integers(0, 4, 7)),
    "bernoulli": (RNG.standard_normal(3), RNG.integers(0, 2, 7).astype(float)),
    "gaussian": (RNG.standard_normal(3), RNG.standard_normal(7)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_linear_model_it_is_the_diagonal_of_the_hessian(family):
    w, labels = FAMILIES[family]
    fisher = penalties.fisher_diagonal(linear, w, X, family=family, batch_size=3)
    hessian = jax.jit(jax.hessian(lambda w: losses(w, family, labels)))(w).reshape(w.size, w.size)
    np.testing.assert_allclose(fisher.ravel(), np.diag(hessian), rtol=1e-12)
    # So EWC along one axis is the loss of the task before, to second order.
    axis = np.zeros(w.size)
    axis[1] = 0.7
    kept = penalties.ewc(w + axis.reshape(w.shape), 7.0, w, fisher)
    np.testing.assert_allclose(kept, 7 * axis @ hessian @ axis / 2, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_labels_it_is_the_mean_square_of_gradients(family):
    w, labels = FAMILIES[family]
    fisher = penalties.fisher_diagonal(linear, w, X, labels, family)
    z = X @ w
    if family == "categorical":
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        miss = np.eye(4)[labels] - p
    else:
        miss = (labels - (1 / (1 + np.exp(-z)) if family == "bernoulli" else z))[:, None]
    expected = np.mean((X[:, :, None] * miss[:, None, :]) ** 2, 0)
    np.testing.assert_allclose(fisher, expected.reshape(w.shape), rtol=1e-12)


def test_its_expectation_is_over_the_models_own_labels():
    w, _ = FAMILIES["categorical"]
    each = [penalties.fisher_diagonal(linear, w, x[None], np.array([c])) for x in X[:2] for c in range(4)]
    p = np.asarray(jax.nn.softmax(X[:2] @ w)).ravel()
    expected = np.tensordot(p, np.stack(each), 1) / 2
    np.testing.assert_allclose(penalties.fisher_diagonal(linear, w, X[:2]), expected, rtol=1e-12)


def test_it_is_summed_in_a_wide_dtype():
    """300 ones: beyond 256 bfloat16 knows no odd numbers, and a sum of ones stays there."""
    fisher = penalties.fisher_diagonal(
        lambda w, x: x * w, jnp.ones((), jnp.bfloat16), jnp.ones(300, jnp.bfloat16), family="gaussian"
    )
    assert fisher.dtype == jnp.bfloat16
    assert float(fisher) == 1.0
    wide = penalties.ewc(np.ones(2, np.float32), 1.0, np.zeros(2, np.float32), np.ones(2))
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"family": "normal"}, ValueError, "family must be 'categorical' or"),
        ({"predict": lambda w, x: x @ w[:, 0]}, ValueError, r"\(examples, classes\), got \(7,\).*bernoulli"),
        ({"predict": lambda w, x: jnp.sum(x @ w)}, ValueError, "one leading axis of examples"),
        ({"labels": np.zeros((7, 4), int)}, ValueError, r"labels must have the shape \(7,\), got \(7, 4\)"),
        ({"labels": np.zeros(7)}, TypeError, "whole numbers"),
        ({"labels": np.arange(7)}, ValueError, "from 0 to 3, the classes of predict, got 0 to 6"),
        ({"labels": np.arange(7) % 3 - 1}, ValueError, "from 0 to 3, .* got -1 to 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"predict": 3}, TypeError, "predict must be a function"),
    ],
)
def test_wrong_uses_of_fisher_diagonal_are_refused(change, error, words):
    good = {"predict": linear, "params": FAMILIES["categorical"][0], "inputs": X}
    with pytest.raises(error, match=words):
        penalties.fisher_diagonal(**good | change)


# --- Distillation ------------------------------------------------------------------------------------------

LOGITS, TEACHER = RNG.standard_normal((2, 3, 4))


def test_distillation_is_zero_at_the_teacher_with_the_gradient_of_cross_entropy():
    fn = jax.jit(jax.value_and_grad(penalties.distillation))
    value, slope = fn(LOGITS, 2.0, TEACHER, 3.0)
    q, p = (np.exp(z / 3) / np.exp(z / 3).sum(1, keepdims=True) for z in (TEACHER, LOGITS))
    np.testing.assert_allclose(value, 2 * 9 * np.mean(np.sum(q * np.log(q / p), 1)), rtol=1e-12)
    np.testing.assert_allclose(slope, 2 * 9 * (p - q) / 3 / 3, rtol=1e-12)
    value, slope = fn(TEACHER + 1.0, 2.0, TEACHER, 3.0)
    np.testing.assert_allclose(value, 0, atol=1e-14)
    np.testing.assert_allclose(slope, 0, atol=1e-14)


def test_distillation_at_high_temperatures_compares_logits():
    apart = LOGITS - TEACHER
    apart -= apart.mean(1, keepdims=True)
    expected = np.mean(ROWS * np.sum(apart**2, 1) / 8)
    # The next term of the series is smaller by the logits, which are below 3, over T.
    np.testing.assert_allclose(penalties.distillation(LOGITS, ROWS, TEACHER, 1e4), expected, rtol=3e-4)


def test_masked_classes_have_no_part_in_distillation():
    mask = np.array([0.0, 0.0, 0.0, -np.inf])
    fn = jax.jit(jax.value_and_grad(penalties.distillation, (0, 2, 3)))
    value, slopes = fn(LOGITS + mask, 1.0, TEACHER + mask, 2.0)
    expected, without = fn(LOGITS[:, :3], 1.0, TEACHER[:, :3], 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    for slope, other in zip(slopes[:2], without[:2], strict=True):
        np.testing.assert_allclose(slope[:, :3], other, rtol=1e-12)
        np.testing.assert_array_equal(slope[:, 3], 0)
    np.testing.assert_allclose(slopes[2], without[2], rtol=1e-12)
    # A class that the teacher alone has masked is there to be avoided: only the student's slope knows it.
    one_sided = penalties.distillation(LOGITS, 1.0, TEACHER + mask)
    q = np.exp(TEACHER[:, :3]) / np.exp(TEACHER[:, :3]).sum(1, keepdims=True)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    np.testing.assert_allclose(one_sided, np.mean(np.sum(q * np.log(q / p[:, :3]), 1)), rtol=1e-12)


def test_wrong_uses_of_distillation_are_refused():
    with pytest.raises(ValueError, match=r"one shape .* logits\[\.\.\., :classes\]"):
        penalties.distillation(LOGITS, 1.0, TEACHER[:, :2])
    with pytest.raises(ValueError, match=r"strengths must be a scalar .* got shape \(4,\)"):
        penalties.distillation(LOGITS, np.ones(4), TEACHER)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        penalties.distillation(LOGITS, 1.0, TEACHER, 0.0)


# --- Early learning: the study's own tests hold it against numpy -------------------------------------------


def test_targets_are_constant_to_the_innermost_derivative_only():
    targets = np.full((3, 4), 0.1)

    @functools.partial(jax.jit, static_argnames="held")
    def slope(momentum, held=True):
        new = penalties.early_learning(jnp.asarray(LOGITS), 1.0, targets, momentum)[1]

        def with_constants(z):
            p = jnp.clip(jax.nn.softmax(z), 1e-4, 1 - 1e-4)
            return jnp.mean(jnp.log(1 - jnp.sum(p * new, -1)))

        def penalty(z):
            return penalties.early_learning(z, 1.0, targets, momentum)[0]

        return jnp.vdot(jax.grad(penalty if held else with_constants)(LOGITS), TEACHER)

    np.testing.assert_allclose(slope(0.7), slope(0.7, held=False), rtol=1e-13)
    by_momentum = jax.jit(jax.grad(slope))(0.7)
    expected = central_difference(lambda m: float(slope(m)), 0.7, 1.0, 1e-3)
    assert abs(expected) > 1e-2
    np.testing.assert_allclose(by_momentum, expected, rtol=1e-9)
    one_each = penalties.early_learning(LOGITS, 1.0, targets, np.array([0.7, 0.2, 0.7]))[1]
    both = [penalties.early_learning(LOGITS, 1.0, targets, m)[1] for m in (0.7, 0.2)]
    np.testing.assert_allclose(one_each[:2], [both[0][0], both[1][1]], rtol=1e-13)
    with pytest.raises(ValueError, match=r"take the targets of the batch"):
        penalties.early_learning(LOGITS, 1.0, np.zeros((9, 4)), 0.7)


def test_early_learning_of_sure_predictions_in_short_floats():
    """1 - 1e-4 is 1 in bfloat16 and 0.9999 in float16, where its distance from 1 is 2 % off."""
    logits = np.array([[30.0, 0.0], [0.0, 30.0]])
    expected, targets = penalties.early_learning(logits, 2.0, np.eye(2), 0.7)
    for dtype in (jnp.bfloat16, jnp.float16):
        short, new = penalties.early_learning(
            jnp.asarray(logits, dtype), 2.0, jnp.asarray(np.eye(2), dtype), 0.7
        )
        assert short.dtype == new.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(float(short), expected, rtol=eps)
        np.testing.assert_allclose(new.astype(float), targets, rtol=eps)
    slope = jax.grad(lambda z: penalties.early_learning(z, 1.0, jnp.eye(2, dtype=z.dtype), 0.7)[0])
    assert np.isfinite(slope(jnp.asarray([[3.0, 0.0], [0.0, 3.0]], jnp.bfloat16)).astype(float)).all()
    with pytest.raises(TypeError, match="targets must be floating"):
        penalties.early_learning(logits, 2.0, np.eye(2, dtype=int), 0.7)


# --- Slopes ------------------------------------------------------------------------------------------------


def bowl(w, x):
    """Its slope is ``mean(x) w``."""
    return x * jnp.sum(w**2) / 2


def test_gradient_norm_is_right_and_flat_at_zero():
    w, x = np.array([3.0, 4.0]), np.array([1.0, 3.0])
    fn = jax.jit(lambda w: jax.value_and_grad(penalties.gradient_norm, (0, 1))(w, 0.5, bowl, x))
    value, slopes = fn(w)
    np.testing.assert_allclose(value, 5.0, rtol=1e-13)
    np.testing.assert_allclose(slopes[0], w / 5, rtol=1e-13)
    np.testing.assert_allclose(slopes[1], 10.0, rtol=1e-13)
    at_zero = fn(np.zeros(2))
    assert jax.tree.all(jax.tree.map(lambda v: np.all(np.asarray(v) == 0), at_zero))
    with pytest.raises(ValueError, match="strength must be a scalar"):
        penalties.gradient_norm(w, np.ones(2), bowl, x)


def test_gradient_norm_of_tiny_and_huge_slopes():
    for size in (1e-25, 1e25):
        w = np.float32(size) * np.float32([3.0, 4.0])
        value, slope = jax.value_and_grad(penalties.gradient_norm)(w, 2.0, bowl, np.ones(1, np.float32))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, 10 * size, rtol=1e-6)
        np.testing.assert_allclose(slope, [1.2, 1.6], rtol=1e-6)


def miss(w, hparams, batch):
    return jnp.sum((w - batch["target"]) ** 2) / 2


def steepness(w, hparams, batch):
    return penalties.gradient_norm(w, 1.0, bowl, batch["x"]) - hparams["bound"]


LAGRANGIAN = penalties.primal_dual(miss, steepness, rate=0.3)


@jax.jit
def descended(bound):
    batch, hparams = {"target": jnp.array([3.0, 4.0]), "x": jnp.ones(2)}, {"bound": bound}

    def step(_, at):
        w, multiplier = at
        slope, multiplier = jax.grad(LAGRANGIAN, has_aux=True)(w, hparams, batch, multiplier)
        return w - 0.3 * slope, multiplier

    return jax.lax.fori_loop(0, 400, step, (jnp.ones(2), jnp.array(1e-3)))


def test_where_primal_and_dual_come_to_rest_the_constraint_holds():
    # |w| at most 1, and the target has length 5: the multiplier is what pulls it back.
    w, multiplier = descended(1.0)
    np.testing.assert_allclose(w, [0.6, 0.8], rtol=1e-12)
    np.testing.assert_allclose(multiplier, 4.0, rtol=1e-12)


def test_a_constraint_that_does_not_bind_has_no_multiplier():
    w, multiplier = descended(6.0)
    np.testing.assert_allclose(w, [3.0, 4.0], rtol=1e-12)
    assert multiplier == 0  # not below


def test_a_primal_dual_loss_is_an_inner_loss_with_state():
    problem = bilevel.Problem(LAGRANGIAN, lambda w, h, batch, m: jnp.sum(w**2), has_state=True)
    batch = {"target": jnp.array([3.0, 4.0]), "x": jnp.ones(2)}
    fn = bilevel.hypergradient(problem, bilevel.forward(optax.sgd(0.3), 200))
    w, multiplier = descended(1.0)
    estimate = jax.jit(fn)(w, {"bound": 1.0}, batch, batch, model_state=multiplier)
    # At rest |w| is the bound, so that d |w|^2 / d bound = 2.
    np.testing.assert_allclose(estimate.grad["bound"], 2.0, rtol=1e-9)
    assert penalties.primal_dual(miss, steepness, 0.3) == LAGRANGIAN
    with pytest.raises(ValueError, match="rate must be a positive number"):
        penalties.primal_dual(miss, steepness, 0.0)


# --- Graphs ------------------------------------------------------------------------------------------------

POINTS, VALUES = RNG.standard_normal((6, 2)), 5 + RNG.standard_normal((6, 3))


def dense(graph):
    matrix = np.zeros((6, 6))
    np.put_along_axis(matrix, np.asarray(graph.indices), np.asarray(graph.weights), 1)
    return matrix


laplacian = jax.jit(penalties.laplacian)


def test_laplacian_is_the_trace():
    weights = RNG.uniform(0, 1, (6, 6))
    sides = (weights + weights.T) / 2
    matrix = np.diag(sides.sum(1)) - sides
    expected = 0.7 * np.trace(VALUES.T @ matrix @ VALUES)
    np.testing.assert_allclose(laplacian(VALUES, 0.7, weights), expected, rtol=1e-12)
    apart = np.sum((VALUES[:, None] - VALUES[None]) ** 2, -1)
    np.testing.assert_allclose(expected, 0.7 * np.sum(weights * apart) / 2, rtol=1e-12)
    graph = penalties.nearest(POINTS, 2, 0.8)
    np.testing.assert_allclose(
        laplacian(VALUES, 0.7, graph), laplacian(VALUES, 0.7, dense(graph)), rtol=1e-12
    )
    np.testing.assert_allclose(laplacian(VALUES[:, 0], 1.0, graph), laplacian(VALUES[:, :1], 1.0, graph))


def test_no_product_of_a_laplacian_is_short():
    made = str(jax.make_jaxpr(penalties.laplacian)(VALUES, 1.0, np.ones((6, 6))))
    products = made.count("dot_general")
    assert products == made.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_nearest_has_normalised_weights_of_the_nearest_others():
    graph = penalties.nearest(POINTS, 3, 0.8)
    squares = np.sum((POINTS[:, None] - POINTS[None]) ** 2, -1)
    np.fill_diagonal(squares, np.inf)
    expected = np.exp(-squares / (2 * 0.8**2)) * (np.argsort(np.argsort(squares, 1), 1) < 3)
    np.testing.assert_allclose(dense(graph), expected / expected.sum(1, keepdims=True), rtol=1e-12)


def test_width_is_differentiable():
    value = jax.jit(lambda width: penalties.laplacian(VALUES, 0.7, penalties.nearest(POINTS, 3, width)))
    expected = central_difference(lambda w: float(value(w)), 0.8, 1.0, 1e-3)
    assert abs(expected) > 1e-2
    np.testing.assert_allclose(jax.grad(value)(0.8), expected, rtol=1e-8)
    assert np.isfinite(jax.grad(value)(1e-3))


def test_wrong_graphs_are_refused():
    with pytest.raises(ValueError, match=r"got shape \(5, 5\) for values of shape \(6, 3\)"):
        penalties.laplacian(VALUES, 1.0, np.ones((5, 5)))
    with pytest.raises(ValueError, match=r"got shape \(6, 2\)"):
        penalties.laplacian(VALUES[:5], 1.0, penalties.nearest(POINTS, 2, 1.0))
    with pytest.raises(ValueError, match="k must be less than the number of examples, 6, got 6"):
        penalties.nearest(POINTS, 6, 1.0)
    with pytest.raises(ValueError, match="width must be positive"):
        penalties.nearest(POINTS, 2, -1.0)
    with pytest.raises(ValueError, match=r"\(n, features\)"):
        penalties.nearest(POINTS[0], 2, 1.0)
