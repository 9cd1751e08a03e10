"""Response layers: a perturbation of its own for every example, at two matrix products a layer.

`bilevel.stn` with ``perturbations="examples"`` hands the losses hyperparameters with one entry for each row
of the batch, and the perturbations e, shape (rows, n), that they came from. A layer of a kernel K and a bias
b then is, for row i::

    y_i = x_i K + b + (e_i A) * (x_i K') + (e_i B) * b'                                          (1)

that is, the same network with the kernel ``K + K' diag(e_i A)`` for this row. Where hyperparameters are not
perturbed nothing is to be added, and a layer is an ordinary one.

Layers are functions of a dict of parameters, made by ``*_init``; `bilevel.nn.linen` and `bilevel.nn.nnx` have
them as modules of flax.

References:
  MacKay, Vicol, Lorraine, Duvenaud and Grosse, 2019, arXiv:1903.03088.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.problem import PyTree, register


@register
@dataclasses.dataclass(frozen=True)
class Response:
    """Hyperparameters with their perturbations.

    ``hparams``: a tree like the user's, natural units; every leaf has a leading axis of rows, but for one
    perturbation that all rows share. ``eps``: shape (rows, n), or (n,) for all rows. Entries are read by
    name, or as fields that are called otherwise than these two; entry i of a leaf that is a vector is ``[...,
    i]``, with rows and without.
    """

    hparams: PyTree
    eps: jax.Array

    def __getitem__(self, name):
        """An entry of the tree."""
        return self.hparams[name]

    def __getattr__(self, name: str):
        """A field of the tree, where it is a named tuple."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.hparams, name)


def response(hparams: PyTree, eps: jax.Array) -> Response:
    """Hyperparameters as a model of response layers takes them.

    Args:
      hparams: natural units; every leaf with a leading axis of rows.
      eps: perturbations, shape (rows, n), in the units in which the layers respond; or (n,), the same for all
        rows, whose leaves then have no axis of rows.

    Raises:
      ValueError: leaves without as many rows as there are perturbations.
    """
    if len(jnp.shape(eps)) not in (1, 2):
        raise ValueError(f"eps must have shape (rows, n) or (n,), got {jnp.shape(eps)}.")
    if len(jnp.shape(eps)) == 2:
        for path, leaf in jax.tree_util.tree_flatten_with_path(hparams)[0]:
            if jnp.shape(leaf)[:1] != eps.shape[:1]:
                raise ValueError(
                    f"hparams{jax.tree_util.keystr(path)} must have an entry for each of the {eps.shape[0]} "
                    f"rows of eps, got shape {jnp.shape(leaf)}."
                )
    return Response(hparams, eps)


def _gate(matrix, hparams, x) -> jax.Array | None:
    """``e A`` for x with rows along its leading axis, to be multiplied with; None without perturbations."""
    if not isinstance(hparams, Response):
        return None
    eps = hparams.eps if hparams.eps.ndim == 2 else hparams.eps[None]
    if eps.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"a response layer got {x.shape[0]} rows and perturbations of {eps.shape[0]}: both come from one "
            "batch, whose rows stay along the leading axis."
        )
    if eps.shape[1] != matrix.shape[0]:
        raise ValueError(
            f"a response layer was made for {matrix.shape[0]} hyperparameters and got perturbations of "
            f"{eps.shape[1]}."
        )
    gates = eps.astype(matrix.dtype) @ matrix
    return gates.reshape(gates.shape[0], *[1] * (x.ndim - 2), gates.shape[1])


def _with_response(params, hparams, x, apply) -> jax.Array:
    """Eq. (1) for ``apply(x, kernel)``."""
    out = apply(x, params["kernel"])
    gate = _gate(params["gate"], hparams, out)
    if gate is not None:
        out = out + gate * apply(x, params["kernel_response"])
    if "bias" in params:
        out = out + params["bias"].reshape((1,) * (out.ndim - 1) + params["bias"].shape)
        if gate is not None:
            shift = params["bias_response"].reshape((1,) * (out.ndim - 1) + params["bias"].shape)
            out = out + _gate(params["bias_gate"], hparams, out) * shift
    return out


def dense_init(key, inputs: int, outputs: int, n: int, bias: bool = True) -> dict:
    """Parameters of `dense` for n hyperparameters: uniform kernels, small gates (the paper's constants)."""
    return _init(key, (inputs, outputs), n, bias)


def dense(params, x, hparams) -> jax.Array:
    """A dense layer, Eq. (1).

    Args:
      params: of `dense_init`.
      x: shape (rows, ..., inputs).
      hparams: `response`, or anything else for no perturbation.

    Raises:
      ValueError: perturbations that are not those of the rows of x, or of another number of hyperparameters.
    """
    return _with_response(params, hparams, x, lambda x, kernel: x @ kernel)


def conv_init(key, window: Sequence[int], inputs: int, outputs: int, n: int, bias: bool = True) -> dict:
    """Parameters of `conv`; ``window``: height and width."""
    return _init(key, (*window, inputs, outputs), n, bias)


def conv(params, x, hparams, strides: Sequence[int] = (1, 1), padding: str = "SAME") -> jax.Array:
    """A convolution of images, shape (rows, height, width, inputs), gated by channel; else as `dense`."""

    def apply(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return _with_response(params, hparams, x, apply)


def embedding_init(key, symbols: int, features: int, n: int) -> dict:
    """Parameters of `embedding`."""
    params = _init(key, (symbols, features), n, bias=False)
    keys = jax.random.split(key)
    tables = [jax.random.uniform(k, (symbols, features), minval=-0.1, maxval=0.1) for k in keys]
    return params | {"kernel": tables[0], "kernel_response": tables[1]}


def embedding(params, symbols, hparams) -> jax.Array:
    """Rows of a table, for whole numbers of shape (rows, ...); else as `dense`."""
    return _with_response(params, hparams, symbols, lambda i, table: table[i])


def lstm_init(key, inputs: int, cells: int, n: int) -> dict:
    """Parameters of `lstm_cell`: ``input`` and ``state``, two dense layers of four blocks of cells."""
    one, two = jax.random.split(key)
    return {"input": dense_init(one, inputs, 4 * cells, n), "state": dense_init(two, cells, 4 * cells, n)}


def lstm_cell(params, carry, x, hparams, mask=None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One step of a long short-term memory cell with both products of Eq. (1).

    Args:
      params: of `lstm_init`.
      carry: state and cell, each of shape (rows, cells).
      x: shape (rows, inputs).
      hparams: as `dense`.
      mask: DropConnect, multiplied with both kernels of the state; of the shape of one of them.

    Returns:
      The new carry, and its state.
    """
    state, cell = carry
    recurrent = params["state"]
    if mask is not None:
        masked = {name: mask * recurrent[name] for name in ("kernel", "kernel_response")}
        recurrent = recurrent | masked
    return lstm_step(dense(params["input"], x, hparams) + dense(recurrent, state, hparams), cell)


def lstm_step(blocks, cell) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The new carry of a cell and its state, from the four blocks of what goes into its gates."""
    forget, into, out, new = jnp.split(blocks, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(into) * jnp.tanh(new)
    state = jax.nn.sigmoid(out) * jnp.tanh(cell)
    return (state, cell), state


def _init(key, shape: Sequence[int], n: int, bias: bool) -> dict[str, Any]:
    fan_in, outputs = math.prod(shape[:-1]), shape[-1]
    bound = fan_in**-0.5
    keys = jax.random.split(key, 6)

    def uniform(key, shape):
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    params = {
        "kernel": uniform(keys[0], shape),
        "kernel_response": uniform(keys[1], shape),
        "gate": 0.01 * jax.random.normal(keys[2], (n, outputs)),
    }
    if bias:
        params |= {
            "bias": uniform(keys[3], (outputs,)),
            "bias_response": uniform(keys[4], (outputs,)),
            "bias_gate": 0.01 * jax.random.normal(keys[5], (n, outputs)),
        }
    return params
