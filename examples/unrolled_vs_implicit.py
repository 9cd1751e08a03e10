"""The hypergradient of a ridge regression by three estimators, beside its closed form.

``unrolled`` and ``forward`` differentiate the loss after so many steps and agree with one another at any
number; ``implicit`` takes the end of the same trajectory for the inner solution. All three approach the
hypergradient at the solution as the trajectory does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel

ROWS, FEATURES, LAM = 60, 10, 0.1


def valid_loss(params, lam, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ params - y) ** 2)


def train_loss(params, lam, batch):
    return valid_loss(params, lam, batch) + 0.5 * lam * jnp.sum(params**2)


def make_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * ROWS, FEATURES)) * np.linspace(0.3, 1.5, FEATURES)
    y = x @ rng.standard_normal(FEATURES) + rng.standard_normal(2 * ROWS)
    return (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])


def closed_form(lam, train, valid):
    """The outer loss at the inner solution, as a function of lam."""
    x, y = train
    params = jnp.linalg.solve(x.T @ x / ROWS + lam * jnp.eye(FEATURES), x.T @ y / ROWS)
    return valid_loss(params, lam, valid)


def main():
    train, valid = make_data()
    problem = bilevel.Problem(train_loss, valid_loss, constraints=bilevel.positive())
    start, lam, sgd = jnp.zeros(FEATURES), jnp.asarray(LAM), optax.sgd(0.3)
    implicit = jax.jit(bilevel.hypergradient(problem, bilevel.implicit()))
    print(f"closed form {jax.grad(closed_form)(lam, train, valid):.6f}")
    print("steps  unrolled   forward  implicit")
    for steps in (10, 100, 1000):
        unrolled = jax.jit(bilevel.hypergradient(problem, bilevel.unrolled(sgd, steps)))
        forward = jax.jit(bilevel.hypergradient(problem, bilevel.forward(sgd, steps)))
        end = unrolled(start, lam, train, valid)
        grads = end.grad, forward(start, lam, train, valid).grad, implicit(end.params, lam, train, valid).grad
        print(f"{steps:5}" + "".join(f"{grad:10.6f}" for grad in grads))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()

# > closed form 0.825505
# > steps  unrolled   forward  implicit
# >    10  0.534300  0.534300  1.047996
# >   100  0.815072  0.815072  0.824870
# >  1000  0.825505  0.825505  0.825505
