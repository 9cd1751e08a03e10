"""Monte Carlo tree search over choices that depend on choices, with bisection; also as an Optuna sampler.

Negrinho and Gordon (2017, "DeepArchitect", arXiv:1704.08792) search architectures as paths in a tree: a
node for each choice. An inner node is left along the child with the highest upper confidence bound, ``mean
reward + c sqrt(2 log n / n_child)``, a child that was never tried first, and from the first new node on
choices are made at random. Bisection makes of an ordered choice among k a path of log2 k choices between
two halves, so that neighbouring values share what was learned of them. Rewards are losses scaled to those
seen so far: 1 is the lowest, 0 the highest finite one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Path = tuple[Any, ...]


class Tree:
    """What was learned of each path: ``choose`` until all is chosen, then ``learn``.

    Args:
      seed: of ties and of random choices.
      bisect: ordered choices are made by halves.
      exploration: the factor of the bound's second term.
    """

    def __init__(self, seed: int, bisect: bool = True, exploration: float = 0.5):
        self._rng = np.random.default_rng(seed)
        self._bisect, self._exploration = bisect, exploration
        self._losses: dict[Path, list[float]] = {}
        self._low, self._high = math.inf, -math.inf  # of the finite losses

    def choose(self, path: Path, name: str, values: Sequence[Any], ordered: bool) -> tuple[Any, Path]:
        """One of the values, and the path with what was chosen."""
        values = list(values)
        if not (ordered and self._bisect):
            i = self._child(path, [(name, i) for i in range(len(values))])
            return values[i], (*path, (name, i))
        low, high = 0, len(values)
        while high - low > 1:
            middle = (low + high) // 2
            halves = [(low, middle), (middle, high)]
            low, high = halves[self._child(path, [(name, *half) for half in halves])]
            path = (*path, (name, low, high))
        return values[low], path

    def learn(self, path: Path, loss: float) -> None:
        """Back the loss up to all nodes of the path that are in the tree, and to the first that is not."""
        if math.isfinite(loss):
            self._low, self._high = min(self._low, loss), max(self._high, loss)
        for length in range(len(path) + 1):
            node = path[:length]
            new = node not in self._losses
            self._losses.setdefault(node, []).append(loss)
            if new and length:
                break

    def _child(self, path: Path, children: list[Path]) -> int:
        if path not in self._losses:
            return int(self._rng.integers(len(children)))
        visits = len(self._losses[path])
        bounds = []
        for child in children:
            seen = self._losses.get((*path, child), [])
            bonus = math.sqrt(2 * math.log(max(visits, 2)) / len(seen)) if seen else math.inf
            bounds.append(self._reward(seen) + self._exploration * bonus)
        best = np.flatnonzero(np.asarray(bounds) == max(bounds))
        return int(self._rng.choice(best))

    def _reward(self, losses: list[float]) -> float:
        if not losses or not self._high > self._low:
            return 0.0
        span = self._high - self._low
        return sum((self._high - x) / span for x in losses if math.isfinite(x)) / len(losses)


def sampler(seed: int, bisect: bool = True):
    """An Optuna sampler: categorical choices as they are, integers and floats with a step as ordered ones.

    Floats without a step are drawn at random: what a hypergradient is for.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    class TreeSampler(optuna.samplers.BaseSampler):
        def __init__(self):
            self.tree, self.paths = Tree(seed, bisect), {}
            self.rest = optuna.samplers.RandomSampler(seed=seed)

        def infer_relative_search_space(self, study, trial):
            return {}

        def sample_relative(self, study, trial, search_space):
            return {}

        def sample_independent(self, study, trial, param_name, param_distribution):
            if isinstance(param_distribution, FloatDistribution) and param_distribution.step is None:
                return self.rest.sample_independent(study, trial, param_name, param_distribution)
            ordered = not isinstance(param_distribution, CategoricalDistribution)
            if ordered:
                low, high = param_distribution.low, param_distribution.high
                count = 1 + round((high - low) / param_distribution.step)
                values = [low + i * param_distribution.step for i in range(count)]
            else:
                values = list(param_distribution.choices)
            path = self.paths.get(trial.number, ())
            value, self.paths[trial.number] = self.tree.choose(path, param_name, values, ordered)
            return value

        def after_trial(self, study, trial, state, values):
            self.tree.learn(self.paths.pop(trial.number, ()), values[0] if values else math.inf)

    return TreeSampler()
