"""Networks with many regularisers, on real data: what self-tuning networks were made for.

MacKay et al. (2019, arXiv:1903.03088) tune seven hyperparameters of a recurrent language model and fifteen of
a convolutional network, here smaller ones, on data that a machine has without a download::

    language    two layers of 64 LSTM cells on 256 windows of 48 characters of the manual of Python;
                dropout of outputs, between layers, of inputs (one mask for all times), of whole
                characters, DropConnect of the recurrent kernels, and the weights of the two penalties
                on activations                                                                     (1)
    digits      two convolutions and a hidden layer on 8 x 8 images of digits, 150 to train on;
                dropout of inputs, channels and units, cut-out length and number, rotation, zoom,
                shift, noise                                                                       (2)
    gated       the two-layer linear network y = s^T Q x of the paper, its training loss with the penalty
                strength |dy/dx|^2, whose best response is known: hidden units gated by the strength  (3)

The validation loss has no noise and no penalty: hyperparameters act on it through the weights alone. Masks
are Bernoulli, lengths and numbers are whole: nothing of that is differentiable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.problems import prose
from bilevel.nn import affine, cutout, dropout, gaussian_noise


@dataclasses.dataclass(frozen=True)
class RegularisedTask:
    """A problem with its data and a start.

    Args:
      problem: a constant of this module, so that programs are compiled once for all seeds.
      params: where training begins.
      hparams: where they begin; natural units.
      train: a source of minibatches with keys.
      valid: a source of minibatches.
      test: arrays.
    """

    problem: bilevel.Problem
    params: Any
    hparams: dict
    train: Any
    valid: Any
    test: Any


# --- Language, Eq. (1) ------------------------------------------------------------------------------------

SYMBOLS, EMBEDDED, CELLS = len(prose.ALPHABET), 32, 64
RATES = ("embedding", "input", "hidden", "output", "connect")
LANGUAGE_HPARAMS = dict.fromkeys(RATES, 0.05) | {"activation": 0.05, "temporal": 0.05}
LANGUAGE_CONSTRAINTS = dict.fromkeys(RATES, bilevel.interval(0, 0.95)) | dict.fromkeys(
    ("activation", "temporal"), bilevel.positive()
)


def language_params(key) -> dict:
    """Uniform weights, forget gates open."""
    keys = jax.random.split(key, 4)

    def layer(key, inputs):
        one, two = jax.random.split(key)
        bound = CELLS**-0.5
        bias = jnp.zeros(4 * CELLS).at[CELLS : 2 * CELLS].set(1.0)
        shapes = {"kernel": (one, (inputs, 4 * CELLS)), "recurrent": (two, (CELLS, 4 * CELLS))}
        return {
            name: jax.random.uniform(k, shape, minval=-bound, maxval=bound)
            for name, (k, shape) in shapes.items()
        } | {"bias": bias}

    return {
        "embedding": jax.random.uniform(keys[0], (SYMBOLS, EMBEDDED), minval=-0.1, maxval=0.1),
        "first": layer(keys[1], EMBEDDED),
        "second": layer(keys[2], CELLS),
        "out": {
            "kernel": jax.random.uniform(keys[3], (CELLS, SYMBOLS), minval=-0.1, maxval=0.1),
            "bias": jnp.zeros(SYMBOLS),
        },
    }


def lstm(layer, x, mask=1.0):
    """States over time of shape (time, rows, CELLS); ``mask``: of the recurrent kernel."""
    drive = jnp.einsum("tri,io->tro", x, layer["kernel"]) + layer["bias"][None, None]
    recurrent = layer["recurrent"] * mask

    def step(carry, drive):
        state, cell = carry
        i, f, g, o = jnp.split(drive + state @ recurrent, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        state = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (state, cell), state

    zero = jnp.zeros((x.shape[1], CELLS), x.dtype)
    return jax.lax.scan(step, (zero, zero), drive)[1]


def predict_text(params, hparams, text, key):
    """Logits of the next symbols, the last states with and without dropout; no noise where key is None."""
    x = jnp.swapaxes(text[:, :-1], 0, 1)
    keys = [None] * 6 if key is None else list(jax.random.split(key, 6))

    def drop(value, name, i, dims=()):
        return value if key is None else dropout(value, hparams[name], keys[i], broadcast_dims=dims)

    def mask(i):
        return 1.0 if key is None else dropout(jnp.ones((CELLS, 4 * CELLS)), hparams["connect"], keys[i])

    table = drop(params["embedding"], "embedding", 0, (1,))
    states = lstm(params["first"], drop(table[x], "input", 1, (0,)), mask(2))
    states = lstm(params["second"], drop(states, "hidden", 3, (0,)), mask(4))
    dropped = drop(states, "output", 5, (0,))
    out = params["out"]
    return jnp.einsum("trc,cs->trs", dropped, out["kernel"]) + out["bias"][None, None], states, dropped


def text_loss(logits, text):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.swapaxes(text[:, 1:], 0, 1)))


def language_predict(params, hparams, batch):
    text, key = batch
    return predict_text(params, hparams, text, key)


def language_loss(outputs, hparams, batch):
    logits, states, dropped = outputs
    still = jnp.mean(jnp.square(states[1:] - states[:-1]))
    penalties = hparams["activation"] * jnp.mean(jnp.square(dropped)) + hparams["temporal"] * still
    return text_loss(logits, batch[0]) + penalties


def language_outer(params, hparams, text):
    return text_loss(predict_text(params, hparams, text, None)[0], text)


LANGUAGE = bilevel.Problem(
    bilevel.composite(language_predict, language_loss), language_outer, constraints=LANGUAGE_CONSTRAINTS
)


def language(
    seed: int, hparams: dict | None = None, rows=(256, 256, 512), batch: int = 32
) -> RegularisedTask:
    """Windows of the manual, dealt out by the seed, which draws the start too."""
    parts = prose.splits([(prose.MANUAL,)], rows, np.random.default_rng(seed))
    train, valid, test = (jnp.asarray(part.text) for part in parts)
    return RegularisedTask(
        LANGUAGE,
        language_params(jax.random.key(seed)),
        LANGUAGE_HPARAMS | (hparams or {}),
        bilevel.with_rng(bilevel.minibatches(train, batch)),
        bilevel.minibatches(valid, batch),
        test,
    )


# --- Digits, Eq. (2) --------------------------------------------------------------------------------------

DIGITS_HPARAMS = dict.fromkeys(("input", "first", "second", "hidden"), 0.05) | {
    "length": 2.0, "holes": 1.0, "degrees": 2.0, "zoom": 0.05, "shift": 0.02, "noise": 0.05,
}  # fmt: skip
DIGITS_CONSTRAINTS = dict.fromkeys(("input", "first", "second", "hidden"), bilevel.interval(0, 0.9)) | {
    "length": bilevel.integer(0, 6),
    "holes": bilevel.integer(0, 3),
    "degrees": bilevel.interval(0, 45),
    "zoom": bilevel.interval(0, 0.5),
    "shift": bilevel.interval(0, 0.3),
    "noise": bilevel.interval(0, 1),
}
CHANNELS, UNITS = (16, 32), 64


def digits_params(key, side: int = 8) -> dict:
    """He's initial weights (2015)."""
    keys = jax.random.split(key, 4)
    inputs = CHANNELS[1] * (side // 4) ** 2
    shapes = {
        "first": (3, 3, 1, CHANNELS[0]),
        "second": (3, 3, *CHANNELS),
        "hidden": (inputs, UNITS),
        "out": (UNITS, 10),
    }
    return {
        name: {
            "kernel": jax.random.normal(k, shape) * np.float32(np.sqrt(2 / np.prod(shape[:-1]))),
            "bias": jnp.zeros(shape[-1]),
        }
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def digits_predict(params, hparams, batch):
    """Logits; under noise where the batch has a key."""
    rows, key = batch
    return classify(params, hparams, augmented(rows["image"], hparams, key), key)


def augmented(images, hparams, key):
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    images = affine(images, keys[0], hparams["degrees"], hparams["zoom"], hparams["shift"])
    images = cutout(images, hparams["length"], keys[1], hparams["holes"], most_holes=3)
    return gaussian_noise(images, jax.lax.stop_gradient(hparams["noise"]), keys[2])


def classify(params, hparams, x, key=None):
    keys = jax.random.split(key, 4) if key is not None else ()

    def drop(value, name, i, dims=()):
        return value if key is None else dropout(value, hparams[name], keys[i], broadcast_dims=dims)

    x = drop(x, "input", 0)
    for i, name in enumerate(("first", "second"), start=1):
        layer = params[name]
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"][None, None, None])
        rows, height, width, channels = x.shape
        x = x.reshape(rows, height // 2, 2, width // 2, 2, channels).max((2, 4))
        x = drop(x, name, i, (1, 2))
    x = x.reshape(len(x), -1) @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    x = drop(jax.nn.relu(x), "hidden", 3)
    return x @ params["out"]["kernel"] + params["out"]["bias"][None]


def digits_loss(logits, hparams, batch):
    rows, _ = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]))


def digits_outer(params, hparams, rows):
    logits = classify(params, hparams, rows["image"])
    right = jnp.mean(jnp.argmax(logits, -1) == rows["label"], dtype=jnp.float32)
    return digits_loss(logits, hparams, (rows, None)), {"accuracy": right}


DIGITS = bilevel.Problem(
    bilevel.composite(digits_predict, digits_loss), digits_outer, constraints=DIGITS_CONSTRAINTS
)


def digits(
    seed: int, hparams: dict | None = None, rows=(150, 300), batch: int = 50, path: Path | None = None
) -> RegularisedTask:
    """Images split by the seed, all that are not trained or validated on to test on.

    ``path``: an npz file with arrays "image" (uint8, of shape (n, side, side)) and "label", such as MNIST;
    else those of scikit-learn.
    """
    images, labels = _images(path)
    order = np.random.default_rng(seed).permutation(len(labels))
    ends = np.cumsum(rows)
    train, valid, test = (
        {"image": jnp.asarray(images[part]), "label": jnp.asarray(labels[part])}
        for part in np.split(order, ends)
    )
    return RegularisedTask(
        DIGITS,
        digits_params(jax.random.key(seed), images.shape[1]),
        DIGITS_HPARAMS | (hparams or {}),
        bilevel.with_rng(bilevel.minibatches(train, batch)),
        bilevel.minibatches(valid, batch),
        test,
    )


@functools.cache
def _images(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if path is None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8) / 16
    else:
        with np.load(path) as file:
            images, labels = file["image"] / 255, file["label"]
    return images[..., None].astype(np.float32), labels.astype(np.int32)


# --- Gated, Eq. (3) ---------------------------------------------------------------------------------------

INPUTS = 16


def gated_predict(params, hparams, batch):
    (x, _), _ = batch
    return x @ (params["q"] @ params["s"])


def gated_loss(outputs, hparams, batch):
    return jnp.mean((outputs - batch[0][1]) ** 2)


def gated_penalty(params, hparams):
    return hparams["strength"] * jnp.sum((params["q"] @ params["s"]) ** 2)


def gated_outer(params, hparams, rows):
    return gated_loss(gated_predict(params, hparams, (rows, None)), hparams, (rows, None))


GATED = bilevel.Problem(
    bilevel.composite(gated_predict, gated_loss, gated_penalty),
    gated_outer,
    constraints={"strength": bilevel.positive()},
)


def gated(seed: int, hparams: dict | None = None, rows=(40, 200, 2000), batch: int = 40) -> RegularisedTask:
    """Noisy linear data; the seed draws them and the start."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(INPUTS) / 4

    def part(count):
        x = rng.standard_normal((count, INPUTS))
        arrays = x, x @ truth + rng.standard_normal(count)
        return tuple(jnp.asarray(a, jnp.float32) for a in arrays)

    train, valid, test = map(part, rows)
    start = {"q": rng.standard_normal((INPUTS, INPUTS)), "s": rng.standard_normal(INPUTS)}
    return RegularisedTask(
        GATED,
        {name: jnp.asarray(value / INPUTS**0.5, jnp.float32) for name, value in start.items()},
        {"strength": 1e-3} | (hparams or {}),
        bilevel.with_rng(bilevel.minibatches(train, batch)),
        bilevel.minibatches(valid, batch),
        test,
    )


def gated_optimum(task: RegularisedTask) -> tuple[float, float]:
    """Lowest validation loss over strengths, in closed form, and the strength."""
    (x, y), (v, t) = task.train.source.arrays, task.valid.arrays

    def value(strength):
        w = jnp.linalg.solve(x.T @ x / len(y) + strength * jnp.eye(INPUTS), x.T @ y / len(y))
        return jnp.mean((v @ w - t) ** 2)

    strengths = jnp.geomspace(1e-4, 1e2, 2000)
    values = jax.vmap(value)(strengths)
    return float(values.min()), float(strengths[values.argmin()])


TASKS: dict[str, Callable[..., RegularisedTask]] = {"language": language, "digits": digits, "gated": gated}
