"""Where the arrays of a run lie: on which devices, and split along which axes.

The engine is `jax.jit` on arrays that carry a `jax.sharding.NamedSharding`: the same program runs on one
device, on many, and on many hosts. Placement follows the arrays given; ``mesh=`` places those that lie
nowhere in particular. Everything that a run derives from params and hparams (optimiser states, warm starts,
the best pair) is laid out as they are.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel import fingerprint, hosts
from bilevel.data import Minibatches, Source, Stacked, Whole, WithRng, is_iterable, shardings
from bilevel.problem import PyTree, StaticTree
from bilevel.result import Result
from bilevel.trees import readable

DATA, POPULATION = "data", "population"


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh of a run.

    ``mesh``: its axes are all Auto; ``given``: as the user made it. ``spreads``: unplaced batches are split
    over the axis "data". ``members``: the members of a population are split over the axis "population".
    """

    mesh: Mesh
    given: Mesh
    spreads: bool = False
    members: bool = False

    @property
    def spans_hosts(self) -> bool:
        """Whether the mesh has devices of other processes."""
        return self.mesh.is_multi_process

    def sharding(self, *axes) -> NamedSharding:
        """On the mesh, split along these axes."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def population_axis(self) -> str | None:
        """The mesh axis of the members."""
        return POPULATION if self.members else None

    def variables(self, tree: PyTree, name: str, stacked: bool = False) -> PyTree:
        """Params, hparams, keys: as they lie, else a copy on each device; stacked ones split by members."""
        axes = (POPULATION,) if stacked and self.members else ()
        return self._placed(tree, name, lambda leaf: self.sharding(*axes))

    def source(self, source: Source, name: str) -> Source:
        """The source with its arrays as they lie, else split by rows over the axis "data"."""
        if isinstance(source, WithRng):
            return WithRng(self.source(source.source, name))
        if isinstance(source, Minibatches):
            placed = self._placed(source.arrays, name, self._by_rows(source.arrays, 0, name))
            return dataclasses.replace(source, arrays=placed, shardings=shardings(placed)).checked()
        if isinstance(source, Whole):
            placed = self._placed(source.arrays, name, self._by_rows(source.arrays, 0, name))
            return dataclasses.replace(source, arrays=placed)
        if isinstance(source, Stacked):
            placed = self._placed(source.batches, name, self._by_rows(source.batches, 1, name))
            return dataclasses.replace(source, batches=placed)
        return source

    def fed(self, batches: PyTree, name: str, leading: int) -> PyTree:
        """Batches of an iterable behind ``leading`` axes; of several processes each gives its own rows."""
        if not self.spans_hosts:
            return self._placed(batches, name, self._by_rows(batches, leading, name))
        split = self._by_rows(batches, leading, name, share=len(set(self._parts().values())))

        def placed(leaf):
            return _converted(leaf, self.mesh) if _lies(leaf) else _put_own(leaf, split(leaf))

        return jax.tree.map(placed, batches)

    def check_fed(self, batch: PyTree, name: str) -> None:
        """Whether the processes give parts of one batch; collective where there are several.

        Raises:
          ValueError: nothing says how batches are split; shapes that differ from process to process; arrays
            of which two processes hold the same rows and do not give the same.
        """
        if not self.spans_hosts:
            return
        leaves = [
            (name + jax.tree_util.keystr(path), leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
            if not _lies(leaf)
        ]
        # A mesh of members only has all rows everywhere.
        if leaves and not self.spreads and (DATA in self.mesh.shape or not self.members):
            raise ValueError(
                f"{name} is an iterable, of which each process gives its own rows, but nothing says how they "
                f'are split: pass mesh=, with an axis "{DATA}"; it is the mesh that the other arrays lie on.'
            )
        split = self._by_rows(batch, 0, name, share=len(set(self._parts().values())))
        mine = self._parts()[jax.process_index()]
        facts = []
        for _, leaf in leaves:
            part = "all rows" if split(leaf).is_fully_replicated else f"rows of {mine}"
            facts.append([f"{np.shape(leaf)} {jnp.result_type(leaf)}", part, fingerprint.arrays(leaf)])
        every = [json.loads(content) for content in hosts.gather_bytes(json.dumps(facts).encode())]
        _check_parts([where for where, _ in leaves], every, name)

    def _parts(self) -> dict[int, tuple[int, ...]]:
        """Of each process the places along the axis "data" that its devices have."""
        if DATA not in self.mesh.shape:
            return dict.fromkeys({device.process_index for device in self.mesh.devices.flat}, ())
        held: dict[int, set[int]] = {}
        axis = self.mesh.axis_names.index(DATA)
        for place, device in np.ndenumerate(self.mesh.devices):
            held.setdefault(device.process_index, set()).add(place[axis])
        parts = {process: tuple(sorted(places)) for process, places in held.items()}
        kinds = set(parts.values())
        if len(set(map(len, kinds))) > 1 or sum(map(len, kinds)) != self.mesh.shape[DATA]:
            raise ValueError(
                f'mesh: its axis "{DATA}" gives the processes parts that overlap, so that none can give rows '
                "of its own. Make the mesh with jax.make_mesh."
            )
        return parts

    def returned(self, tree: PyTree) -> PyTree:
        """The tree on the mesh as the user made it."""
        if self.given == self.mesh:
            return tree
        return jax.tree.map(lambda x: _converted(x, self.given) if isinstance(x, jax.Array) else x, tree)

    def returned_result(self, result: Result) -> Result:
        """The same for all arrays of a result."""
        best = result.best
        return dataclasses.replace(
            result,
            params=self.returned(result.params),
            hparams=self.returned(result.hparams),
            model_state=self.returned(result.model_state),
            state=self.returned(result.state),
            best=dataclasses.replace(
                best,
                params=self.returned(best.params),
                hparams=self.returned(best.hparams),
                model_state=self.returned(best.model_state),
            ),
        )

    def _by_rows(self, arrays: PyTree, leading: int, name: str, share: int = 1):
        """The sharding of each unplaced leaf: those with as many rows as the longest are split."""
        longest = max(
            (np.shape(x)[leading] for x in jax.tree.leaves(arrays) if np.ndim(x) > leading), default=0
        )
        devices = self.mesh.shape.get(DATA, 1)

        def sharding(leaf):
            split = self.spreads and devices > 1 and np.ndim(leaf) > leading
            if not split or np.shape(leaf)[leading] != longest:
                return self.sharding()
            if longest * share % devices:
                whole = longest * share // devices * devices
                raise ValueError(
                    f"{name}: {longest * share} rows do not divide over the {devices} devices of mesh axis "
                    f'"{DATA}". Drop rows ({whole} would do) or pad them and give the padding weight zero.'
                )
            return self.sharding(*[None] * leading, DATA)

        return sharding

    def _placed(self, tree: PyTree, name: str, sharding) -> PyTree:
        unplaced = [leaf for leaf in jax.tree.leaves(tree) if not _lies(leaf) and readable(leaf)]
        if self.spans_hosts and unplaced:
            _same_everywhere(unplaced, name)

        def placed(leaf):
            return _converted(leaf, self.mesh) if _lies(leaf) else put(leaf, sharding(leaf))

        return jax.tree.map(placed, tree)


def _check_parts(names: list[str], every: list[list], name: str) -> None:
    """Whether what the processes say of their first batch, see `Placement.check_fed`, goes together."""
    shapes = [[shape for shape, _, _ in facts] for facts in every]
    for process, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(
                f"{name} differs from process to process: batches of shape {', '.join(other)} in process "
                f"{process}, {', '.join(shapes[0])} in process 0. Each process has to give as many rows."
            )
    for i, where in enumerate(names):
        of_parts: dict[str, str] = {}
        for facts in every:
            _, part, digest = facts[i]
            if of_parts.setdefault(part, digest) != digest:
                raise ValueError(
                    f"{where} of the first batch differs between processes whose devices hold the same of it "
                    f"({part}). Give the same in each of them. Only arrays with as many rows as the longest "
                    f'of a batch are split over the mesh axis "{DATA}": repeat for each row what belongs to '
                    "the rows of one process."
                )


def several_hosts(mesh, tree: PyTree) -> bool:
    """Whether a run with ``mesh=`` and these arguments is one of several processes; iterables do not tell."""
    leaves = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_iterable) if isinstance(leaf, jax.Array)]
    return hosts.shared(leaves) or (isinstance(mesh, Mesh) and mesh.is_multi_process)


def find(mesh, population: bool, trees: dict[str, PyTree]) -> Placement | None:
    """The placement that ``mesh=`` and the arrays given ask for; None for one device.

    Args:
      mesh: as given to `bilevel.optimize`, or None.
      population: whether there are members.
      trees: all arrays of the run, by the name of their argument.

    Raises:
      TypeError, ValueError: no mesh; one without the axis "data"; arrays that lie on another mesh.
    """
    lying: list[tuple[str, Any]] = [
        (name + jax.tree_util.keystr(path), leaf)
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if _lies(leaf)
    ]
    if mesh is not None:
        _check_mesh(mesh, population)
    given, source = mesh, "mesh="
    if mesh is None:
        on_mesh = ((name, x.sharding.mesh) for name, x in lying if isinstance(x.sharding, NamedSharding))
        source, given = next(on_mesh, ("", None))
    explicit = given is not None and AxisType.Explicit in given.axis_types
    if given is None or (mesh is None and given.size == 1 and not explicit):
        _check_one_place(lying)
        return None
    for name, leaf in lying:
        other = getattr(leaf.sharding, "mesh", None)
        if other is None:
            raise ValueError(
                f"{name} was put on {_devices(leaf.sharding)} by itself, but {source} is the mesh "
                f"{_describe(given)}. Put it on that mesh with jax.device_put and a NamedSharding, or leave "
                "it as numpy."
            )
        if not _same_mesh(other, given):
            raise ValueError(
                f"{name} lies on the mesh {_describe(other)}, but {source} is {_describe(given)}: all arrays "
                "of a run lie on one mesh. Put it there with jax.device_put."
            )
    auto = Mesh(given.devices, given.axis_names, axis_types=(AxisType.Auto,) * len(given.axis_names))
    if auto.is_multi_process and len({d.process_index for d in auto.devices.flat}) != jax.process_count():
        raise ValueError(
            f"mesh has devices of some of the {jax.process_count()} processes; take the devices of this "
            "process (jax.local_devices()) or of all (jax.devices())."
        )
    members = population and POPULATION in given.axis_names
    return Placement(auto, given, spreads=mesh is not None and DATA in given.axis_names, members=members)


def _check_one_place(lying: list[tuple[str, Any]]) -> None:
    """Whether arrays that were put somewhere without a mesh are all on the same devices."""
    for name, leaf in lying[1:]:
        first, other = lying[0][1].sharding, leaf.sharding
        if first.device_set != other.device_set:
            raise ValueError(
                f"{name} was put on {_devices(other)}, but {lying[0][0]} on {_devices(first)}: all arrays "
                "of a run lie on one device or on one mesh. Put them there with jax.device_put, or leave "
                "them as numpy."
            )


def _check_mesh(mesh, population: bool) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f'mesh must be a jax.sharding.Mesh such as jax.make_mesh((8,), ("data",)), got {mesh!r}.'
        )
    if DATA in mesh.axis_names or (population and POPULATION in mesh.axis_names):
        return
    wanted = f'"{DATA}"' + (f' or "{POPULATION}"' if population else "")
    raise ValueError(
        f"mesh needs an axis named {wanted}, along which batches are split, got {_describe(mesh)}."
    )


def _lies(leaf) -> bool:
    """Whether an array was put where it is, or a shape is said to lie somewhere."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is not None
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed


def _same_mesh(one, other) -> bool:
    return (
        one.axis_names == other.axis_names
        and one.devices.shape == other.devices.shape
        and bool((one.devices == other.devices).all())
    )


def _describe(mesh) -> str:
    axes = ", ".join(f"{name}: {size}" for name, size in mesh.shape.items())
    return f"({axes})" if axes else "without axes"


def _devices(sharding) -> str:
    return ", ".join(sorted(map(str, sharding.device_set)))


def put(leaf, sharding: NamedSharding):
    """An array, the same in each process, on a mesh."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _put_own(leaf, sharding: NamedSharding):
    """An array on a mesh of which each process gives its own part."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        data = _put_own(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def _converted(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    """The same array, its buffers shared, said to lie on an equal mesh with other kinds of axes."""
    sharding: Any = leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh == mesh:
        return leaf
    same = NamedSharding(mesh, sharding.spec)
    if isinstance(leaf, jax.ShapeDtypeStruct) or same.is_fully_addressable:
        return put(leaf, same)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _converted(jax.random.key_data(leaf), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    parts = [part.data for part in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, same, parts)


def _same_everywhere(leaves: list, name: str) -> None:
    digests = set(hosts.gather_bytes(fingerprint.arrays(leaves).encode()))
    if len(digests) > 1:
        raise ValueError(
            f"{name} differs from process to process. Arrays that lie nowhere in particular have to be the "
            "same whole in each; where each process holds rows of its own, make one array of them with "
            "jax.make_array_from_process_local_data."
        )


def refuse_explicit(**trees: PyTree) -> None:
    """Raise ValueError where an array lies on a mesh with Explicit axes that is not the one in force.

    Derivatives need to know that mesh: JAX then fails deep inside a loss. Under `jax.jit` the mesh of its
    arguments is known: where there are tracers nothing is refused.
    """
    leaves = [(name, leaf) for name, tree in trees.items() for leaf in jax.tree.leaves(tree, is_iterable)]
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
        return
    context = jax.sharding.get_abstract_mesh()
    for name, leaf in leaves:
        if isinstance(leaf, jax.Array):
            mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
            if mesh is None or AxisType.Explicit not in mesh.axis_types or mesh == context:
                continue
            raise ValueError(
                f"{name} lies on the mesh {_describe(mesh)} with Explicit axes. Call this under "
                "jax.jit or inside `with jax.set_mesh(mesh):`, or make the mesh with "
                f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}. (bilevel.optimize takes "
                "either.)"
            )


# --- Layout of what a run derives from params and hparams -----------------------------------------------


def layout(
    carry: PyTree, members: int | None, placement: Placement, params: PyTree, hparams: PyTree
) -> StaticTree:
    """Where the leaves of a carry lie: like the leaf of params or hparams that they belong to.

    A leaf belongs to one if its path ends with that one's path and its last axes are that one's (moments of
    an optimiser, a warm start, rows of a limited-memory matrix); all others are on every device. In a
    population all have the axis of members in front. What the host reads is on every device.
    """
    originals = {
        "params": _specs(params, members),
        "hparams": _specs(hparams, members),
    }
    front = (placement.population_axis,) if members is not None else ()

    def sharding(path, leaf):
        if jax.tree_util.keystr(path[:1]) != ".member" or jax.tree_util.keystr(path) in _READ:
            return placement.sharding()
        shape = leaf.shape[len(front) :]
        order = ("hparams", "params") if _OUTER & set(map(_name, path)) else ("params", "hparams")
        found = (_matching(path, shape, originals[kind]) for kind in order)
        spec = next((spec for spec in found if spec is not None), ())
        return placement.sharding(*front, *spec)

    return StaticTree(*_flat(jax.tree_util.tree_map_with_path(sharding, carry)))


_OUTER = {"free", "outer", "hparams"}
_READ = {".member.status", ".member.attempted", ".member.best.value", ".member.best.step"}


def _name(key) -> str:
    return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", ""))))


def _flat(tree) -> tuple[tuple, Any]:
    leaves, treedef = jax.tree.flatten(tree)
    return tuple(leaves), treedef


def _specs(tree: PyTree, members: int | None) -> list[tuple]:
    """Path, shape and spec of each leaf, longest paths first; without the axis of members."""
    out = []
    skip = 0 if members is None else 1
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        spec = tuple(leaf.sharding.spec)
        spec += (None,) * (leaf.ndim - len(spec))
        out.append((path, leaf.shape[skip:], spec[skip:]))
    return sorted(out, key=lambda entry: -len(entry[0]))


def _matching(path, shape, originals) -> tuple | None:
    for ending, like, spec in originals:
        same_place = not ending or path[-len(ending) :] == ending
        if same_place and len(shape) >= len(like) and shape[len(shape) - len(like) :] == like:
            return (None,) * (len(shape) - len(like)) + spec
    return None
