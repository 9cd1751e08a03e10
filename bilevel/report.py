"""A run's carry and record made into a `Result`; a population's into one with a row of members."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import diagnosis, hosts, loop
from bilevel.constraints import Box, Fixed, bind
from bilevel.data import Source
from bilevel.populations import member_of
from bilevel.problem import PyTree, Status
from bilevel.record import Record
from bilevel.result import Best, Members, Result


def result(
    plan: loop.Plan,
    member: loop.Member,
    record: Record,
    valid: Source,
    test: Source | None,
    status: Status,
    message: str,
) -> tuple[Result, str]:
    """The result of a run as it stands, and what deserves a warning.

    Args:
      plan: of the run.
      member: the run, or all members.
      record: its history.
      valid: the validation source; ``test`` the third one, or None.
      test: see ``valid``.
      status: of what has not ended by itself.
      message: why that is.
    """
    history = record.history()
    pair = _best(plan, member, history, valid, record.done)
    params, hparams, model_state = member.state.params, member.hparams, member.state.model_state
    tested: dict[str, dict[str, Any]] | None = None
    if test is not None:
        tested = {
            "last": _measured(plan, (params, hparams, model_state), member.key, test),
            "best": _measured(plan, (pair.params, pair.hparams, pair.model_state), member.key, test),
        }
    whole = Result(
        params=params,
        hparams=hparams,
        best=Best(pair.params, pair.hparams, pair.value, pair.step, pair.model_state),
        history=history,
        trajectory=record.trajectory(hosts.fetch(hparams)),
        status=status,
        message=message,
        seconds=0.0,
        test=tested,
        model_state=model_state,
        state=member.state,
    )
    if plan.population:
        return _of_population(plan, whole, pair, np.asarray(member.status), np.asarray(member.attempted))
    status, advice, warned = diagnosis.final(status, history, _may_rest(plan, hparams), _bounded(plan))
    single = dataclasses.replace(
        whole,
        best=dataclasses.replace(whole.best, value=float(pair.value), step=int(pair.step)),
        test=jax.tree.map(float, tested),
        status=status,
        message=" ".join([message, *advice]),
    )
    return single, " ".join(warned)


def _bounded(plan: loop.Plan) -> bool:
    """Whether the errors in the history are bounds."""
    return getattr(plan.problem, "smoothness", None) is not None


def _may_rest(plan: loop.Plan, hparams) -> bool:
    leaves = bind(plan.problem.constraints, hparams).leaves
    return any(isinstance(c, Box) for c in leaves) or all(isinstance(c, Fixed) for c in leaves)


def _of_population(
    plan: loop.Plan, whole: Result, pairs: loop.Pair, codes: np.ndarray, attempted: np.ndarray
) -> tuple[Result, str]:
    """Statuses and messages by member, and the best of those that have not failed."""
    statuses, messages, warned = [], [], []
    may_rest = _may_rest(plan, whole.hparams)
    for i, code in enumerate(map(Status, codes.tolist())):
        own = {name: column[: attempted[i]] for name, column in whole.history.items()}
        own = {name: column[:, i] if column.ndim > 1 else column for name, column in own.items()}
        status, why = _own_end(plan, code, whole, own)
        status, advice, bad = diagnosis.final(status, own, may_rest, _bounded(plan))
        statuses.append(status)
        messages.append(" ".join([why, *advice]))
        warned.extend(bad)
    failed = np.array([status == Status.DIVERGED for status in statuses])
    values = np.where(failed | ~np.isfinite(pairs.value), np.inf, pairs.value)
    chosen = int(np.argmin(values))
    best = Best(
        params=member_of(pairs.params, chosen),
        hparams=member_of(pairs.hparams, chosen),
        value=float(values[chosen]) if np.isfinite(values[chosen]) else float("nan"),
        step=int(pairs.step[chosen]),
        model_state=member_of(pairs.model_state, chosen),
        member=chosen,
    )
    members = Members(
        params=pairs.params,
        hparams=pairs.hparams,
        model_state=pairs.model_state,
        value=pairs.value,
        step=pairs.step,
        attempted=attempted,
        messages=tuple(messages),
        test=whole.test,
    )
    test = whole.test
    if test is not None:
        test = {"last": test["last"], "best": {name: float(v[chosen]) for name, v in test["best"].items()}}
    final = dataclasses.replace(
        whole,
        best=best,
        status=np.array(statuses, np.int32),
        message=_summary(statuses, messages),
        members=members,
        test=test,
    )
    counted = {sentence: warned.count(sentence) for sentence in warned}
    return final, " ".join(f"{n} of {len(codes)} members: {sentence}" for sentence, n in counted.items())


def _own_end(plan: loop.Plan, code: Status, whole: Result, history: dict) -> tuple[Status, str]:
    if code == Status.RUNNING:
        return whole.status, whole.message
    if code == Status.DROPPED:
        return code, f"Dropped by successive halving at outer step {len(history['step'])}."
    if code == Status.INTERRUPTED:
        return code, f"Stopped by a callback at outer step {len(history['step'])}."
    if code == Status.CONVERGED:
        return code, "The gradient norm is at most tol."
    return code, diagnosis.why_ended(code, history, plan.method)


def _summary(statuses: list[Status], messages: list[str]) -> str:
    """One line for all members: how many ended how, and what the first of each kind says."""
    lines = []
    for status in sorted(set(statuses)):
        which = [i for i, own in enumerate(statuses) if own == status]
        first = f" (member {which[0]})" if len(set(messages[i] for i in which)) > 1 else ""
        lines.append(f"{len(which)} of {len(statuses)} members {status}{first}: {messages[which[0]]}")
    return " ".join(lines)


def _best(plan: loop.Plan, member: loop.Member, history, valid: Source, done: int) -> loop.Pair:
    """The best pair of each member, value and step as numpy; nan where none was finite."""
    good = history["accepted"]
    params, hparams, model_state = member.state.params, member.hparams, member.state.model_state
    if member.best is None:
        last = len(good) - 1 - np.argmax(good[::-1], axis=0) if len(good) else np.zeros(good.shape[1:], int)
        has = good.any(axis=0)
        value = np.full(good.shape[1:], np.nan)
        if len(good):
            taken = np.take_along_axis(history["value"], np.expand_dims(last, 0), 0)[0]
            value = np.where(has, taken, np.nan)
        return loop.Pair(params, hparams, model_state, value, np.where(has, last, 0))
    kept = dataclasses.replace(
        member.best, value=np.asarray(member.best.value), step=np.asarray(member.best.step)
    )
    if plan.judges and good.any():
        # A sampled source was judged every so many steps: the pair at the end has its chance too.
        end = np.asarray(_measured(plan, (params, hparams, model_state), member.key, valid)["value"])
        better = (end < kept.value) & good.any(axis=0)
        if better.any():
            now = loop.Pair(params, hparams, model_state, end, np.full(end.shape, done))
            kept = jax.tree.map(lambda new, old: _where(better, new, old), now, kept)
    value = np.asarray(kept.value)
    lost = ~np.isfinite(value)
    return dataclasses.replace(
        kept, value=np.where(lost, np.nan, value), step=np.where(lost, 0, np.asarray(kept.step))
    )


def _where(better: np.ndarray, new: Any, old: Any):
    if not better.ndim:
        return new if better else old
    return jnp.where(better.reshape(-1, *[1] * (np.ndim(new) - 1)), new, old)


def _measured(plan: loop.Plan, pair: PyTree, key, source: Source) -> dict[str, np.ndarray]:
    value, metrics = loop.compiled_test(plan)(*pair, key, source)
    return {"value": np.asarray(value), **{name: np.asarray(metric) for name, metric in metrics.items()}}
