"""Parts of networks that are tuned: noise with traced strengths, response layers, hypernetworks.

All of it is functions on arrays and dicts. `bilevel.nn.linen` and `bilevel.nn.nnx`, which need flax
(``pip install 'bilevel[flax]'``) and are imported by name, have the layers as modules.
"""

from bilevel.nn.hypernetwork import (
    HyperNetwork,
    RecurrentHyperNetwork,
    encode,
    forgetting,
    from_existing,
    hypernetwork,
    recurrent_hypernetwork,
)
from bilevel.nn.images import affine, cutout
from bilevel.nn.layers import (
    Response,
    conv,
    conv_init,
    dense,
    dense_init,
    embedding,
    embedding_init,
    lstm_cell,
    lstm_init,
    response,
)
from bilevel.nn.noise import dropout, gaussian_noise

__all__ = [
    "HyperNetwork",
    "RecurrentHyperNetwork",
    "Response",
    "affine",
    "conv",
    "conv_init",
    "cutout",
    "dense",
    "dense_init",
    "dropout",
    "embedding",
    "embedding_init",
    "encode",
    "forgetting",
    "from_existing",
    "gaussian_noise",
    "hypernetwork",
    "recurrent_hypernetwork",
    "lstm_cell",
    "lstm_init",
    "response",
]
