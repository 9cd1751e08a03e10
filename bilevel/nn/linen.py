"""The response layers of `bilevel.nn` as flax linen modules; needs flax (``pip install 'bilevel[flax]'``).

They are called as ``layer(x, hparams)``, with hparams as the losses get them. For ``n`` hyperparameters: the
numbers in all tuned leaves together.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from bilevel.nn import layers


class ResponseDense(nn.Module):
    """See `bilevel.nn.dense`."""

    features: int
    n: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, hparams):
        """Shape (rows, ..., features)."""
        params = self.param("response", layers.dense_init, x.shape[-1], self.features, self.n, self.use_bias)
        return layers.dense(params, x, hparams)


class ResponseConv(nn.Module):
    """See `bilevel.nn.conv`."""

    features: int
    kernel_size: Sequence[int]
    n: int
    strides: Sequence[int] = (1, 1)
    padding: str = "SAME"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, hparams):
        """Shape (rows, height, width, features)."""
        shape = tuple(self.kernel_size), x.shape[-1], self.features
        params = self.param("response", layers.conv_init, *shape, self.n, self.use_bias)
        return layers.conv(params, x, hparams, tuple(self.strides), self.padding)


class ResponseEmbed(nn.Module):
    """See `bilevel.nn.embedding`."""

    num_embeddings: int
    features: int
    n: int

    @nn.compact
    def __call__(self, symbols, hparams):
        """Shape (rows, ..., features)."""
        shape = self.num_embeddings, self.features, self.n
        return layers.embedding(self.param("response", layers.embedding_init, *shape), symbols, hparams)


class ResponseLSTMCell(nn.Module):
    """See `bilevel.nn.lstm_cell`."""

    features: int
    n: int

    @nn.compact
    def __call__(self, carry, x, hparams, mask=None):
        """The new carry, and its state of shape (rows, features)."""
        params = self.param("response", layers.lstm_init, x.shape[-1], self.features, self.n)
        return layers.lstm_cell(params, carry, x, hparams, mask)
