"""A run and its checkpoints: what is written, when it may go on from there, and how."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import archive, data, fingerprint, hosts, loop, stored
from bilevel.checkpoint import Checkpoints, Folder, check_same_run, versions
from bilevel.feed import Feed
from bilevel.placement import Placement, put
from bilevel.populations import Population
from bilevel.problem import Status
from bilevel.trees import abstract


class Keeper:
    """Writes the checkpoints of one run; of several processes only the first touches the folder.

    A thread writes, so that the run goes on meanwhile; one file at a time.

    Args:
      spec: where, and how often.
      name: what makes it this run and no other, see `identity`; called once.
      feeds: the iterables that the run draws from.
      placement: the mesh, or None.
    """

    def __init__(
        self,
        spec: Checkpoints,
        name: Callable[[], dict[str, str]],
        feeds: list[Feed],
        placement: Placement | None,
    ):
        self.every, self.path, self.kept = spec.every, spec.path, -1
        self._name, self._feeds, self._placement = name, feeds, placement
        self._same: dict[str, str] | None = None
        self._spans = placement is not None and placement.spans_hosts
        self._folder = Folder(spec)
        self._open = False
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "bilevel-checkpoints")
        self._writing: concurrent.futures.Future[str | None] | None = None
        for feed in feeds:
            feed.resumable(spec.reread)

    def __enter__(self) -> Keeper:
        with hosts.agreed(self._spans, "The first process cannot write checkpoints; see its own error."):
            if self._writes:
                self._folder.__enter__()
                self._open = True
        return self

    def __exit__(self, *exc) -> None:
        self._writer.shutdown()
        if self._open:
            self._folder.__exit__(*exc)

    @property
    def _writes(self) -> bool:
        return hosts.first() or not self._spans

    def name_run(self) -> dict[str, str]:
        """What makes it this run and no other; a run that begins asks for it while a chunk is computed."""
        if self._same is None:
            self._same = self._name()
        return self._same

    def stored(self) -> tuple[dict, dict] | None:
        """The trees and the metadata of the newest checkpoint; None where there is none.

        Raises:
          ValueError: it is one of another run, or all that there are have been damaged.
        """
        content: bytes | None = None
        where = str(self.path)
        with hosts.agreed(self._spans, "The first process cannot read its checkpoints; see its own error."):
            newest = self._folder.newest() if self._writes else None
            if newest is not None:
                content, where = newest[0], str(newest[1])
        if self._spans:
            content = hosts.share(content)
        if self._spans or self._feeds:
            self.name_run()  # together, and before an iterable can change what it has given
        if content is None:
            return None
        trees, meta = archive.read(content)
        if meta.get("kind") != "checkpoint":
            raise ValueError(f"checkpoint: {where} holds a {meta.get('kind')}, not a checkpoint.")
        stored = {**meta["same"], "versions": meta["versions"]}
        check_same_run(stored, {**self.name_run(), "versions": versions()}, where)
        return trees, meta

    def save(self, run) -> str | None:
        """Begin to write where the run stands; a sentence where the file before could not be written."""
        problem = self.written()
        members = [run.carry.member, *(part for _, part in run.dropped)]
        trees = {
            "members": [self._leaves(member) for member in members],
            "places": [
                np.zeros(0, np.int64) if run.active is None else run.active,
                *(p for p, _ in run.dropped),
            ],
            **run.record.trees(),
        }
        positions = json.dumps([feed.position(run.done) for feed in self._feeds])
        every = [positions]
        if self._spans:
            every = [content.decode() for content in hosts.gather_bytes(positions.encode())]
        meta = {
            "kind": "checkpoint",
            "step": run.done,
            "told": run.told,
            "halved": run.halved,
            "tol": run.settings.tol,
            "seconds": time.perf_counter() - run.began,
            "positions": every,
            "same": self.name_run(),
            "versions": versions(),
            "shown": stored.described(run.plan, run.carry.member, run.settings.steps),
        }
        if self._writes:
            self._writing = self._writer.submit(self._folder.write, run.done, trees, meta)
        self.kept = run.done
        return problem

    def _leaves(self, member: loop.Member) -> list:
        """On the host of the process that writes; others have a part in bringing them, and keep nothing."""
        leaves: Iterable = jax.tree.leaves(member)
        if self._spans:
            leaves = (hosts.fetch(leaf, here=self._writes) for leaf in leaves)
        return [_own(leaf) for leaf in leaves if self._writes]

    def written(self) -> str | None:
        """Wait until the last file is written; a sentence where that failed."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def restore(self, run, trees: dict, meta: dict) -> None:
        """Put a run where a checkpoint says."""
        run.record.restore(trees)
        run.told, run.halved, self.kept = meta["told"], meta["halved"], meta["step"]
        run.began = time.perf_counter() - meta["seconds"]
        members = [self._member(run, leaves) for leaves in trees["members"]]
        if run.settings.tol < meta["tol"]:
            members[0] = self._going_on(members[0], meta)
        run.carry = self._carry(run, members[0])
        if run.active is not None:
            run.active = np.asarray(trees["places"][0])
            run.dropped = [(np.asarray(p), m) for p, m in zip(trees["places"][1:], members[1:], strict=True)]
        if self._feeds:
            self._seek(meta)

    def _seek(self, meta: dict) -> None:
        """Each process reads on where it was itself."""
        every = meta["positions"]
        processes, index = (jax.process_count(), jax.process_index()) if self._spans else (1, 0)
        if len(every) != processes:
            raise ValueError(
                f"checkpoint: {self.path} is of a run by {len(every)} processes, each with an iterable of "
                "its own; go on with as many."
            )
        with hosts.agreed(self._spans, "The data of another process cannot go on; see its own error."):
            for feed, position in zip(self._feeds, json.loads(every[index]), strict=True):
                feed.seek(meta["step"], tuple(position))

    def _going_on(self, member: loop.Member, meta: dict) -> loop.Member:
        """What has converged to a larger tolerance goes on."""
        converged = np.asarray(member.status) == Status.CONVERGED
        if np.any(converged & (np.asarray(member.attempted) < meta["step"])):
            raise ValueError(
                f"checkpoint: some members in {self.path} converged to tol = {meta['tol']:g} before the "
                "others, and cannot catch up with them to a smaller one. Give that tol, or another folder."
            )
        status = jnp.where(member.status == Status.CONVERGED, Status.RUNNING, member.status)
        return dataclasses.replace(member, status=status.astype(jnp.int32))

    def _member(self, run, leaves: list) -> loop.Member:
        """A member, or members, of a run on its devices."""
        like, treedef = jax.tree.flatten(run.carry.member)
        wanted = [(x.shape[run.plan.population :], x.dtype) for x in like]
        got = [(np.shape(x)[run.plan.population :], jnp.result_type(x)) for x in leaves]
        if wanted != got:
            raise ValueError(
                f"checkpoint: {self.path} holds a state of other shapes than this run has; another version "
                "of bilevel may have written it. Give another folder, or remove this one."
            )
        if self._placement is None:
            return jax.tree.unflatten(treedef, [_copied(leaf) for leaf in leaves])
        axis = self._placement.population_axis
        left, shards = np.shape(leaves[-1]), self._placement.mesh.shape[axis] if axis else 1
        if run.plan.population and left[0] % shards:
            raise ValueError(
                f"checkpoint: {left[0]} members of {self.path} are left, which the {shards} devices of the "
                f"mesh along {axis!r} cannot share; go on with a number of devices that divides them."
            )
        shardings = jax.tree.leaves(run.plan.layout.tree().member)
        placed = [put(leaf, s) for leaf, s in zip(leaves, shardings, strict=True)]
        return jax.tree.unflatten(treedef, placed)

    def _carry(self, run, member: loop.Member) -> loop.Carry:
        front = (run.plan.capacity, *member.status.shape)

        def empty(like):
            rows = np.zeros((*front, like.shape[-1]), like.dtype)
            return jnp.asarray(rows) if self._placement is None else put(rows, self._everywhere)

        step = np.int32(run.done)
        return loop.Carry(
            member=member,
            rows=empty(run.carry.rows),
            trail=empty(run.carry.trail),
            step=jnp.asarray(step) if self._placement is None else put(step, self._everywhere),
        )

    @property
    def _everywhere(self):
        assert self._placement is not None
        return self._placement.sharding()


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _own(leaf):
    """A copy on the host: the next chunk takes over the memory of the run's arrays."""
    if _is_key(leaf):
        return archive.host_key(leaf)
    return np.array(leaf)


def _copied(leaf):
    return leaf if _is_key(leaf) else jnp.array(leaf, copy=True)


def identity(plan: loop.Plan, arguments: tuple, test, population: Population | None) -> dict[str, str]:
    """What makes a run the same: its program, traced without a mesh, and all that it begins with.

    Args:
      plan: of the run.
      arguments: params, hparams, key, train, valid, model state: those of `loop.compiled_start`.
      test: third source, or None.
      population: of the run, or None.
    """
    params, hparams, key, *sources, model_state = arguments
    train, valid, test = (_unplaced(source) for source in (*sources, test))
    shapes = jax.tree.map(abstract, (params, hparams, key, train, valid, model_state, test))
    trees = {
        "params": params, "hparams": hparams, "key": key, "train": train, "valid": valid, "test": test,
        "model_state": model_state,
    }  # fmt: skip
    sampling = {
        f"sampling of {name}": repr(source)
        for name, source in (("train", train), ("valid", valid))
        if isinstance(source, data.Minibatches)
    }
    return {
        "program": "".join(map(_program, _traced(plan, shapes))),
        **({} if population is None else {"population": f"{population.n} {population.halve_every}"}),
        **{name: fingerprint.arrays(tree) for name, tree in trees.items() if tree is not None},
        **sampling,
    }


# Digests of programs that JAX keeps traced.
_programs: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _program(traced: Any) -> str:
    jaxpr = traced.jaxpr.jaxpr
    if jaxpr not in _programs:
        _programs[jaxpr] = fingerprint.program(traced.jaxpr)
    return _programs[jaxpr]


def _traced(plan: loop.Plan, shapes: tuple) -> tuple[Any, Any]:
    """The programs of the start and of a chunk, without a mesh."""
    if plan.layout is None and jax.sharding.get_abstract_mesh().empty:
        return _programs_of(plan, shapes)  # those of the run itself, which is traced once
    bare = dataclasses.replace(plan, layout=None, axis=None)
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return _programs_of(bare, shapes)
    except Exception:  # losses that name axes of a mesh run on one only
        return _programs_of(bare, shapes)


def _programs_of(plan: loop.Plan, shapes: tuple) -> tuple[Any, Any]:
    """The programs of the start, with all numbers that live in the first state, and of a chunk."""
    *start, test = shapes
    begun = loop.compiled_start(plan).trace(*start)
    carry = begun.out_info[0]
    return begun, loop.compiled(plan).trace(carry, np.int32(0), np.float64(0), start[3], start[4], test)


def _unplaced(source: Any):
    """The source, sampled as it is, without a word of the mesh it lies on."""
    if isinstance(source, data.WithRng):
        return data.WithRng(_unplaced(source.source))
    if isinstance(source, data.Minibatches) and any(source.shardings):
        return dataclasses.replace(source, asked=source.strata, shardings=())
    return source
