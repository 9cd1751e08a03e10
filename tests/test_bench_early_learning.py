"""The study of early-learning regularisation: its loss, its targets, and derivatives through both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import central_difference

import bilevel
from benchmarks import early_learning as study

RNG = np.random.default_rng(0)
ROWS = 6


@pytest.fixture(autouse=True)
def _biases_are_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


PARAMS = {
    "hidden": RNG.standard_normal((5, 4)),
    "bias": 0.1 * RNG.standard_normal(4),
    "out": RNG.standard_normal((4, 3)),
    "shift": np.zeros(3),
}
X, Y = RNG.standard_normal((ROWS, 5)), np.array([0, 1, 2, 0, 1, 2])
TARGETS = RNG.dirichlet(np.ones(3), ROWS)
HPARAMS = {"lambda": 1.5, "beta": 0.7}
# Neither all rows nor in their order.
BATCH = {"x": X[[4, 1, 3]], "y": Y[[4, 1, 3]], "i": np.array([4, 1, 3])}
VALID = {"x": RNG.standard_normal((8, 5)), "y": RNG.integers(0, 3, 8)}


def predictions(params):
    x = np.maximum(BATCH["x"] @ params["hidden"] + params["bias"], 0)
    z = x @ params["out"] + params["shift"]
    e = np.exp(z - z.max(-1, keepdims=True))
    return x, e / e.sum(-1, keepdims=True)


@jax.jit
def value_and_grad(params, targets):
    """((loss, new targets), gradient) of the study's training loss."""
    return jax.value_and_grad(study.inner, has_aux=True)(params, HPARAMS, BATCH, targets)


def test_targets_move_by_the_stated_rule():
    _, p = predictions(PARAMS)
    assert 1e-4 < p.min() < p.max() < 1 - 1e-4
    (loss, targets), _ = value_and_grad(PARAMS, TARGETS)
    expected = TARGETS.copy()
    expected[BATCH["i"]] = 0.7 * TARGETS[BATCH["i"]] + 0.3 * p
    np.testing.assert_allclose(targets, expected, rtol=1e-12)
    by_hand = -np.log(p[np.arange(3), BATCH["y"]]).mean()
    by_hand += 1.5 * np.log(1 - (p * expected[BATCH["i"]]).sum(-1)).mean()
    np.testing.assert_allclose(loss, by_hand, rtol=1e-12)


def test_predictions_are_clipped_and_sum_to_one_as_targets():
    sure = PARAMS | {"out": 100 * PARAMS["out"]}
    (loss, targets), _ = value_and_grad(sure, np.zeros((ROWS, 3)))
    p = np.clip(predictions(sure)[1], 1e-4, 1 - 1e-4)
    assert p.min() == 1e-4
    np.testing.assert_allclose(targets[BATCH["i"]], 0.3 * p / p.sum(-1, keepdims=True), rtol=1e-12)
    assert np.isfinite(loss)


def test_training_takes_targets_for_constants():
    x, p = predictions(PARAMS)
    _, grads = value_and_grad(PARAMS, TARGETS)
    target = 0.7 * TARGETS[BATCH["i"]] + 0.3 * p
    by_p = -1.5 * target / (1 - (p * target).sum(-1, keepdims=True))
    by_z = p - np.eye(3)[BATCH["y"]] + p * (by_p - (p * by_p).sum(-1, keepdims=True))
    np.testing.assert_allclose(grads["out"], x.T @ by_z / 3, rtol=1e-10)
    np.testing.assert_allclose(grads["shift"], by_z.mean(0), rtol=1e-10)


STEPS = 6
ORDER = RNG.permuted(np.tile(np.arange(ROWS), (STEPS, 1)), axis=1)[:, :3]
BATCHES = {"x": X[ORDER], "y": Y[ORDER], "i": ORDER}


def estimate(problem, estimator):
    fn = bilevel.hypergradient(problem, estimator)
    targets = jnp.zeros((ROWS, 3))
    return jax.jit(lambda h: fn(PARAMS, h, bilevel.stacked(BATCHES), VALID, model_state=targets))


def by_differences(fn, step=1e-5):
    def value(h):
        return float(fn({"lambda": h[0], "beta": h[1]}).value)

    return [central_difference(value, np.array([1.5, 0.7]), np.eye(2)[i], step) for i in range(2)]


@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.unrolled(optax.sgd(0.3), STEPS, remat=False),
        bilevel.forward(optax.adam(0.05, eps_root=1e-5), STEPS),
    ],
    ids=["reverse mode, gradient steps", "forward mode, Adam"],
)
def test_hypergradients_are_those_of_finite_differences(estimator):
    fn = estimate(study.PROBLEM, estimator)
    grad, expected = fn(HPARAMS).grad, by_differences(fn)
    assert min(map(abs, expected)) > 1e-3
    np.testing.assert_allclose([grad["lambda"], grad["beta"]], expected, rtol=1e-6)


def test_a_stopped_gradient_in_its_place_is_refused(monkeypatch):
    # The published code stops gradients; here that stops the hypergradient as well.
    monkeypatch.setattr("bilevel.penalties.noisy_labels.held", jax.lax.stop_gradient)
    problem = bilevel.Problem(
        lambda *args: study.inner(*args),  # nothing that was read before is taken for it
        study.outer,
        constraints=study.PROBLEM.constraints.tree(),
        has_state=True,
    )
    with pytest.raises(ValueError, match=r"'beta'\] influences neither.* passes through stop_gradient"):
        estimate(problem, bilevel.forward(optax.sgd(0.3), STEPS))(HPARAMS)


def test_wrong_labels_are_as_many_as_stated():
    from sklearn.datasets import load_digits

    train, valid, test = study.digits(3)
    assert [len(part["y"]) for part in (train, valid, test)] == [1000, 300, 497]
    images, labels = load_digits(return_X_y=True)
    true = {row.tobytes(): label for row, label in zip((images / 16).astype(np.float32), labels, strict=True)}
    wrong = [
        sum(true[row.tobytes()] != label for row, label in zip(part["x"], part["y"], strict=True))
        for part in (train, valid, test)
    ]
    assert wrong == [400, 0, 0]
    np.testing.assert_array_equal(train["i"], np.arange(1000))
