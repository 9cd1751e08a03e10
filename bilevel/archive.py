"""Pytrees of arrays on disk: one zip file of plain ``.npy`` members and a JSON manifest, no pickle.

Files appear whole or not at all (written aside, flushed, renamed). The comment at the end of the zip file
is the SHA-256 digest of all bytes before it, so that any damage is found before anything is read. Dicts,
lists, tuples and None are restored as they were; any other container (a NamedTuple, a flax State, a
dataclass) comes back through ``like``, a tree of the same structure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import PyTree

_FORMAT, _VERSION = "bilevel", 2
_DIGEST = 64  # characters of a SHA-256 digest
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class HostKey:
    """A typed PRNG key that has left its device: its numbers, and the name of its kind."""

    data: np.ndarray
    impl: str


class MissingFileError(FileNotFoundError, ValueError):
    """A path that names no file, or a file in no folder."""


def write(path: str | os.PathLike, trees: dict[str, PyTree], meta: dict) -> None:
    """Write named trees of arrays, and metadata that JSON can hold.

    Args:
      path: of the file to write; its folder must exist.
      trees: pytrees of arrays (typed PRNG keys, `HostKey` and bfloat16 included), by name.
      meta: whatever JSON can hold.

    Raises:
      MissingFileError: no such folder; OSError: the file cannot be written; TypeError: a leaf that is no
        array. The path then holds what it held before, unless it was the last thing that failed, to make the
        new name in its folder permanent.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise MissingFileError(f"path: the folder {path.parent} does not exist; create it first.")
    arrays: list[np.ndarray] = []
    dtypes: list[str] = []

    def put(leaf) -> int:
        array, dtype = _to_numpy(leaf)
        arrays.append(array)
        dtypes.append(dtype)
        return len(arrays) - 1

    layout = {name: _encode(tree, put) for name, tree in trees.items()}
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "trees": layout,
        "dtypes": dtypes,
        "meta": meta,
    }
    with aside(path) as temporary, open(temporary, "x+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = b"0" * _DIGEST
            archive.writestr("manifest.json", json.dumps(manifest))
            for i, array in enumerate(arrays):
                with archive.open(f"{i}.npy", "w", force_zip64=True) as member:
                    _write_npy(member, array)
        _seal(file)
        os.fsync(file.fileno())
    _flush_folder(path.parent)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end, and is removed where that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_npy(file, array: np.ndarray) -> None:
    """As numpy's ``write_array``, which takes several times as long for the small arrays of a state."""
    columns_first = array.flags.f_contiguous and not array.flags.c_contiguous
    file.write(_npy_header(array.dtype.str, columns_first, array.shape))
    flat = np.ascontiguousarray(array.T if columns_first else array).reshape(-1)
    file.write(flat.view(np.uint8).data)


@functools.lru_cache(maxsize=256)
def _npy_header(dtype: str, columns_first: bool, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": columns_first, "shape": shape}
    )
    return header.getvalue()


def intact(content: bytes | memoryview) -> bool:
    """Whether this is the content of a file as `write` left it, to the last bit."""
    stream = io.BytesIO(content)
    return _digest(stream) == stream.read()


class File:
    """A file that `write` made, whose arrays are read one by one.

    ``path``: where it is; ``meta``: its metadata; ``layouts``: of its trees by name, where an int is the
    number of an array.

    Args:
      source: path of the file, or its content.

    Raises:
      MissingFileError: no such file; ValueError: not such a file, or damaged.
    """

    def __init__(self, source: str | os.PathLike | bytes | memoryview):
        self._stream: BinaryIO
        if isinstance(source, (bytes, memoryview)):
            self.path, self._stream = Path("the content given"), io.BytesIO(source)
        else:
            self.path = Path(source)
            if not self.path.is_file():
                raise MissingFileError(f"path: there is no file {self.path}.")
            try:
                self._stream = open(self.path, "rb")  # noqa: SIM115
            except FileNotFoundError:  # removed meanwhile
                raise MissingFileError(f"path: there is no file {self.path}.") from None
        try:
            with self._sound():
                self._open()
        except BaseException:
            self._stream.close()
            raise

    def _open(self) -> None:
        if _digest(self._stream) != self._stream.read():
            raise ValueError("its digest is not that of its content")
        self._zip = zipfile.ZipFile(self._stream)
        manifest = json.loads(self._zip.read("manifest.json"))
        if manifest["format"] != _FORMAT or manifest["version"] > _VERSION:
            raise ValueError("another format or a newer version")
        self.layouts: dict[str, Any] = dict(manifest["trees"])
        self.meta: dict[str, Any] = dict(manifest["meta"])
        self._dtypes: list[str] = list(manifest["dtypes"])
        _check(self.layouts, len(self._dtypes))

    def __enter__(self) -> File:
        return self

    def __exit__(self, *raised) -> None:
        self._zip.close()
        self._stream.close()

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """What goes wrong while it is read is a damage, and one error."""
        try:
            yield
        except (zipfile.BadZipFile, KeyError, IndexError, ValueError, EOFError, TypeError) as error:
            raise ValueError(
                f"path: {self.path} is not a file that bilevel wrote, or it is damaged ({error})."
            ) from error

    def leaf(self, number: int) -> Any:
        """A numpy array, or a PRNG key."""
        with self._sound(), self._zip.open(f"{number}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            return _from_numpy(array, self._dtypes[number])

    def shape(self, number: int) -> jax.ShapeDtypeStruct:
        """Of an array that is not read; of a PRNG key that of its numbers."""
        with self._sound(), self._zip.open(f"{number}.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            name = self._dtypes[number]
            return jax.ShapeDtypeStruct(shape, dtype if name.startswith("key:") else jnp.dtype(name))


def read(
    source: str | os.PathLike | bytes | memoryview, like: dict[str, PyTree] | None = None
) -> tuple[dict, dict]:
    """The named trees (numpy arrays; PRNG keys as keys) and the metadata of a file.

    Args:
      source: path of a file written by `write`, or the content of one.
      like: trees of the same structure, by name, for containers other than dict, list, tuple, None.

    Raises:
      MissingFileError: no such file; ValueError: not such a file, damaged, or another structure.
    """
    like = like or {}
    with File(source) as file:
        trees = {name: decoded(of, file.leaf, like.get(name), name) for name, of in file.layouts.items()}
    return trees, file.meta


def _digest(file: BinaryIO) -> bytes:
    """Of all that stands before the place of the digest at the end, where the file is left."""
    left = file.seek(0, os.SEEK_END) - _DIGEST
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0:
        block = file.read(min(left, _BLOCK))
        if not block:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def _seal(file: BinaryIO) -> None:
    """Put the digest of a file's content in the place that is kept for it at the end."""
    file.flush()
    digest = _digest(file)
    file.seek(-_DIGEST, os.SEEK_END)
    file.write(digest)
    file.flush()


def _flush_folder(folder: Path) -> None:
    """Make a new name in a folder last, where the system lets folders be opened and flushed."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(number)


def _check(layout, leaves: int) -> None:
    """The layouts of a manifest refer to leaves that are there."""
    if isinstance(layout, dict) and "is" in layout:
        if layout["is"] not in ("dict", "list", "tuple", "other"):
            raise ValueError(f"a container of kind {layout['is']!r}")
        layout = layout["leaves"] if layout["is"] == "other" else layout["of"]
    if isinstance(layout, (dict, list)):
        for child in layout.values() if isinstance(layout, dict) else layout:
            _check(child, leaves)
    elif layout is not None and not (type(layout) is int and 0 <= layout < leaves):
        raise ValueError("a leaf that is not there")


def host_key(key: jax.Array) -> HostKey:
    """A copy of a typed PRNG key."""
    return HostKey(np.array(jax.random.key_data(key)), str(jax.random.key_impl(key)))


def _to_numpy(leaf) -> tuple[np.ndarray, str]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = host_key(leaf)
    if isinstance(leaf, HostKey):
        return leaf.data, f"key:{leaf.impl}"
    array = np.asarray(leaf)
    if array.dtype.kind == "O":
        raise TypeError(f"only arrays can be saved, got {leaf!r:.80}.")
    name = array.dtype.name
    # The extended floats (bfloat16, float8) have no .npy description.
    return (array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array), name


def _from_numpy(array: np.ndarray, dtype: str):
    if dtype.startswith("key:"):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=dtype.removeprefix("key:"))
    return array if array.dtype.name == dtype else array.view(jnp.dtype(dtype))


def _encode(tree: PyTree, put) -> Any:
    """JSON of the structure; an int is the number of a leaf."""
    if tree is None:
        return None
    if isinstance(tree, (np.ndarray, jax.Array, HostKey)):  # or JAX would be asked, slowly
        return put(tree)
    if type(tree) in (list, tuple):
        return {"is": type(tree).__name__, "of": [_encode(child, put) for child in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"is": "dict", "of": {key: _encode(child, put) for key, child in tree.items()}}
    if jax.tree_util.all_leaves([tree]):
        return put(tree)
    children = jax.tree.leaves(tree)
    return {"is": "other", "type": type(tree).__name__, "leaves": [put(leaf) for leaf in children]}


def decoded(layout: Any, leaf: Callable[[int], Any], like: PyTree, name: str) -> PyTree:
    """A tree of a `File`, given what reads a leaf by its number; ``like`` and ``name`` as of `read`."""
    if layout is None:
        return None
    if isinstance(layout, int):
        return leaf(layout)
    if layout["is"] == "other":
        if like is None:
            raise ValueError(
                f"{name} holds a {layout['type']}, which cannot be restored by itself; pass like=, values of "
                "the same structure."
            )
        stored = [leaf(i) for i in layout["leaves"]]
        treedef: Any = jax.tree.structure(like)
        if treedef.num_leaves != len(stored):
            raise ValueError(
                f"like: {name} has {treedef.num_leaves} leaves there and {len(stored)} in the file."
            )
        return jax.tree.unflatten(treedef, stored)
    if layout["is"] == "dict":
        of = layout["of"]
        if like is not None and (not isinstance(like, dict) or set(like) != set(of)):
            raise ValueError(
                f"like: {name} is a dict of {sorted(of)} in the file, got {type(like).__name__}."
            )
        return {k: decoded(v, leaf, like and like[k], f"{name}[{k!r}]") for k, v in of.items()}
    of = layout["of"]
    if like is not None and (not isinstance(like, (list, tuple)) or len(like) != len(of)):
        raise ValueError(f"like: {name} is a {layout['is']} of {len(of)} in the file.")
    children = [decoded(v, leaf, like and like[i], f"{name}[{i}]") for i, v in enumerate(of)]
    return children if layout["is"] == "list" else tuple(children)
