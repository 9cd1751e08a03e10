"""An L2 penalty for every feature of a logistic regression, beside the best single one of a grid.

The thirty penalties start at the best of the grid and descend the loss of 190 validation rows. They fit these
rows better and the test rows worse: so many hyperparameters overfit so few validation rows, and only a third
split shows it.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_breast_cancer

import bilevel

NEWTON_STEPS = 20


def valid_loss(params, hparams, batch):
    x, y = batch
    return optax.sigmoid_binary_cross_entropy(x @ params, y).mean()


def train_loss(params, hparams, batch):
    return valid_loss(params, hparams, batch) + 0.5 * jnp.sum(hparams["l2"] * params**2)


def load():
    x, y = load_breast_cancer(return_X_y=True)
    x, y = jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32), jnp.asarray(y, jnp.float32)
    return [(x[i::3], y[i::3]) for i in range(3)]


def search_grid(train, valid):
    """The best single penalty of 26, and the params it leads to, by Newton's method."""

    def solve(l2):
        def newton(params, _):
            grad = jax.grad(train_loss)(params, {"l2": l2}, train)
            hessian = jax.hessian(train_loss)(params, {"l2": l2}, train)
            return params - jnp.linalg.solve(hessian, grad), None

        params, _ = jax.lax.scan(newton, jnp.zeros(30), length=NEWTON_STEPS)
        return params, valid_loss(params, None, valid)

    grid = jnp.logspace(-4, 1, 26)
    params, values = jax.jit(jax.vmap(solve))(grid)
    best = jnp.argmin(values)
    return grid[best], params[best]


def main():
    train, valid, test = load()
    l2, params = search_grid(train, valid)
    problem = bilevel.Problem(train_loss, valid_loss, constraints={"l2": bilevel.positive()})
    method = bilevel.alternating(
        bilevel.implicit(bilevel.cg(max_steps=20)),
        inner=optax.sgd(0.3, momentum=0.9),
        outer=optax.adam(0.05),
        inner_steps=20,
    )
    result = bilevel.optimize(
        problem, params, {"l2": jnp.full(30, l2)}, train, valid, method, steps=50, test=test, progress=False
    )
    alone = valid_loss(params, None, valid), valid_loss(params, None, test)
    print(f"one penalty, {l2:.3f}: validation loss {alone[0]:.3f}, test loss {alone[1]:.3f}")
    after = result.best.value, result.test["best"]["value"]
    print(f"one for every feature: validation loss {after[0]:.3f}, test loss {after[1]:.3f}")


if __name__ == "__main__":
    main()

# > one penalty, 0.004: validation loss 0.085, test loss 0.068
# > one for every feature: validation loss 0.058, test loss 0.082
