"""Callbacks of `bilevel.optimize` that write the rows of a run where other tools read them.

Each call brings the rows of the history since the last one, and writes them at once: a process that is
killed leaves whole rows. Rows are known by their outer step. Those of a run that begins at step s (a new one
at 0, one gone on with from a checkpoint later) take the place of what is there from step s on, so that no
step is there twice. Of a population there is a row for each step and each member that has not ended before.

Hyperparameters are no columns of the history; metrics are, and an outer loss may return hyperparameters
among its metrics.
"""

from bilevel.callbacks.board import TensorBoard, tensorboard
from bilevel.callbacks.lines import Log, csv, json_lines

__all__ = ["Log", "TensorBoard", "csv", "json_lines", "tensorboard"]
