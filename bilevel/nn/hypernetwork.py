"""Hypernetworks that train: a network that puts out the parameters of another one.

With inputs g in [0, 1]^D, an encoding E and a network h of leaky rectifiers, `hypernetwork` makes::

    E(g) = [cos(pi g / 2), sin(pi g / 2)],    params = base + h(E(g))                              (1)

Without the encoding the size of the output is proportional to that of the input (such networks are
homogeneous, h(a g) = a h(g) while biases are zero), and so are gradients: training is slow and unsteady. E
has the norm sqrt(D) whatever g is. ``base`` are parameters of their own, learned too, which begin where the
network itself would: h only has to learn differences.

`recurrent_hypernetwork` emits the parameters chunk by chunk from a long short-term memory cell, so that those
of one layer depend on those before. With task t and learned embeddings e_t, c_l of tasks and chunks::

    s_l = cell(s_(l-1), [e_t, c_l]),    chunk_l = base_l + A s_l + b                                (2)

and `forgetting` is the penalty that keeps what earlier tasks were given, for old parameters * of the
hypernetwork::

    1 / t sum_(i<t) |params*(i) - params(i)|^2                                                      (3)

The equations of the paper on recurrent hypernetworks could not be had: (2) is a design of ours after its
abstract, (3) the penalty of von Oswald et al.

References:
  Gonzalez Ortiz, Guttag and Dalca, "Magnitude invariant parametrizations improve hypernetwork learning",
  2024, arXiv:2304.07645.
  Chandra, Varshney, Srijith and Gupta, "Continual learning with dependency preserving hypernetworks", 2023,
  arXiv:2209.07712.
  von Oswald, Henning, Grewe and Sacramento, "Continual learning with hypernetworks", 2020, arXiv:1906.00695.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import penalties, validation
from bilevel.nn.layers import lstm_step
from bilevel.problem import Params, PyTree

_SLOPE = 0.01  # of a rectifier on the negative side
_GAIN = math.sqrt(2 / (1 + _SLOPE**2))


def encode(inputs: jax.Array) -> jax.Array:
    """E of Eq. (1): shape (..., D) to (..., 2 D), of norm sqrt(D) everywhere."""
    angle = jnp.asarray(inputs) * (math.pi / 2)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@dataclasses.dataclass(frozen=True)
class HyperNetwork:
    """See `hypernetwork`; hashable, the parameters are elsewhere."""

    inputs: int
    hidden: tuple[int, ...]
    encoding: bool
    residual: bool
    shapes: tuple[tuple[int, ...], ...]
    treedef: Any

    def init(self, key, base: Params) -> dict:
        """Parameters: those of h, and ``base`` (zeros without the residual form), a copy."""
        width = 2 * self.inputs if self.encoding else self.inputs
        keys = jax.random.split(key, len(self.hidden) + len(self.shapes))
        layers = []
        for k, units in zip(keys, self.hidden, strict=False):
            layers.append({"kernel": _normal(k, (width, units), units), "bias": jnp.zeros(units)})
            width = units
        out = [
            _normal(k, (width, math.prod(shape)), math.prod(shape))
            for k, shape in zip(keys[len(self.hidden) :], self.shapes, strict=True)
        ]
        leaves = jax.tree.leaves(base)
        first = [jnp.array(x, copy=True) if self.residual else jnp.zeros_like(x) for x in leaves]
        return {
            "hidden": layers,
            "out": jax.tree.unflatten(self.treedef, out),
            "base": jax.tree.unflatten(self.treedef, first),
        }

    def __call__(self, params: dict, inputs: jax.Array) -> Params:
        """The parameters of the network for inputs of shape (D,) in [0, 1].

        Raises:
          ValueError: inputs of another shape.
        """
        inputs = jnp.asarray(inputs)
        if inputs.shape != (self.inputs,):
            raise ValueError(f"inputs must have shape ({self.inputs},), got {inputs.shape}.")
        x = encode(inputs) if self.encoding else inputs
        for layer in params["hidden"]:
            x = jax.nn.leaky_relu(x @ layer["kernel"] + layer["bias"], _SLOPE)
        return jax.tree.map(
            lambda base, kernel: base + (x @ kernel).reshape(base.shape).astype(base.dtype),
            params["base"],
            params["out"],
        )


def hypernetwork(
    like: Params, inputs: int, hidden: Sequence[int] = (16, 64), encoding: bool = True, residual: bool = True
) -> HyperNetwork:
    """A network that puts out params for inputs in [0, 1]^D, Eq. (1) of the module.

    Map hyperparameters into [0, 1] first, those that span magnitudes by their logarithm. Like any function of
    params it goes into a `bilevel.Problem`: its parameters are then the inner variables.

    Args:
      like: parameters of the network, of any model; their shapes count. For those of a trained one take
        `from_existing`.
      inputs: D.
      hidden: units of the layers of h.
      encoding: E; without it inputs are taken as they are.
      residual: begin at ``base``; without it base begins at zero.

    Raises:
      TypeError, ValueError: a size that is no whole number or too small, params that are not floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel.nn import hypernetwork
      >>> model = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> network = hypernetwork(model, inputs=1)
      >>> params = network.init(jax.random.key(0), model)
      >>> network(params, jnp.array([0.3]))["kernel"].shape
      (4, 2)
    """
    validation.floating(like, "like")
    leaves, treedef = jax.tree.flatten(like)
    return HyperNetwork(
        validation.whole_number("inputs", inputs, 1),
        tuple(validation.whole_number("hidden", units, 1) for units in hidden),
        validation.flag("encoding", encoding),
        validation.flag("residual", residual),
        tuple(jnp.shape(leaf) for leaf in leaves),
        treedef,
    )


def from_existing(params: Params, inputs: int, key, **settings) -> tuple[HyperNetwork, dict]:
    """A hypernetwork whose output begins at given parameters, for all inputs, and its own parameters.

    The last kernels of h are zero at first. (Those of ``init`` are not: there h begins with the variance that
    the paper gives it, which parameters that are not trained yet can bear.)

    Args:
      params: of a network, trained or not.
      inputs: D.
      key: PRNG key.
      settings: further arguments of `hypernetwork`.
    """
    network = hypernetwork(params, inputs, **settings)
    own = network.init(key, params)
    return network, own | {"out": jax.tree.map(jnp.zeros_like, own["out"])}


def _normal(key, shape, fan_out: int):
    """He's normal weights (2015) by the number of outputs."""
    return _GAIN / math.sqrt(fan_out) * jax.random.normal(key, shape)


# --- Recurrent --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RecurrentHyperNetwork:
    """See `recurrent_hypernetwork`; hashable, the parameters are elsewhere."""

    tasks: int
    cells: int
    embedding: int
    chunk: int
    shapes: tuple[tuple[int, ...], ...]
    treedef: Any

    @property
    def chunks(self) -> int:
        """How many the parameters are cut into; the last is filled up."""
        return -(-sum(map(math.prod, self.shapes)) // self.chunk)

    def init(self, key, base: Params) -> dict:
        """Parameters: ``base``, a copy in chunks, and those of cell, output and embeddings."""
        keys = jax.random.split(key, 4)
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(base)])
        flat = jnp.pad(flat, (0, self.chunks * self.chunk - flat.size))
        inputs, bound = 2 * self.embedding + self.cells, self.cells**-0.5
        return {
            "tasks": jax.random.normal(keys[0], (self.tasks, self.embedding)),
            "chunks": jax.random.normal(keys[1], (self.chunks, self.embedding)),
            "cell": {
                "kernel": jax.random.uniform(keys[2], (inputs, 4 * self.cells), minval=-bound, maxval=bound),
                "bias": jnp.zeros(4 * self.cells),
            },
            "out": {
                "kernel": _normal(keys[3], (self.cells, self.chunk), self.chunk),
                "bias": jnp.zeros(self.chunk),
            },
            "base": flat.reshape(self.chunks, self.chunk),
        }

    def __call__(self, params: dict, task) -> Params:
        """The parameters of the network for a task; its number may be traced."""
        embedding = params["tasks"][task]
        zero = jnp.zeros(self.cells, embedding.dtype)

        def step(carry, inputs):
            base, chunk = inputs
            x = jnp.concatenate([embedding, chunk, carry[0]])
            carry, state = lstm_step(x @ params["cell"]["kernel"] + params["cell"]["bias"], carry[1])
            made = state @ params["out"]["kernel"] + params["out"]["bias"]
            return carry, base + made.astype(base.dtype)

        _, made = jax.lax.scan(step, (zero, zero), (params["base"], params["chunks"]))
        flat, leaves, at = made.reshape(-1), [], 0
        for shape in self.shapes:
            leaves.append(flat[at : at + math.prod(shape)].reshape(shape))
            at += math.prod(shape)
        return jax.tree.unflatten(self.treedef, leaves)


def recurrent_hypernetwork(
    like: Params, tasks: int, cells: int = 64, embedding: int = 8, chunk: int = 256
) -> RecurrentHyperNetwork:
    """A network that puts out params for each of several tasks, chunk after chunk: Eq. (2) of the module.

    Args:
      like: parameters of the network; their shapes count.
      tasks: how many.
      cells: of the long short-term memory.
      embedding: numbers that describe a task, and as many a chunk.
      chunk: parameters put out at a time.

    Raises:
      TypeError, ValueError: a size that is no whole number or too small, params that are not floating.
    """
    validation.floating(like, "like")
    leaves, treedef = jax.tree.flatten(like)
    return RecurrentHyperNetwork(
        validation.whole_number("tasks", tasks, 1),
        validation.whole_number("cells", cells, 1),
        validation.whole_number("embedding", embedding, 1),
        validation.whole_number("chunk", chunk, 1),
        tuple(jnp.shape(leaf) for leaf in leaves),
        treedef,
    )


def forgetting(network: RecurrentHyperNetwork, params: PyTree, old: PyTree, tasks) -> jax.Array:
    """How far what the first tasks are given has moved, Eq. (3); zero before there are any.

    Args:
      network: that puts them out.
      params: its parameters; old: as they were when the last of these tasks had been learned.
      old: see params; not differentiated.
      tasks: how many, may be traced.
    """
    every = jnp.arange(network.tasks)

    def outputs(params):
        return jax.vmap(lambda task: network(params, task))(every)

    new = outputs(params)
    # Of all tasks, but only the first ones count; penalties.forgetting divides by the number of all.
    counted = jnp.where(every < tasks, network.tasks / jnp.maximum(tasks, 1), 0)
    counted = counted.astype(jnp.result_type(*jax.tree.leaves(new)))
    return penalties.forgetting(new, counted, outputs(jax.lax.stop_gradient(old)))
