"""Problems that every peer is given, in numpy alone: data, where to differentiate, and the right answer.

Of every kind params ``w`` and hyperparameters ``h`` are one array each, in unconstrained units::

    logistic   inner = mean_i log(1 + exp(-y_i x_i w)) + 1/2 sum_j exp(h_j) w_j^2             (1)
    cleaning   inner = mean_i sigmoid(h_i) ce(x_i w, y_i) + L2 / 2 |w|^2                      (2)
    rate       inner = mean_i log(1 + exp(-y_i x_i w)) + L2 / 2 |w|^2                         (3)

In (3) the scalar h is the logarithm of the learning rate: what depends on it is where gradient steps lead to.
outer is the mean loss on the validation rows. Right answers come from the formulas of `Reference`, in
float64: the adjoint system solved by conjugate gradients, reverse mode written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Rows of training and of validation, features.
SIZES = {
    "logistic": {"small": (500, 200, 20), "middle": (5000, 2000, 200), "large": (20_000, 5000, 1000)},
    "cleaning": {"small": (200, 100, 16), "middle": (800, 300, 64), "large": (5000, 1000, 100)},
}
SIZES["rate"] = SIZES["logistic"]
SEED = 0
CLASSES, L2 = 10, 3e-3
CG_STEPS = 20
OUTER_RATE = 0.1
FIRST = {"logistic": np.log(1e-2), "cleaning": 0.0}  # h, where a run begins
UNROLLED_STEPS, UNROLLED_RATE = 100, 0.5


class Instance(NamedTuple):
    """A problem with data, and where its hypergradient is asked for: ``w`` and ``h``."""

    kind: str
    w: np.ndarray
    h: np.ndarray
    x: np.ndarray
    y: np.ndarray
    valid_x: np.ndarray
    valid_y: np.ndarray


class Reference(NamedTuple):
    """Derivatives of an instance's losses: of inner by w, its products with a direction, of outer by w."""

    gradient: Callable
    product: Callable
    cross: Callable
    outer: Callable
    outer_gradient: Callable


# --- Data -------------------------------------------------------------------------------------------------


def logistic(size: str) -> Instance:
    """Features of standard deviations from 1 to 0.15, labels of -1 and 1; w is the inner solution."""
    start = _two_classes(size)
    return start._replace(w=solution(start))


def rate(size: str) -> Instance:
    """The data of `logistic`; w is zero."""
    return _two_classes(size)._replace(kind="rate", h=np.asarray(np.log(UNROLLED_RATE), np.float32))


def _two_classes(size: str) -> Instance:
    rows, valid, features = SIZES["logistic"][size]
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((rows + valid, features), np.float32) * np.geomspace(1, 0.15, features)
    x = x.astype(np.float32)
    slope = 4 * rng.standard_normal(features) / np.sqrt(features)
    y = np.where(x @ slope + rng.logistic(size=rows + valid) > 0, 1, -1).astype(np.int32)
    h = rng.uniform(-5, -3, features).astype(np.float32)
    return Instance("logistic", np.zeros(features), h, x[:rows], y[:rows], x[rows:], y[rows:])


def cleaning(size: str) -> Instance:
    """Ten clusters, half of the training labels wrong, a constant feature; w is the inner solution."""
    start = _clusters(size)
    return start._replace(w=solution(start))


def _clusters(size: str) -> Instance:
    from benchmarks.problems.cleaning import corrupted

    rows, valid, features = SIZES["cleaning"][size]
    rng = np.random.default_rng(SEED)
    y = rng.integers(0, CLASSES, rows + valid)
    centres = rng.standard_normal((CLASSES, features - 1))
    x = centres[y] + 1.5 * rng.standard_normal((rows + valid, features - 1))
    x = np.concatenate([x / np.sqrt(features / 8), np.ones((rows + valid, 1))], axis=1).astype(np.float32)
    return Instance(
        "cleaning",
        np.zeros((features, CLASSES)),
        np.zeros(rows, np.float32),
        x[:rows],
        corrupted(y[:rows], rng).astype(np.int32),
        x[rows:],
        y[rows:].astype(np.int32),
    )


def started(kind: str, size: str) -> Instance:
    """Where an outer run begins: w is zero, all of h is the same. The small size is real data."""
    if size == "small":
        return {"logistic": cancer, "cleaning": digits}[kind]()
    start = {"logistic": _two_classes, "cleaning": _clusters}[kind](size)
    return start._replace(h=np.full_like(start.h, FIRST[kind]))


def cancer() -> Instance:
    """Breast cancer, 150 rows each, standardised, a constant feature; starts from zero, like `digits`."""
    from benchmarks.problems import logistic

    return _of_study("logistic", logistic.make(SEED), ())


def digits() -> Instance:
    """800 digits for training, half of them with a wrong label, 300 for validation."""
    from benchmarks.problems import cleaning

    return _of_study("cleaning", cleaning.make(SEED), (CLASSES,))


def _of_study(kind: str, task, outputs: tuple[int, ...]) -> Instance:
    """With the data of a problem of the studies; one hyperparameter for each feature, or for each row."""
    (x, y), (valid_x, valid_y) = (
        (np.column_stack([part["x"], np.ones(len(part["x"]), np.float32)]), np.asarray(part["y"], np.int32))
        for part in (task.train, task.valid)
    )
    rows, features = x.shape
    count = {"logistic": features, "cleaning": rows}[kind]
    h = np.full(count, FIRST[kind], np.float32)
    return Instance(kind, np.zeros((features, *outputs)), h, x, y, valid_x, valid_y)


KINDS: dict[str, Callable[..., Instance]] = {"logistic": logistic, "cleaning": cleaning, "rate": rate}


def save(path: Path, instance: Instance, **more: np.ndarray) -> None:
    """For `load` in another process."""
    np.savez(path, **instance._asdict(), **more)


def load(path: Path) -> tuple[Instance, dict[str, np.ndarray]]:
    """The instance, and what else was saved with it."""
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in arrays}
    own = {name: found.pop(name) for name in Instance._fields}
    return Instance(**{**own, "kind": str(own["kind"])}), found


# --- Derivatives ------------------------------------------------------------------------------------------


def sigmoid(t):
    return 1 / (1 + np.exp(-np.clip(t, -500, 500)))


def reference(instance: Instance) -> Reference:
    """In float64."""
    x, valid_x = instance.x.astype(float), instance.valid_x.astype(float)
    maker = {"logistic": _logistic, "cleaning": _cleaning, "rate": _logistic}[instance.kind]
    return maker(instance, x, valid_x)


def _logistic(instance: Instance, x, valid_x) -> Reference:
    y, valid_y, learned = instance.y, instance.valid_y, instance.kind == "rate"

    def penalty(h):
        return L2 if learned else np.exp(h)

    def gradient(w, h):
        return -x.T @ (y * sigmoid(-y * (x @ w))) / len(y) + penalty(h) * w

    def product(w, h, v):
        p = sigmoid(x @ w)
        return x.T @ (p * (1 - p) * (x @ v)) / len(y) + penalty(h) * v

    return Reference(
        gradient=gradient,
        product=product,
        cross=lambda w, h, v: np.zeros_like(h) if learned else np.exp(h) * w * v,
        outer=lambda w: np.mean(np.logaddexp(0, -valid_y * (valid_x @ w))),
        outer_gradient=lambda w: -valid_x.T @ (valid_y * sigmoid(-valid_y * (valid_x @ w))) / len(valid_y),
    )


def _softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def _cleaning(instance: Instance, x, valid_x) -> Reference:
    one_hot, valid_one_hot = np.eye(CLASSES)[instance.y], np.eye(CLASSES)[instance.valid_y]
    rows, valid_rows = len(x), len(valid_x)

    def gradient(w, h):
        return x.T @ (sigmoid(h)[:, None] * (_softmax(x @ w) - one_hot)) / rows + L2 * w

    def product(w, h, v):
        p, t = _softmax(x @ w), x @ v
        curved = p * (t - np.sum(p * t, axis=1, keepdims=True))
        return x.T @ (sigmoid(h)[:, None] * curved) / rows + L2 * v

    def cross(w, h, v):
        weight = sigmoid(h)
        return weight * (1 - weight) * np.sum((_softmax(x @ w) - one_hot) * (x @ v), axis=1) / rows

    def outer(w):
        return -np.mean(np.log(np.sum(_softmax(valid_x @ w) * valid_one_hot, axis=1)))

    return Reference(
        gradient=gradient,
        product=product,
        cross=cross,
        outer=outer,
        outer_gradient=lambda w: valid_x.T @ (_softmax(valid_x @ w) - valid_one_hot) / valid_rows,
    )


# --- Right answers ----------------------------------------------------------------------------------------


def iterates(product, b, steps: int, tol: float = 0.0) -> Iterator[np.ndarray]:
    """Of conjugate gradients from zero: at most so many, until the residual is ``tol`` of b."""
    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    rr = first = np.vdot(r, r)
    for _ in range(steps):
        if rr <= tol**2 * first:
            return
        ap = product(p)
        alpha = rr / np.vdot(p, ap)
        x, r = x + alpha * p, r - alpha * ap
        rr, old = np.vdot(r, r), rr
        p = r + rr / old * p
        yield x


def conjugate_gradients(product, b, steps: int, tol: float = 0.0) -> np.ndarray:
    """The last of `iterates`."""
    x = np.zeros_like(b)
    for x in iterates(product, b, steps, tol):  # noqa: B007
        pass
    return x


def solution(instance: Instance, tol: float = 1e-10) -> np.ndarray:
    """Params at which the inner gradient is zero, by damped Newton steps from the instance's w."""
    ref, w = reference(instance), instance.w
    for _ in range(50):
        g = ref.gradient(w, instance.h)
        if np.linalg.norm(g) <= tol:
            return w
        if not np.all(np.isfinite(g)):
            break
        step = conjugate_gradients(lambda v: ref.product(w, instance.h, v), g, 500, 1e-3)  # noqa: B023
        size = 1.0
        while np.linalg.norm(ref.gradient(w - size * step, instance.h)) > np.linalg.norm(g):
            size /= 2
        w = w - size * step
    raise ArithmeticError(f"no inner solution of {instance.kind} to {tol}")


def implicit(instance: Instance, steps: int = 2000, tol: float = 1e-12) -> np.ndarray:
    """The hypergradient by the implicit function theorem at w, after so many steps of conjugate gradients."""
    ref, w, h = reference(instance), instance.w.astype(float), instance.h.astype(float)
    adjoint = conjugate_gradients(lambda v: ref.product(w, h, v), ref.outer_gradient(w), steps, tol)
    return -ref.cross(w, h, adjoint)


def steps_needed(instance: Instance, expected: np.ndarray, error: float) -> int:
    """Steps of conjugate gradients from zero after which the hypergradient has at most this error."""
    ref, w, h = reference(instance), instance.w.astype(float), instance.h.astype(float)
    found = iterates(lambda v: ref.product(w, h, v), ref.outer_gradient(w), 1000)
    for steps, adjoint in enumerate(found, 1):
        if relative(-ref.cross(w, h, adjoint), expected) <= error:
            return steps
    raise ArithmeticError(f"no error of {error} in 1000 steps")


def run(instance: Instance, steps: int) -> tuple[np.ndarray, ...]:
    """``(ws, hs, hypergradients)`` of an outer run: an inexact Newton step on w, an Adam step on h."""
    ref, w, h = reference(instance), instance.w.astype(float), instance.h.astype(float)
    first, second = np.zeros_like(h), np.zeros_like(h)
    found: list[tuple] = []
    for step in range(1, steps + 1):
        gradient = ref.gradient(w, h)
        w = w - conjugate_gradients(lambda v: ref.product(w, h, v), gradient, 50, 0.1)  # noqa: B023
        point = instance._replace(w=w, h=h)
        found.append((w, h, implicit(point, tol=1e-6)))
        slope = found[-1][2]
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        h = h - OUTER_RATE * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    ws, hs, slopes = (np.stack(each) for each in zip(*found, strict=True))
    return ws, hs, slopes


def unrolled(instance: Instance, steps: int = UNROLLED_STEPS, rate: float = UNROLLED_RATE) -> np.ndarray:
    """The derivative of outer after so many gradient steps from w, by reverse mode written out.

    ``rate`` is that of the steps, unless h is its logarithm.
    """
    ref, h = reference(instance), instance.h.astype(float)
    slope = 0.0
    if instance.kind == "rate":
        rate = slope = float(np.exp(h))
    points = [instance.w.astype(float)]
    for _ in range(steps):
        points.append(points[-1] - rate * ref.gradient(points[-1], h))
    alpha, found = ref.outer_gradient(points.pop()), np.zeros_like(h)
    for w in reversed(points):
        found -= rate * ref.cross(w, h, alpha) + slope * np.vdot(ref.gradient(w, h), alpha)
        alpha = alpha - rate * ref.product(w, h, alpha)
    return found


def relative(found, expected) -> float:
    """Euclidean error of an answer; inf where it is none."""
    found = np.asarray(found, float)
    if found.shape != expected.shape or not np.all(np.isfinite(found)):
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
