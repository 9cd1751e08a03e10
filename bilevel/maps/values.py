"""Settings of maps that are given, or made of hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import validation
from bilevel.penalties.strengths import same_tree


def at(setting: Any, hparams) -> Any:
    """A setting at some hyperparameters: it is one, or a function of them."""
    return setting(hparams) if callable(setting) else setting


def given_params(name: str, base) -> Any:
    """Params that a map begins at: a function of hparams, or a tree, of floating arrays; checked."""
    return base if callable(base) else validation.floating(base, name)


def base_at(base, hparams):
    """The params of `given_params` at some hyperparameters."""
    return validation.floating(base(hparams), "base(hparams)") if callable(base) else base


def like(name: str, tree, base, of: str = "base") -> list[jax.Array]:
    """Leaves of a tree that has to be like the base of a map."""
    return [jnp.asarray(x) for x in same_tree(name, tree, base, of)]


def shown(setting: Any) -> str:
    """A setting as it is printed: numbers and functions by name, arrays by their shapes."""
    if callable(setting):
        return getattr(setting, "__name__", repr(setting))
    if isinstance(setting, (int, float)):
        return f"{setting:g}"
    return validation.describe(setting)


def positive(name: str, setting: float | Callable) -> float | Callable:
    """A positive number, or a function of hparams."""
    return setting if callable(setting) else validation.number(name, setting, positive=True)
