"""A weight decay for every layer of a flax nnx network on the digits, with minibatches at both levels.

nnx modules are objects; a loss is a function of params. ``nnx.split`` once outside, ``nnx.merge`` with
``copy=True`` inside the loss.
"""

import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import bilevel

LAYERS = ("hidden", "out")


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def make_losses(graphdef):
    def valid_loss(params, hparams, batch):
        x, y = batch
        logits = nnx.merge(graphdef, params, copy=True)(x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == y)}

    def train_loss(params, hparams, batch):
        loss, _ = valid_loss(params, hparams, batch)
        squares = {layer: jnp.sum(params[layer]["kernel"][...] ** 2) for layer in LAYERS}
        return loss + 0.5 * sum(hparams["decay"][layer] * squares[layer] for layer in LAYERS)

    return train_loss, valid_loss


def main():
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    train, valid, test = (x[:200], y[:200]), (x[200:900], y[200:900]), (x[900:], y[900:])
    graphdef, params = nnx.split(MLP(nnx.Rngs(0)), nnx.Param)
    train_loss, valid_loss = make_losses(graphdef)
    problem = bilevel.Problem(train_loss, valid_loss, constraints={"decay": bilevel.positive()})
    method = bilevel.alternating(
        bilevel.unrolled(), inner=optax.sgd(0.2, momentum=0.9), outer=optax.adam(0.1), inner_steps=20
    )
    result = bilevel.optimize(
        problem,
        params,
        {"decay": {layer: 1e-4 for layer in LAYERS}},
        bilevel.minibatches(train, batch_size=50),
        bilevel.minibatches(valid, batch_size=100),
        method,
        steps=60,
        test=test,
        progress=False,
    )
    decay, test = result.hparams["decay"], result.test["last"]
    print(f"decay: hidden {decay['hidden']:.4f}, out {decay['out']:.4f}")
    print(f"test: loss {test['value']:.2f}, accuracy {test['accuracy']:.2f}")


if __name__ == "__main__":
    main()

# > decay: hidden 0.0017, out 0.0022
# > test: loss 0.46, accuracy 0.86
