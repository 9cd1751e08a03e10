"""`bilevel` beside its peers: one hypergradient, outer runs, and what users pick instead.

Every peer has a module, which alone imports it, and a process of its own, in an environment that `make peers`
builds. ``python -m benchmarks peers [TASK ...] [--quick]`` runs tasks and keeps what came out;
``--page FILE`` writes all that is kept as Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] = ()) -> int:
    """Exit status of the command."""
    from benchmarks.peers import command

    return command.main(argv)
