"""Bad input fails early and says what to do: the argument, what came, what was expected."""

import io
import json
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import archive, inner_loops, loop

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(8, 3)), "y": RNG.normal(size=8)}
PARAMS, HPARAMS = np.zeros(3), {"l2": 0.1}
KEY = jax.random.key(0)
INNER, OUTER = optax.sgd(0.1), optax.sgd(0.05)
METHOD = bilevel.alternating(bilevel.implicit(bilevel.cg(max_steps=3)), INNER, OUTER, inner_steps=2)
UNROLLED = bilevel.unrolled(INNER, steps=2)


def train_loss(params, hparams, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2) + hparams["l2"] * jnp.sum(params**2)


def valid_loss(params, hparams, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


PROBLEM = bilevel.Problem(train_loss, valid_loss)


def problem(inner=train_loss, outer=valid_loss, **settings):
    return bilevel.Problem(inner, outer, **settings)


def repeated(times):
    """Data as stacked batches, the same one so many times."""
    return bilevel.stacked(jax.tree.map(lambda x: np.stack([x] * times), DATA))


def generator(batches=5):
    return (DATA for _ in range(batches))


class LoopReached(BaseException):
    """The driver asked for its compiled loop: the input was accepted."""


@pytest.fixture(autouse=True)
def no_loop(monkeypatch):
    """Every refusal in this file comes before the loop is compiled."""

    def compiled(plan):
        raise LoopReached

    monkeypatch.setattr(loop, "compiled", compiled)


def refuses(call, error, fragments):
    """The call raises exactly this error, with one line that holds the fragments."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type in (error, archive.MissingFileError), f"a {caught.type.__name__} slipped through"
    assert "\n" not in message
    assert message.endswith(".")
    for fragment in fragments:
        assert fragment in message


# --- Problem, params, hparams and data, through every door -------------------------------------------


def by_optimize(problem=PROBLEM, params=PARAMS, hparams=HPARAMS, train=DATA, valid=DATA, **settings):
    settings = {"method": METHOD, "steps": 2, "progress": False, **settings}
    return bilevel.optimize(problem, params, hparams, train, valid, **settings)


def by_init(problem=PROBLEM, params=PARAMS, hparams=HPARAMS, train=DATA, valid=DATA, key=KEY):
    return METHOD.init(problem, params, hparams, train, valid, key=key)


def by_implicit(problem=PROBLEM, params=PARAMS, hparams=HPARAMS, train=DATA, valid=DATA, key=KEY):
    return bilevel.hypergradient(problem)(params, hparams, train, valid, key)


def by_unrolled(problem=PROBLEM, params=PARAMS, hparams=HPARAMS, train=DATA, valid=DATA, key=KEY):
    return bilevel.hypergradient(problem, UNROLLED)(params, hparams, train, valid, key)


DOORS = {
    "optimize": by_optimize,
    "init": by_init,
    "implicit": by_implicit,
    "unrolled": by_unrolled,
}


def scaled(loss, factor):
    return lambda params, hparams, batch: loss(params, hparams, batch) * factor


def residuals(params, hparams, batch):
    return hparams["l2"] * (batch["x"] @ params - batch["y"]) ** 2


def count(params, hparams, batch):
    return jnp.sum(params > hparams["l2"])


def two_arguments(params, hparams):
    return hparams["l2"] * jnp.sum(params**2)


def four_arguments(params, hparams, batch, state):
    return train_loss(params, hparams, batch)


def keyword_only(params, hparams, batch, *, state):
    return train_loss(params, hparams, batch)


def with_metrics(metrics):
    def outer(params, hparams, batch):
        return valid_loss(params, hparams, batch), metrics(params)

    return outer


SIGNATURE = "(params, hparams, batch)"
EVERYWHERE = [
    # losses that are no floating scalar
    ("vector inner", {"problem": problem(residuals)}, ValueError, ["inner", "scalar", "(8,)"]),
    ("vector outer", {"problem": problem(outer=residuals)}, ValueError, ["outer", "scalar", "(8,)"]),
    (
        "complex inner",
        {"problem": problem(scaled(train_loss, 1j))},
        TypeError,
        ["inner", "real floating", "complex128"],
    ),
    (
        "complex outer",
        {"problem": problem(outer=scaled(valid_loss, 1j))},
        TypeError,
        ["outer", "real floating", "complex128"],
    ),
    ("integer inner", {"problem": problem(count)}, TypeError, ["inner", "floating", "int"]),
    ("integer outer", {"problem": problem(outer=count)}, TypeError, ["outer", "floating", "int"]),
    (
        "python integer",
        {"problem": problem(outer=lambda params, hparams, batch: 1)},
        TypeError,
        ["outer", "floating", "int"],
    ),
    (
        "no outer at all",
        {"problem": problem(outer=lambda params, hparams, batch: None)},
        TypeError,
        ["outer", "scalar", "None"],
    ),
    (
        "outer in a list",
        {"problem": problem(outer=lambda *args: [valid_loss(*args)])},
        TypeError,
        ["outer", "scalar"],
    ),
    # signatures
    ("inner of 2", {"problem": problem(two_arguments)}, TypeError, ["inner", SIGNATURE, "too many"]),
    ("inner of 4", {"problem": problem(four_arguments)}, TypeError, ["inner", SIGNATURE, "'state'"]),
    ("outer of 2", {"problem": problem(outer=two_arguments)}, TypeError, ["outer", SIGNATURE, "too many"]),
    ("outer of 4", {"problem": problem(outer=four_arguments)}, TypeError, ["outer", SIGNATURE, "'state'"]),
    ("keyword only", {"problem": problem(outer=keyword_only)}, TypeError, ["outer", SIGNATURE, "'state'"]),
    # metrics
    (
        "metrics of inner",
        {"problem": problem(lambda *args: (train_loss(*args), {"a": 1.0}))},
        TypeError,
        ["inner", "one scalar", "tuple", "metrics belong to outer"],
    ),
    (
        "vector metric",
        {"problem": problem(outer=with_metrics(lambda params: {"size": params}))},
        ValueError,
        ["outer", "'size'", "scalar", "(3,)"],
    ),
    (
        "complex metric",
        {"problem": problem(outer=with_metrics(lambda params: {"size": 1j * params[0]}))},
        TypeError,
        ["outer", "'size'", "complex"],
    ),
    (
        "nested metric",
        {"problem": problem(outer=with_metrics(lambda params: {"of": {"size": params[0]}}))},
        ValueError,
        ["outer", "'of'", "scalar"],
    ),
    (
        "metric without a name",
        {"problem": problem(outer=with_metrics(lambda params: {0: params[0]}))},
        ValueError,
        ["outer", "metric 0", "name"],
    ),
    (
        "metrics in a list",
        {"problem": problem(outer=with_metrics(lambda params: [params[0]]))},
        TypeError,
        ["outer", "(scalar, dict of scalar metrics)"],
    ),
    # hparams
    ("empty hparams", {"hparams": {}}, ValueError, ["hparams", "at least one floating array", "{}"]),
    ("no hparams", {"hparams": None}, ValueError, ["hparams", "at least one floating array", "None"]),
    ("integer hparams", {"hparams": {"l2": 1}}, TypeError, ["hparams['l2']", "floating", "int", "1.0"]),
    (
        "integer array",
        {"hparams": {"l2": jnp.arange(3)}},
        TypeError,
        ["hparams['l2']", "floating", "int64"],
    ),
    ("boolean hparams", {"hparams": {"l2": True}}, TypeError, ["hparams['l2']", "floating", "bool"]),
    ("complex hparams", {"hparams": {"l2": 1j}}, TypeError, ["hparams['l2']", "floating", "complex128"]),
    ("text hparams", {"hparams": {"l2": "0.1"}}, TypeError, ["hparams['l2']", "floating", "'0.1'"]),
    ("an object", {"hparams": {"l2": object()}}, TypeError, ["hparams['l2']", "floating", "object"]),
    ("empty leaf", {"hparams": {"l2": jnp.zeros(0)}}, ValueError, ["hparams['l2']", "empty", "(0,)"]),
    ("nan hparams", {"hparams": {"l2": float("nan")}}, ValueError, ["hparams['l2']", "finite", "nan"]),
    ("infinite hparams", {"hparams": {"l2": jnp.inf}}, ValueError, ["hparams['l2']", "finite", "inf"]),
    # params
    ("empty params", {"params": {}}, ValueError, ["params", "at least one floating array", "{}"]),
    ("integer params", {"params": np.arange(3)}, TypeError, ["params", "floating", "int64"]),
    ("nan params", {"params": np.full(3, np.nan)}, ValueError, ["params", "finite", "nan"]),
    (
        "params of another shape",
        {"params": np.zeros(4)},
        ValueError,
        ["inner", "params fit", "params = float64[4]", "x: float64[8, 3]"],
    ),
    (
        "params of another structure",
        {"params": {"w": np.zeros(3)}},
        ValueError,
        ["inner", "params fit", "{w: float64[3]}"],
    ),
    # data
    ("no data", {"train": None}, ValueError, ["train", "no arrays", "None"]),
    ("empty tree", {"valid": {}}, ValueError, ["valid", "no arrays", "{}"]),
    ("text data", {"train": "train.csv"}, TypeError, ["train", "numeric", "'train.csv'"]),
    ("text array", {"valid": {"x": np.array(["a"])}}, TypeError, ["valid", "['x']", "numeric"]),
    ("an object as data", {"train": object()}, TypeError, ["train", "numeric", "object"]),
    (
        "objects in an array",
        {"train": {**DATA, "x": np.array([[1.0, 2.0], [3.0]], dtype=object)}},
        TypeError,
        ["train", "['x']", "numeric"],
    ),
    (
        "no rows",
        {"train": {"x": np.zeros((0, 3)), "y": np.zeros(0)}},
        ValueError,
        ["train", "['x']", "empty", "(0, 3)"],
    ),
    (
        "ragged whole arrays",
        {"train": {**DATA, "y": np.zeros(9)}},
        ValueError,
        ["inner", "float64[8, 3]", "float64[9]"],
    ),
    ("ragged lists", {"train": {**DATA, "x": [[1.0, 2.0], [3.0]]}}, ValueError, ["inner", "batch = {x: [["]),
    ("a part is missing", {"valid": {"x": DATA["x"]}}, ValueError, ["outer", "'y'", "batch = {x:"]),
    ("stacked for 3 steps", {"train": repeated(3)}, ValueError, ["train", "stacked", "3"]),
    (
        "stacked for 3 steps under keys",
        {
            "problem": problem(lambda params, hparams, batch: train_loss(params, hparams, batch[0])),
            "train": bilevel.with_rng(repeated(3)),
        },
        ValueError,
        ["train", "stacked", "3"],
    ),
    ("stacked validation", {"valid": repeated(2)}, TypeError, ["valid", "stacked", "only train"]),
    # constraints
    (
        "constraint on an unknown name",
        {"problem": problem(constraints={"l3": bilevel.positive()})},
        ValueError,
        ["constraints", "['l3']", "['l2']"],
    ),
    (
        "constraint below a leaf",
        {"problem": problem(constraints={"l2": {"a": bilevel.positive()}})},
        ValueError,
        ["constraints['l2']", "['a']", "one array"],
    ),
    (
        "constraints in a list",
        {"problem": problem(constraints=[bilevel.positive()])},
        ValueError,
        ["constraints", "[0]", "['l2']"],
    ),
    # keys
    ("integer key", {"key": 0}, TypeError, ["key", "PRNG key", "got 0"]),
    ("key of floats", {"key": jnp.zeros(2)}, TypeError, ["key", "PRNG key", "float64(2,)"]),
    ("batch of keys", {"key": jax.random.split(KEY, 2)}, TypeError, ["key", "one PRNG key", "(2,)"]),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("changes", "error", "fragments"), [row[1:] for row in EVERYWHERE], ids=[row[0] for row in EVERYWHERE]
)
def test_refused_everywhere(changes, error, fragments, door):
    refuses(lambda: DOORS[door](**changes), error, fragments)


STARTS = [
    ("positive at 0", bilevel.positive(), 0.0, ["greater than 0", "got 0"]),
    ("positive below", bilevel.positive(), -1.0, ["greater than 0", "got -1"]),
    ("positive nan", bilevel.positive(), np.nan, ["nan"]),
    ("interval at its lower end", bilevel.interval(0.5, 2), 0.5, ["strictly between 0.5 and 2", "got 0.5"]),
    ("interval at its upper end", bilevel.interval(0.5, 2), 2.0, ["strictly between 0.5 and 2", "got 2"]),
    ("interval outside", bilevel.interval(0.5, 2), 7.0, ["strictly between 0.5 and 2", "bilevel.box"]),
    ("box below", bilevel.box(0.5, 2), 0.25, ["between 0.5 and 2", "got 0.25"]),
    ("box above", bilevel.box(0.5, 2), 2.5, ["between 0.5 and 2", "got 2.5"]),
    ("one of many", bilevel.positive(), np.array([1.0, -2.0, 3.0]), ["from -2 to 3"]),
    ("simplex of another sum", bilevel.simplex(), np.array([0.5, 0.6]), ["must sum to 1, sums to 1.1"]),
    ("simplex at a corner", bilevel.simplex(), np.array([0.0, 1.0]), ["entries greater than 0", "0 to 1"]),
    ("simplex outside", bilevel.simplex(), np.array([2.0, -1.0]), ["entries greater than 0", "from -1"]),
    ("simplex nan", bilevel.simplex(), np.array([np.nan, 1.0]), ["nan"]),
]


@pytest.mark.parametrize("door", ["optimize", "init"])
@pytest.mark.parametrize(
    ("constraint", "start", "fragments"), [row[1:] for row in STARTS], ids=[row[0] for row in STARTS]
)
def test_start_outside_its_constraint(constraint, start, fragments, door):
    def loss(params, hparams, batch):
        return train_loss(params, {"l2": jnp.sum(hparams["l2"])}, batch)

    constrained = problem(loss, constraints={"l2": constraint})
    refuses(
        lambda: DOORS[door](problem=constrained, hparams={"l2": start}),
        ValueError,
        ["hparams['l2']", *fragments],
    )


@pytest.mark.parametrize("start", [0.5, 2.0])
def test_a_box_may_start_at_its_ends(start):
    with pytest.raises(LoopReached):
        by_optimize(problem=problem(constraints={"l2": bilevel.box(0.5, 2)}), hparams={"l2": start})


# --- Hyperparameters that influence nothing ---------------------------------------------------------


def closure(params, hparams, batch):
    return train_loss(params, HPARAMS, batch)


def detached(params, hparams, batch):
    return train_loss(params, jax.lax.stop_gradient(hparams), batch)


def detached_in_jit(params, hparams, batch):
    return jax.jit(lambda w, h: train_loss(w, jax.lax.stop_gradient(h), batch))(params, hparams)


def unread_in_jit(params, hparams, batch):
    return jax.jit(lambda w, h: train_loss(w, HPARAMS, batch))(params, hparams)


def rounded(params, hparams, batch):
    return train_loss(params, {"l2": jnp.round(hparams["l2"])}, batch)


def through_an_integer(params, hparams, batch):
    return train_loss(params, {"l2": hparams["l2"].astype(jnp.int32).astype(float)}, batch)


def carried_through_scan(params, hparams, batch):
    """Hparams pass through the loop and are dropped at its end."""

    def step(carry, _):
        loss, l2 = carry
        return (loss + jnp.sum(params**2), l2), l2

    (loss, _), _ = jax.lax.scan(step, (train_loss(params, HPARAMS, batch), hparams["l2"]), length=3)
    return loss


def detached_in_scan(params, hparams, batch):
    def step(loss, _):
        return loss + jax.lax.stop_gradient(hparams["l2"]) * jnp.sum(params**2), None

    return jax.lax.scan(step, train_loss(params, HPARAMS, batch), length=3)[0]


def used_in_scan(params, hparams, batch):
    def step(loss, _):
        return loss + hparams["l2"] * jnp.sum(params**2), None

    return jax.lax.scan(step, train_loss(params, HPARAMS, batch), length=3)[0]


CLOSURE = ["hparams['l2'] influences neither inner nor outer", "closure", "bilevel.fixed()"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "inner",
    [
        closure,
        detached,
        detached_in_jit,
        unread_in_jit,
        rounded,
        through_an_integer,
        carried_through_scan,
        detached_in_scan,
    ],
    ids=lambda inner: inner.__name__,
)
def test_idle_hyperparameter(inner, door):
    refuses(lambda: DOORS[door](problem=problem(inner)), ValueError, CLOSURE)


@pytest.mark.parametrize("door", ["init", "implicit", "unrolled"])
@pytest.mark.parametrize("inner", [closure, residuals], ids=lambda inner: inner.__name__)
def test_refused_under_jit(inner, door):
    """What shapes and jaxprs show is refused inside the user's own jit as well."""

    @jax.jit
    def call(params, hparams, data):
        return DOORS[door](problem=problem(inner), params=params, hparams=hparams, train=data, valid=data)

    fragments = CLOSURE if inner is closure else ["inner must return a scalar", "(8,)"]
    refuses(lambda: call(PARAMS, HPARAMS, DATA), ValueError, fragments)


def test_idle_hyperparameters_are_all_named():
    hparams = {"l2": 0.1, "a": {"b": [1.0, jnp.ones(2)]}}
    fragments = ["hparams['a']['b'][0], hparams['a']['b'][1] influence neither", "closure"]
    refuses(lambda: by_optimize(hparams=hparams), ValueError, fragments)
    with pytest.raises(ValueError, match="influence neither") as caught:
        by_init(hparams=hparams)
    assert "l2" not in str(caught.value)


def only_outer(params, hparams, batch):
    return valid_loss(params, hparams, batch) + hparams["l2"] ** 2


ALLOWED = [
    ("only inner", problem(), HPARAMS),
    ("only outer", problem(valid_loss, only_outer), HPARAMS),
    ("in a scan", problem(used_in_scan), HPARAMS),
    ("declared fixed", problem(constraints={"i": bilevel.fixed()}), {"l2": 0.1, "i": 1.0}),
    ("all fixed", problem(closure, constraints=bilevel.fixed()), HPARAMS),
]


@pytest.mark.parametrize(
    ("allowed", "hparams"), [row[1:] for row in ALLOWED], ids=[row[0] for row in ALLOWED]
)
def test_hyperparameter_that_influences_enough(allowed, hparams):
    with pytest.raises(LoopReached):
        by_optimize(problem=allowed, hparams=hparams)
    assert by_init(problem=allowed, hparams=hparams).hparams.keys() == hparams.keys()
    assert by_unrolled(problem=allowed, hparams=hparams).grad.keys() == hparams.keys()


# --- Everything else that one call shows ---------------------------------------------------------------


def alternating(estimator=None, inner=INNER, outer=OUTER, **settings):
    return bilevel.alternating(
        bilevel.implicit() if estimator is None else estimator, inner, outer, **settings
    )


def minibatches(arrays=DATA, batch_size=2, **settings):
    return bilevel.minibatches(arrays, batch_size, **settings)


def outer_with(name):
    return problem(outer=with_metrics(lambda params: {name: params[0]}))


def zeros_start(hparams, batch, key):
    return jnp.zeros(3) * hparams["l2"]


FIXED_POINT = bilevel.FixedPoint(lambda params, hparams, batch: 0.5 * params + hparams["l2"], valid_loss)
TUNED = bilevel.tuned(lambda hparams: optax.sgd(hparams["l2"]))


def by_trajectory(make, hparams=HPARAMS, **settings):
    """A run with the optimiser that a function makes of hparams."""
    tuned = bilevel.tuned(make)
    return by_optimize(method=alternating(bilevel.unrolled(), tuned), hparams=hparams, **settings)


def by_episodes(pairs, valid=None):
    return by_optimize(train=bilevel.episodes(pairs), valid=valid)


def inner_solver():
    return inner_loops.lbfgs()


CALLS = [
    # fixed points, starts, model state
    ("update is no function", lambda: bilevel.FixedPoint(3, valid_loss), TypeError, ["update", "3"]),
    ("map without outer", lambda: bilevel.FixedPoint(train_loss, None), TypeError, ["outer", "None"]),
    ("start is no function", lambda: problem(start=PARAMS), TypeError, ["start", "(hparams, batch, key)"]),
    (
        "loss as map",
        lambda: by_optimize(
            problem=bilevel.FixedPoint(train_loss, valid_loss), method=alternating(inner=None)
        ),
        ValueError,
        ["update must return what it was given", "float64[3]", "float64[]"],
    ),
    (
        "optimiser for a map",
        lambda: by_optimize(problem=FIXED_POINT),
        ValueError,
        ["inner must be None", "FixedPoint"],
    ),
    (
        "optimiser for an unrolled map",
        lambda: by_unrolled(problem=FIXED_POINT),
        ValueError,
        ["inner must be None", "FixedPoint"],
    ),
    (
        "start of another shape",
        lambda: by_optimize(problem=problem(start=zeros_start), params=np.zeros(4)),
        ValueError,
        ["start", "float64[4]", "float64[3]"],
    ),
    ("no params", lambda: by_optimize(params=None), ValueError, ["params", "None"]),
    (
        "no model_state",
        lambda: by_optimize(problem=problem(has_state=True)),
        ValueError,
        ["model_state", "None"],
    ),
    (
        "model_state for nothing",
        lambda: by_optimize(model_state={"mean": 0.0}),
        ValueError,
        ["model_state", "has_state=True"],
    ),
    (
        "model_state in init for nothing",
        lambda: METHOD.init(PROBLEM, PARAMS, HPARAMS, DATA, DATA, key=KEY, model_state=1.0),
        ValueError,
        ["model_state", "has_state=True"],
    ),
    # lift, composite
    ("loss to lift", lambda: bilevel.lift(train_loss), TypeError, ["problem", "train_loss"]),
    ("no predict", lambda: bilevel.composite(1, train_loss), TypeError, ["predict", "1"]),
    ("no loss", lambda: bilevel.composite(train_loss, None), TypeError, ["loss", "None"]),
    ("number as penalty", lambda: bilevel.composite(abs, abs, 0.1), TypeError, ["penalty", "0.1"]),
    (
        "gauss_newton of a plain loss",
        lambda: by_optimize(method=alternating(bilevel.implicit(curvature="gauss_newton"))),
        TypeError,
        ["gauss_newton", "bilevel.composite("],
    ),
    (
        "gauss_newton over batches",
        lambda: bilevel.implicit(curvature="gauss_newton", batches=2),
        ValueError,
        ["batches", "Gauss-Newton"],
    ),
    # tuned optimisers, schedules, inner solvers
    ("optimiser in tuned", lambda: bilevel.tuned(INNER), TypeError, ["tuned", "hparams"]),
    ("number in tuned", lambda: bilevel.tuned(0.1), TypeError, ["tuned", "hparams", "0.1"]),
    ("tuned itself", lambda: bilevel.unrolled(bilevel.tuned, 3), TypeError, ["inner", "tuned(...)"]),
    ("tuned outside", lambda: alternating(outer=TUNED), TypeError, ["outer", "optax"]),
    (
        "tuned and implicit",
        lambda: alternating(inner=TUNED),
        TypeError,
        ["tuned", "trajectory", "bilevel.unrolled()", "implicit()"],
    ),
    (
        "tuned to no optimiser",
        lambda: by_trajectory(lambda hparams: hparams["l2"]),
        TypeError,
        ["tuned", "optax"],
    ),
    (
        "tuned by another name",
        lambda: by_trajectory(lambda hparams: optax.sgd(hparams["rate"])),
        ValueError,
        ["tuned", "'rate'"],
    ),
    ("number as per_step", lambda: bilevel.unrolled(per_step={"l2": 1}), TypeError, ["per_step", "True"]),
    ("text as per_step", lambda: bilevel.forward(per_step="l2"), TypeError, ["per_step", "'l2'"]),
    (
        "per_step of another length",
        lambda: by_optimize(
            method=alternating(bilevel.unrolled(per_step=True), inner_steps=3), hparams={"l2": np.ones(2)}
        ),
        ValueError,
        ["hparams['l2']", "per_step", "3 inner steps", "(2,)"],
    ),
    (
        "linear solver inside",
        lambda: alternating(inner=bilevel.cg()),
        TypeError,
        ["inner", "a linear solver"],
    ),
    (
        "inner solver as linear solver",
        lambda: bilevel.implicit(inner_solver()),
        TypeError,
        ["solver", "bilevel.cg()", "an inner solver"],
    ),
    (
        "inner solver unrolled",
        lambda: bilevel.unrolled(inner_solver(), 3),
        TypeError,
        ["inner", "an inner solver"],
    ),
    # strata, episodes
    ("strata 0", lambda: minibatches(strata=0), ValueError, ["strata", "at least 1", "got 0"]),
    ("text fixed", lambda: minibatches(fixed="no"), TypeError, ["fixed", "True or False", "'no'"]),
    ("text restart", lambda: alternating(restart="no"), TypeError, ["restart", "True or False", "'no'"]),
    ("number simultaneous", lambda: alternating(simultaneous=1), TypeError, ["simultaneous", "True", "1"]),
    ("text remat", lambda: bilevel.unrolled(remat="no"), TypeError, ["remat", "or 'steps'", "'no'"]),
    (
        "MultiSteps",
        lambda: alternating(inner=optax.MultiSteps(optax.sgd(0.1), 2)),
        TypeError,
        ["inner", "MultiSteps", ".gradient_transformation()"],
    ),
    (
        "constraint on nothing",
        lambda: by_optimize(
            problem=problem(constraints={"none": bilevel.positive()}), hparams={"l2": 0.1, "none": {}}
        ),
        ValueError,
        ["constraints['none']", "hparams['none']", "no array"],
    ),
    (
        "params of no size",
        lambda: by_optimize(params={"w": np.zeros(3), "e": np.zeros((0, 2))}),
        ValueError,
        ["params['e']", "empty", "drop the leaf"],
    ),
    ("strata 3 of 2", lambda: minibatches(strata=3), ValueError, ["strata", "batch_size = 2", "got 3"]),
    ("text strata", lambda: minibatches(strata="2"), TypeError, ["strata", "whole", "'2'"]),
    ("true strata", lambda: minibatches(strata=True), TypeError, ["strata", "whole", "True"]),
    ("number of episodes", lambda: bilevel.episodes(3), TypeError, ["episodes", "pairs", "3"]),
    ("dict of episodes", lambda: bilevel.episodes({"a": 1}), TypeError, ["episodes", "pairs", "{'a': 1}"]),
    ("no episode", lambda: by_episodes([]), ValueError, ["episodes", "without any"]),
    ("single episodes", lambda: by_episodes(iter([DATA])), ValueError, ["episodes", "pairs (train, valid)"]),
    ("triples", lambda: by_episodes([(DATA, DATA, DATA)]), ValueError, ["episodes", "pairs (train, valid)"]),
    ("episodes and valid", lambda: by_episodes([(DATA, DATA)], DATA), ValueError, ["valid must be None"]),
    (
        "episodes as valid",
        lambda: by_optimize(valid=bilevel.episodes([(DATA, DATA)])),
        TypeError,
        ["valid", "episodes"],
    ),
    ("no valid", lambda: by_optimize(valid=None), ValueError, ["valid", "None"]),
    # values that are not finite at the start
    (
        "nan inner",
        lambda: by_optimize(problem=problem(scaled(train_loss, np.nan))),
        ValueError,
        ["inner is nan", "start values"],
    ),
    (
        "infinite outer",
        lambda: by_optimize(problem=problem(outer=scaled(valid_loss, np.inf))),
        ValueError,
        ["outer is inf", "start values"],
    ),
    (
        "nan in the data",
        lambda: by_optimize(valid={**DATA, "y": np.full(8, np.nan)}),
        ValueError,
        ["outer is nan", "nan in the data"],
    ),
    # minibatches, stacked, with_rng
    (
        "ragged rows",
        lambda: minibatches({"x": np.ones((3, 2)), "y": np.ones(4)}),
        ValueError,
        ["minibatches", "(3, 2)", "(4,)"],
    ),
    ("no leading axis", lambda: minibatches(1.0), ValueError, ["minibatches", "leading axis", "()"]),
    ("no arrays", lambda: minibatches({}), ValueError, ["minibatches", "no arrays", "{}"]),
    ("no rows", lambda: minibatches(np.ones((0, 2))), ValueError, ["minibatches", "empty", "(0, 2)"]),
    ("text rows", lambda: minibatches(np.array(["a", "b"])), TypeError, ["minibatches", "numeric"]),
    ("generator of rows", lambda: minibatches(generator()), TypeError, ["minibatches", "iterable"]),
    ("batch size 0", lambda: minibatches(batch_size=0), ValueError, ["batch_size", "at least 1", "got 0"]),
    ("negative batch size", lambda: minibatches(batch_size=-2), ValueError, ["batch_size", "got -2"]),
    ("batch size 9", lambda: minibatches(batch_size=9), ValueError, ["batch_size", "at most the 8", "got 9"]),
    ("text batch size", lambda: minibatches(batch_size="2"), TypeError, ["batch_size", "whole", "'2'"]),
    ("float batch size", lambda: minibatches(batch_size=2.0), TypeError, ["batch_size", "whole", "2.0"]),
    ("true batch size", lambda: minibatches(batch_size=True), TypeError, ["batch_size", "whole", "True"]),
    ("ragged stack", lambda: bilevel.stacked([np.ones(3), np.ones(4)]), ValueError, ["stacked", "(4,)"]),
    ("scalar stack", lambda: bilevel.stacked(1.0), ValueError, ["stacked", "leading axis", "()"]),
    ("empty stack", lambda: bilevel.stacked([]), ValueError, ["stacked", "no arrays", "[]"]),
    ("generator of a stack", lambda: bilevel.stacked(generator()), TypeError, ["stacked", "iterable"]),
    (
        "keys for an iterable at a point",
        lambda: by_implicit(train=bilevel.with_rng(generator())),
        TypeError,
        ["train_batch", "iterable"],
    ),
    # iterables where only the driver takes them
    (
        "iterable at a point",
        lambda: by_implicit(train=generator()),
        TypeError,
        ["train_batch", "iterable", "bilevel.optimize"],
    ),
    (
        "validation iterable at a point",
        lambda: by_unrolled(valid=generator()),
        TypeError,
        ["valid_batch", "iterable", "bilevel.optimize"],
    ),
    ("iterable in init", lambda: by_init(train=generator()), TypeError, ["train", "iterable"]),
    (
        "iterable in step",
        lambda: METHOD.step(PROBLEM, by_init(), generator(), DATA),
        TypeError,
        ["train", "iterable", "bilevel.optimize"],
    ),
    (
        "validation iterable in step",
        lambda: METHOD.step(PROBLEM, by_init(), DATA, generator()),
        TypeError,
        ["valid", "iterable", "bilevel.optimize"],
    ),
    (
        "stack of another length in step",
        lambda: METHOD.step(PROBLEM, by_init(), repeated(3), DATA),
        ValueError,
        ["train", "stacked", "3"],
    ),
    ("empty iterable", lambda: by_optimize(train=iter([])), ValueError, ["train", "without any batch"]),
    ("iterable of text", lambda: by_optimize(train=iter(["a"])), TypeError, ["train[0]", "numeric"]),
    (
        "iterable of other things",
        lambda: by_optimize(train=iter([1.0])),
        ValueError,
        ["inner", "params fit", "batch = float64[]"],
    ),
    ("iterable as test", lambda: by_optimize(test=generator()), TypeError, ["test", "iterable"]),
    ("stacked test", lambda: by_optimize(test=repeated(2)), TypeError, ["test", "stacked"]),
    ("test of another shape", lambda: by_optimize(test=1.0), ValueError, ["outer", "batch = float64[]"]),
    # constraints
    ("text constraint", lambda: problem(constraints={"l2": "positive"}), TypeError, ["constraints", "'pos"]),
    (
        "constraint not called",
        lambda: problem(constraints={"l2": bilevel.positive}),
        TypeError,
        ["constraints", "bilevel.positive()", "function positive"],
    ),
    (
        "unknown name given to the driver",
        lambda: by_optimize(constraints={"l3": bilevel.positive()}),
        ValueError,
        ["constraints", "['l3']", "['l2']"],
    ),
    ("reversed interval", lambda: bilevel.interval(1, 0), ValueError, ["interval", "lo < hi", "lo=1"]),
    ("empty interval", lambda: bilevel.interval(1, 1), ValueError, ["interval", "lo < hi", "lo=1", "hi=1"]),
    ("reversed box", lambda: bilevel.box(1, 0), ValueError, ["box", "lo < hi", "lo=1", "hi=0"]),
    ("nan end", lambda: bilevel.box(0, np.nan), ValueError, ["box", "lo < hi", "hi=nan"]),
    ("infinite end", lambda: bilevel.interval(0, np.inf), ValueError, ["interval", "finite", "inf"]),
    ("text end", lambda: bilevel.interval("a", 1), TypeError, ["interval", "two numbers", "'a'"]),
    ("number as text", lambda: bilevel.box("0", 1), TypeError, ["box", "two numbers", "'0'"]),
    # numbers of the driver
    ("steps 0", lambda: by_optimize(steps=0), ValueError, ["steps", "at least 1", "got 0"]),
    ("steps -3", lambda: by_optimize(steps=-3), ValueError, ["steps", "at least 1", "got -3"]),
    ("text steps", lambda: by_optimize(steps="5"), TypeError, ["steps", "whole number", "'5'"]),
    ("float steps", lambda: by_optimize(steps=5.0), TypeError, ["steps", "whole number", "5.0"]),
    ("true steps", lambda: by_optimize(steps=True), TypeError, ["steps", "whole number", "True"]),
    ("judge_every 0", lambda: by_optimize(judge_every=0), ValueError, ["judge_every", "at least 1"]),
    ("text tol", lambda: by_optimize(tol="small"), TypeError, ["tol", "number", "'small'"]),
    ("negative tol", lambda: by_optimize(tol=-1.0), ValueError, ["tol", "at least 0", "-1"]),
    ("nan tol", lambda: by_optimize(tol=np.nan), ValueError, ["tol", "finite", "nan"]),
    ("number as callback", lambda: by_optimize(callbacks=3), TypeError, ["callbacks", "(step, rows)", "3"]),
    ("a list of it", lambda: by_optimize(callbacks=[3]), TypeError, ["callbacks", "(step, rows)", "3"]),
    # numbers of a method, an estimator, a solver
    ("inner_steps 0", lambda: alternating(inner_steps=0), ValueError, ["inner_steps", "at least 1", "0"]),
    ("text inner_steps", lambda: alternating(inner_steps="2"), TypeError, ["inner_steps", "whole", "'2'"]),
    ("float inner_steps", lambda: alternating(inner_steps=2.0), TypeError, ["inner_steps", "whole", "2.0"]),
    ("period 0", lambda: alternating(period=0), ValueError, ["period", "at least 1", "0"]),
    ("warmup -1", lambda: alternating(warmup=-1), ValueError, ["warmup", "at least 0", "-1"]),
    ("max_steps 0", lambda: bilevel.cg(max_steps=0), ValueError, ["max_steps", "at least 1", "0"]),
    ("float max_steps", lambda: bilevel.cg(max_steps=1e2), TypeError, ["max_steps", "whole", "100.0"]),
    ("text cg tol", lambda: bilevel.cg(tol="1e-3"), TypeError, ["tol", "number", "'1e-3'"]),
    ("negative atol", lambda: bilevel.cg(atol=-1.0), ValueError, ["atol", "at least 0", "-1"]),
    ("negative damping", lambda: bilevel.cg(damping=-1.0), ValueError, ["damping", "at least 0", "-1"]),
    ("text follow", lambda: bilevel.cg(follow="yes"), TypeError, ["follow", "'yes'"]),
    ("preconditioner", lambda: bilevel.cg(preconditioner=3), TypeError, ["preconditioner", "init", "3"]),
    ("terms 0", lambda: bilevel.neumann(0, 0.1), ValueError, ["terms", "at least 1", "0"]),
    ("negative terms", lambda: bilevel.neumann(-1, 0.1), ValueError, ["terms", "at least 1", "-1"]),
    ("text terms", lambda: bilevel.neumann("3", 0.1), TypeError, ["terms", "whole", "'3'"]),
    ("step_size 0", lambda: bilevel.neumann(3, 0.0), ValueError, ["step_size", "positive", "0"]),
    ("infinite step_size", lambda: bilevel.neumann(3, np.inf), ValueError, ["step_size", "positive", "inf"]),
    ("negative batches", lambda: bilevel.implicit(batches=-1), ValueError, ["batches", "at least 0", "-1"]),
    ("curvature", lambda: bilevel.implicit(curvature="fisher"), ValueError, ["curvature", "'fisher'"]),
    ("unrolled 0", lambda: bilevel.unrolled(INNER, 0), ValueError, ["steps", "at least 1", "0"]),
    ("text unrolled", lambda: bilevel.unrolled(INNER, "9"), TypeError, ["steps", "whole", "'9'"]),
    ("truncate 0", lambda: bilevel.unrolled(INNER, 2, truncate=0), ValueError, ["truncate", "at least 1"]),
    ("truncate 3", lambda: bilevel.forward(INNER, 2, truncate=3), ValueError, ["truncate", "2", "got 3"]),
    # the right thing in the wrong place
    ("no problem", lambda: by_optimize(problem=train_loss), TypeError, ["problem", "train_loss"]),
    ("none at a point", lambda: bilevel.hypergradient(train_loss), TypeError, ["problem", "train_loss"]),
    ("inner is no function", lambda: problem(inner=3), TypeError, ["inner", SIGNATURE, "3"]),
    ("outer is no function", lambda: problem(outer=None), TypeError, ["outer", SIGNATURE, "None"]),
    (
        "optimiser as method",
        lambda: by_optimize(method=optax.adam(1e-2)),
        TypeError,
        ["method", "bilevel.alternating(", "an optax optimiser"],
    ),
    (
        "estimator as method",
        lambda: by_optimize(method=bilevel.implicit()),
        TypeError,
        ["method", "bilevel.alternating(", "an estimator"],
    ),
    ("text as method", lambda: by_optimize(method="sgd"), TypeError, ["method", "alternating(", "'sgd'"]),
    (
        "solver as estimator",
        lambda: alternating(bilevel.cg()),
        TypeError,
        ["estimator", "bilevel.implicit()", "a linear solver"],
    ),
    (
        "solver as estimator at a point",
        lambda: bilevel.hypergradient(PROBLEM, bilevel.cg()),
        TypeError,
        ["estimator", "bilevel.implicit()", "a linear solver"],
    ),
    (
        "estimator as solver",
        lambda: bilevel.implicit(bilevel.unrolled()),
        TypeError,
        ["solver", "bilevel.cg()", "an estimator"],
    ),
    (
        "optimiser as solver",
        lambda: bilevel.implicit(INNER),
        TypeError,
        ["solver", "bilevel.cg()", "an optax optimiser"],
    ),
    ("number as inner", lambda: alternating(inner=0.1), TypeError, ["inner", "optax", "0.1"]),
    ("number as outer", lambda: alternating(outer=0.1), TypeError, ["outer", "optax", "0.1"]),
    ("number in unrolled", lambda: bilevel.unrolled(0.1, 3), TypeError, ["inner", "optax", "0.1"]),
    ("number in one_step", lambda: bilevel.one_step(0.1), TypeError, ["inner", "optax", "0.1"]),
    (
        "no inner",
        lambda: by_optimize(method=alternating(inner=None)),
        TypeError,
        ["inner", "optax", "None", "FixedPoint"],
    ),
    ("no outer", lambda: alternating(outer=None), TypeError, ["outer", "optax", "None"]),
    # factories that were not called
    ("implicit", lambda: alternating(bilevel.implicit), TypeError, ["estimator", "implicit(...)"]),
    ("unrolled", lambda: bilevel.hypergradient(PROBLEM, bilevel.unrolled), TypeError, ["unrolled(...)"]),
    ("cg", lambda: bilevel.implicit(bilevel.cg), TypeError, ["solver", "cg(...)"]),
    ("alternating", lambda: by_optimize(method=bilevel.alternating), TypeError, ["method", "call it"]),
    ("adam inside", lambda: alternating(inner=optax.adam), TypeError, ["inner", "adam(...)"]),
    ("adam outside", lambda: alternating(outer=optax.adam), TypeError, ["outer", "adam(...)"]),
    ("adam unrolled", lambda: bilevel.unrolled(optax.adam, 3), TypeError, ["inner", "adam(...)"]),
    # the inner loop twice, half or not at all
    (
        "inner twice",
        lambda: alternating(bilevel.unrolled(INNER, 3)),
        ValueError,
        ["inner", "twice", "alternating", "unrolled"],
    ),
    (
        "inner_steps twice",
        lambda: alternating(bilevel.forward(INNER, 3), inner=None, inner_steps=3),
        ValueError,
        ["inner_steps", "twice", "alternating", "forward"],
    ),
    ("no steps", lambda: alternating(bilevel.unrolled(INNER), inner=None), ValueError, ["inner=", "steps="]),
    ("steps alone", lambda: alternating(bilevel.unrolled(steps=3)), ValueError, ["inner=", "steps="]),
    (
        "no loop at all",
        lambda: bilevel.hypergradient(PROBLEM, bilevel.unrolled())(PARAMS, HPARAMS, DATA, DATA),
        ValueError,
        ["unrolled()", "inner=", "steps="],
    ),
    ("period", lambda: alternating(bilevel.unrolled(), period=2), ValueError, ["period", "implicit family"]),
    (
        "simultaneous",
        lambda: alternating(bilevel.unrolled(), simultaneous=True),
        ValueError,
        ["simultaneous", "implicit family"],
    ),
    # metrics that clash with columns of the history
    ("metric value", lambda: by_optimize(problem=outer_with("value")), ValueError, ["outer", "value"]),
    ("metric step", lambda: by_optimize(problem=outer_with("step")), ValueError, ["outer", "step", "clash"]),
    (
        "metric seconds",
        lambda: by_optimize(problem=outer_with("seconds")),
        ValueError,
        ["outer", "seconds", "history"],
    ),
    ("metric hvp", lambda: by_optimize(problem=outer_with("hvp")), ValueError, ["outer", "hvp", "history"]),
    (
        "metric that test= would write",
        lambda: by_optimize(
            problem=problem(outer=with_metrics(lambda params: {"a": params[0], "test_a": params[1]})),
            test=DATA,
        ),
        ValueError,
        ["outer", "test_a", "history"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "fragments"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS]
)
def test_refused(call, error, fragments):
    refuses(call, error, fragments)


UNKNOWN = [
    (bilevel.optimize, "step"),
    (bilevel.Problem, "constraint"),
    (bilevel.alternating, "steps"),
    (bilevel.implicit, "max_steps"),
    (bilevel.unrolled, "inner_steps"),
    (bilevel.forward, "remat"),
    (bilevel.one_step, "steps"),
    (bilevel.cg, "maxiter"),
    (bilevel.neumann, "max_steps"),
    (bilevel.dense, "tol"),
    (bilevel.minibatches, "size"),
    (bilevel.positive, "lo"),
    (bilevel.interval, "low"),
    (bilevel.FixedPoint, "inner"),
    (bilevel.composite, "model"),
    (bilevel.tuned, "learning_rate"),
    (bilevel.lift, "folds"),
    (bilevel.simplex, "size"),
    (bilevel.gmres, "maxiter"),
]


@pytest.mark.parametrize(("fn", "keyword"), UNKNOWN, ids=[fn.__name__ for fn, _ in UNKNOWN])
def test_unknown_keyword(fn, keyword):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        fn(**{keyword: 1})


def test_a_loss_that_is_a_python_float():
    constant = problem(outer=lambda params, hparams, batch: 1.0)
    assert by_implicit(problem=constant).value == 1.0
    assert by_unrolled(problem=constant).value == 1.0
    with pytest.raises(LoopReached):
        by_optimize(problem=constant)


def test_dense_names_its_limit():
    method = alternating(bilevel.implicit(bilevel.dense()))
    large = problem(
        lambda params, hparams, batch: hparams["l2"] * jnp.sum(params**2),
        lambda params, hparams, batch: jnp.sum(params),
    )
    refuses(
        lambda: by_optimize(problem=large, params=np.zeros(6000), method=method),
        ValueError,
        ["bilevel.dense()", "6000 x 6000", "5000", "bilevel.cg()"],
    )


# --- Files -----------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


def result(params, hparams):
    """A result without a run."""
    return bilevel.Result(
        params=params,
        hparams=hparams,
        best=bilevel.Best(params, hparams, 0.5, 0),
        history={"step": np.arange(2), "value": np.array([0.5, 0.6])},
        trajectory=bilevel.Trajectory(np.arange(2), jax.tree.map(lambda x: np.zeros(2), hparams), (False,)),
        status=bilevel.Status.BUDGET,
        message="done.",
        seconds=1.0,
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.bilevel"
    result({"w": np.zeros(3)}, HPARAMS).save(path)
    return path


def refuses_file(path, fragments=("path", "not a file that bilevel wrote")):
    refuses(lambda: bilevel.load(path), ValueError, [*fragments, str(path)])


def test_missing_file(tmp_path):
    refuses_file(tmp_path / "none.bilevel", ("path", "no file"))
    refuses_file(tmp_path, ("path", "no file"))
    with pytest.raises(FileNotFoundError):
        bilevel.load(tmp_path / "none.bilevel")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    refuses_file(saved)


def test_flipped_bits(saved):
    """A stored array that no longer matches its checksum is not returned."""
    saved_bytes = saved.read_bytes()
    at = saved_bytes.index(b"\x93NUMPY") + 130
    saved.write_bytes(saved_bytes[:at] + bytes([saved_bytes[at] ^ 255]) + saved_bytes[at + 1 :])
    refuses_file(saved)


def test_text_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("l2 = 0.1\n" * 100)
    refuses_file(path)


def manifest(**changes):
    whole = {"format": "bilevel", "version": 1, "dtypes": [], "trees": {}, "meta": {"kind": "result"}}
    kept = {**whole, **changes}
    return json.dumps({name: value for name, value in kept.items() if value is not None}).encode()


MANIFESTS = {
    "none": None,
    "no utf-8": b"\xff\xfe",
    "no json": b"l2 = 0.1",
    "list": b"[]",
    "number": b"3",
    "empty": b"{}",
    "another format": manifest(format="other"),
    "no trees": manifest(trees=None),
    "no meta": manifest(meta=None),
    "no result": manifest(),
    "a missing array": manifest(dtypes=["float64"]),
    "a missing leaf": manifest(trees={"params": 7}),
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_zip_that_is_something_else(tmp_path, manifest):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
        if manifest is not None:
            archive.writestr("manifest.json", manifest)
    refuses_file(path)


def test_npz(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, params=np.zeros(3))
    refuses_file(path)


class Trap:
    """Unpickling it leaves a trace."""

    sprung = False

    def __reduce__(self):
        return spring, ()


def spring():
    Trap.sprung = True
    return Trap()


def test_npz_with_pickled_objects(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, params=np.array([Trap()], dtype=object))
    refuses_file(path)
    assert not Trap.sprung


def test_pickled_objects_in_a_file_of_ours(tmp_path):
    path = tmp_path / "trap.bilevel"
    stream = io.BytesIO()
    np.save(stream, np.array([Trap()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", manifest(dtypes=["object"], trees={"params": 0}))
        archive.writestr("0.npy", stream.getvalue())
    refuses_file(path)
    assert not Trap.sprung


def test_file_of_another_kind(tmp_path):
    path = tmp_path / "state.bilevel"
    archive.write(path, {"state": np.zeros(3)}, {"kind": "checkpoint"})
    refuses_file(path, ("path", "checkpoint", "not a result"))


def test_newer_version(saved, monkeypatch):
    monkeypatch.setattr(archive, "_VERSION", 0)
    refuses_file(saved, ("path",))


WRONG_LIKE = [
    ("other names", ({"v": np.zeros(3)}, HPARAMS), ["like", "params", "['w']"]),
    ("a list", ([np.zeros(3)], HPARAMS), ["like", "params", "['w']"]),
    ("hparams", ({"w": np.zeros(3)}, {"l3": 0.1}), ["like", "hparams", "['l2']"]),
    ("no pair", 3, ["like", "(params, hparams)"]),
]


@pytest.mark.parametrize(
    ("like", "fragments"), [row[1:] for row in WRONG_LIKE], ids=[row[0] for row in WRONG_LIKE]
)
def test_wrong_like(saved, like, fragments):
    with pytest.raises((ValueError, TypeError)) as caught:
        bilevel.load(saved, like)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_containers_need_like(tmp_path):
    path = tmp_path / "pair.bilevel"
    result(Pair(np.zeros(3), np.ones(2)), HPARAMS).save(path)
    refuses(lambda: bilevel.load(path), ValueError, ["params", "Pair", "like="])
    refuses(lambda: bilevel.load(path, (Pair(0.0, None), HPARAMS)), ValueError, ["like", "params", "1", "2"])
    assert bilevel.load(path, (Pair(0.0, 0.0), HPARAMS)).params.b.tolist() == [1.0, 1.0]


def test_saving_into_no_folder(tmp_path):
    path = tmp_path / "none" / "run.bilevel"
    refuses(
        lambda: result({"w": np.zeros(3)}, HPARAMS).save(path),
        ValueError,
        ["path", str(path.parent), "does not exist"],
    )
    assert not path.parent.exists()


def test_saving_what_is_no_array(tmp_path):
    archive.write(tmp_path / "x", {"a": 1.0}, {})
    refuses(lambda: archive.write(tmp_path / "y", {"a": object()}, {}), TypeError, ["arrays", "object"])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
