"""The reference that estimators are held against, on a small subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from benchmarks import estimator_scores
from benchmarks.problems import digits

DIM = 6


@pytest.fixture(scope="module")
def solved():
    own = estimator_scores.problem(DIM, 4)
    train, valid, _ = digits.split(0, 40, 60)
    hparams = jax.tree.map(jnp.asarray, estimator_scores.STARTING)
    z = jax.jit(bilevel.argmin(own, bilevel.newton(100)))(hparams, train, init=jnp.zeros(DIM))
    return own, hparams, train, valid, z


def test_the_reference_is_solved_and_as_many_cg_steps_as_coordinates_find_it(solved):
    own, hparams, train, valid, z = solved
    assert np.linalg.norm(jax.jit(jax.grad(own.inner))(z, hparams, train)) < 1e-12
    system = bilevel.dense(), bilevel.cg(max_steps=DIM, tol=0.0)
    exact, found = (
        jax.jit(bilevel.hypergradient(own, bilevel.implicit(solver)))(z, hparams, train, valid).grad
        for solver in system
    )
    np.testing.assert_allclose(
        estimator_scores.relative(found, hparams), estimator_scores.relative(exact, hparams), rtol=1e-6
    )
