"""Collectives of a compiled program: which there are, how many bytes each, and in which loops.

Read from the text of the optimised HLO: a program is a list of computations, one of them the entry; a loop
is an instruction ``while`` with other computations as its body and its condition. XLA joins all-reduces that
are ready at the same time into one with a tuple of arrays: it counts once, with the bytes of all of them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import jax

OPS = {
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "ragged-all-to-all"),
    *("collective-broadcast", "collective-permute"),
}
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# `name = shape operation(operands), attributes`; the shape of several results is in parentheses.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
# Of loops, calls, conditionals and fusions; one name, or a list of them in braces.
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation|branch_computations|"
    r"called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    ``sizes``: bytes of each array that it makes, on one device. ``loops``: iterations of each loop that it is
    in, the outermost first, None where the program does not say; empty outside of loops. ``source``: where
    it comes from, in the words of JAX.
    """

    op: str
    sizes: tuple[int, ...]
    loops: tuple[int | None, ...]
    source: str

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def moved(self, unknown: int = 1) -> int:
        """Bytes of all iterations, with ``unknown`` of them in loops of unknown length."""
        return self.bytes * math.prod(unknown if n is None else n for n in self.loops)


def moved(found: Iterable[Collective], unknown: int = 1) -> int:
    """Bytes of all iterations of all of them."""
    return sum(c.moved(unknown) for c in found)


def optimised(fn, *args):
    """``fn`` compiled for these arguments, with all optimisations whatever the settings are."""
    return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 3})


def collectives(fn, *args) -> list[Collective]:
    """Those of ``fn`` compiled for these arguments."""
    return of_text(optimised(fn, *args).as_text())


def of_text(text: str) -> list[Collective]:
    """Those of an HLO module, as `as_text` of a compiled program has it."""
    computations, entry = _split(text)

    def walk(name: str, loops: tuple[int | None, ...]) -> Iterator[Collective]:
        for shape, op, rest in computations[name]:
            kind = op.removesuffix("-start")
            if kind in OPS:
                source = _SOURCE.search(rest)
                yield Collective(kind, _sizes(shape), loops, source[1] if source else "")
                continue
            trips = _TRIPS.search(rest)
            inside = (*loops, int(trips[1]) if trips else None) if op == "while" else loops
            for several, one in _CALLED.findall(rest):
                for called in (several or one).split(","):
                    yield from walk(called.strip().removeprefix("%"), inside)

    return list(walk(entry, ()))


def _split(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """(shape, operation, the rest) of each instruction of each computation, and the name of the entry."""
    computations: dict[str, list[tuple[str, str, str]]] = {}
    entry = current = ""
    for raw in text.splitlines():
        line = _COMMENT.sub("", raw)  # tuple shapes count their entries in comments
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            computations[current].append(instruction.groups())
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation.")
    return computations, entry


def _sizes(shape: str) -> tuple[int, ...]:
    """Bytes of each array of a shape."""
    found = []
    for _, bits, dims in _ARRAY.findall(shape):
        count = math.prod(int(n) for n in dims.split(",") if n)
        found.append(count * int(bits or 8) // 8)
    return tuple(found)
