"""Builds and executes notebooks from the sources beside them: ``python notebooks/build.py [01 02 ...]``.

An .ipynb holds the cells of its .py and what they show. It has no dates, paths or versions, so that what
changes in it is what changed in the notebook.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources(names=()) -> list[Path]:
    """The numbered ones, or those whose names begin with one of ``names``."""
    return [p for p in sorted(FOLDER.glob("[0-9][0-9]_*.py")) if not names or p.name.startswith(tuple(names))]


def read(source: Path):
    """The notebook of a source, not yet executed."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = dict(METADATA)
    notebook.nbformat_minor = 5
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02}", {}
    return notebook


def execute(notebook, timeout: int = 300):
    """The same with what its cells show, executed in the folder of the notebooks."""
    client = NotebookClient(
        notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    notebook.metadata = dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


def main(names) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for source in sources(names):
        began = time.perf_counter()
        notebook = execute(read(source))
        path = source.with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(
            f"{path.name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size // 1000} kB", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
