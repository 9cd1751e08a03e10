"""The response layers of `bilevel.nn` as flax nnx modules; needs flax (``pip install 'bilevel[flax]'``).

They are called as ``layer(x, hparams)``, with hparams as the losses get them. For ``n`` hyperparameters: the
numbers in all tuned leaves together.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from bilevel.nn import layers


class _Layer(nnx.Module):
    """A module that owns the parameters of a layer of `bilevel.nn`."""

    def __init__(self, params: dict):
        self.response = nnx.data(jax.tree.map(nnx.Param, params))

    @property
    def params(self) -> dict:
        """As the functions of `bilevel.nn` take them."""
        return jax.tree.map(lambda p: p[...], self.response, is_leaf=lambda p: isinstance(p, nnx.Variable))


class ResponseLinear(_Layer):
    """See `bilevel.nn.dense`."""

    def __init__(self, in_features: int, out_features: int, n: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        super().__init__(layers.dense_init(rngs.params(), in_features, out_features, n, use_bias))

    def __call__(self, x, hparams):
        """Shape (rows, ..., out_features)."""
        return layers.dense(self.params, x, hparams)


class ResponseConv(_Layer):
    """See `bilevel.nn.conv`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        n: int,
        *,
        strides: Sequence[int] = (1, 1),
        padding: str = "SAME",
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        shape = tuple(kernel_size), in_features, out_features
        super().__init__(layers.conv_init(rngs.params(), *shape, n, use_bias))
        self.strides, self.padding = tuple(strides), padding

    def __call__(self, x, hparams):
        """Shape (rows, height, width, out_features)."""
        return layers.conv(self.params, x, hparams, self.strides, self.padding)


class ResponseEmbed(_Layer):
    """See `bilevel.nn.embedding`."""

    def __init__(self, num_embeddings: int, features: int, n: int, *, rngs: nnx.Rngs):
        super().__init__(layers.embedding_init(rngs.params(), num_embeddings, features, n))

    def __call__(self, symbols, hparams):
        """Shape (rows, ..., features)."""
        return layers.embedding(self.params, symbols, hparams)


class ResponseLSTMCell(_Layer):
    """See `bilevel.nn.lstm_cell`."""

    def __init__(self, in_features: int, hidden_features: int, n: int, *, rngs: nnx.Rngs):
        super().__init__(layers.lstm_init(rngs.params(), in_features, hidden_features, n))

    def __call__(self, carry, x, hparams, mask=None):
        """The new carry, and its state of shape (rows, hidden_features)."""
        return layers.lstm_cell(self.params, carry, x, hparams, mask)
