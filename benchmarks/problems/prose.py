"""Real text without a download: docstrings, comments, manual pages and code of Python's own standard library.

A text is the prose of one module: paragraphs of its docstrings and comments, in lower case, digits as 0 and
rare symbols as ?, without code, and each paragraph once in all. It is cut into windows that do not overlap,
and neighbouring windows into blocks; a block lies in one split as a whole. A class is a subject, a handful of
modules. Texts differ a little between versions of Python, and so does what is measured on them; modules that
a version or a distribution leaves out are left out.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ALPHABET = " abcdefghijklmnopqrstuvwxyz0.,;:'()-_`\"=?"
LENGTH, BLOCK = 48, 8  # characters of a window, windows of a block
MANUAL = "pydoc_data.topics"
SUBJECTS = {
    "mail": ("email", "smtplib", "imaplib", "poplib", "mailbox", "mimetypes", "quopri", "base64"),
    "concurrency": ("asyncio", "concurrent", "threading", "multiprocessing", "selectors", "queue", "sched"),
    "numbers": (
        "_pydecimal", "fractions", "statistics", "random", "numbers", "datetime", "_pydatetime", "calendar",
        "ipaddress", "heapq", "bisect",
    ),
    "language": (MANUAL,),
    "web": ("http", "urllib", "wsgiref", "html", "xmlrpc", "socketserver", "socket", "ssl", "ftplib"),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "traceback", "profile", "cProfile", "timeit"),
    "settings": ("logging", "argparse", "optparse", "configparser", "getopt", "locale", "gettext", "shlex"),
    "objects": ("typing", "inspect", "dataclasses", "enum", "functools", "collections", "abc", "contextlib"),
    "files": (
        "tarfile", "zipfile", "shutil", "pathlib", "os", "tempfile", "_pyio", "glob", "fnmatch", "filecmp",
        "fileinput", "ntpath", "posixpath", "genericpath", "gzip", "subprocess",
    ),
    "xml": ("xml", "plistlib"),
    "imports": ("importlib", "pkgutil", "zipimport", "modulefinder", "runpy", "venv", "site", "sysconfig"),
    "tools": ("difflib", "pickle", "pickletools", "platform", "pydoc", "dis", "ast", "tokenize", "codecs"),
}  # fmt: skip


# Kinds of text, far easier to tell apart than subjects: prose, the manual, names of characters, and code.
CODE, NAMES = "code of ", "names of characters"
KINDS = {
    "prose": SUBJECTS["concurrency"],
    "manual": (MANUAL,),
    "names": (NAMES,),
    "code": tuple(CODE + module for module in ("asyncio", "email", "tarfile", "argparse", "inspect")),
}


class Windows(NamedTuple):
    """Rows of one split: symbols (rows, length), class numbers, and where in which text each begins."""

    text: np.ndarray
    label: np.ndarray
    place: np.ndarray


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# --- Prose ------------------------------------------------------------------------------------------------


def files(module: str) -> list[Path]:
    """The source files of a module or package of the standard library; none if it is missing."""
    path = Path(sysconfig.get_path("stdlib"), module)
    single = path.with_suffix(".py")
    return [single] if single.exists() else sorted(path.rglob("*.py"))


def paragraphs(source: str) -> Iterator[str]:
    """Those of the docstrings, and the blocks of comments that have lines of their own."""
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, _DOCUMENTED):
            yield from split(ast.get_docstring(node) or "")
        for field in ("body", "orelse", "handlers", "finalbody"):
            below = getattr(node, field, ())
            stack += below if isinstance(below, list) else ()
    block: list[str] = []
    for line in (*source.splitlines(), ""):
        words = line.strip()
        text = words.lstrip("#").strip() if words.startswith("#") else ""
        if text:
            block.append(text)
        elif block:
            yield " ".join(block)
            block = []


def split(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def in_alphabet(text: str) -> str:
    return _STRANGE.sub("?", re.sub(r"\d", "0", " ".join(text.lower().split())))


def code(source: str) -> str:
    """A program without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return in_alphabet(ast.unparse(tree))


def plain(paragraph: str) -> str:
    """In the alphabet; empty where it is no prose: short, or code, tables and rules."""
    text = in_alphabet(paragraph)
    letters = len(_LETTERS.sub("", text))
    prose = text.count(" ") >= 5 and letters >= 0.85 * len(text) and ">>>" not in paragraph
    return text if prose else ""


_STRANGE, _LETTERS = re.compile(f"[^{re.escape(ALPHABET)}]"), re.compile("[^a-z ]")


@functools.cache
def texts() -> Mapping[str, str]:
    """The prose of each module of ``SUBJECTS``, no paragraph twice, and what else ``KINDS`` names."""
    found, seen = {}, set()
    for module in dict.fromkeys(m for modules in (*SUBJECTS.values(), *KINDS.values()) for m in modules):
        if module.startswith(CODE):
            found[module] = " ".join(code(path.read_text("utf-8")) for path in files(module[len(CODE) :]))
            continue
        if module == NAMES:
            found[module] = in_alphabet(" ".join(unicodedata.name(chr(i), "") for i in range(0x20, 0x3000)))
            continue
        kept = []
        for paragraph in map(plain, _raw(module)):
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        found[module] = " ".join(kept)
    return found


def _raw(module: str) -> Iterator[str]:
    if module == MANUAL:
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield from split(topics[topic])
        return
    for path in files(module):
        if not {"test", "tests"} & set(path.parts):
            yield from paragraphs(path.read_text("utf-8"))


# --- Windows ----------------------------------------------------------------------------------------------


def encode(text: str) -> np.ndarray:
    """Places in the alphabet, int32."""
    places = np.zeros(128, np.int32)
    places[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(len(ALPHABET))
    return places[np.frombuffer(text.encode(), np.uint8)]


@functools.cache
def blocks(module: str) -> tuple[np.ndarray, np.ndarray]:
    """All whole blocks of a module's text: symbols (blocks, BLOCK, LENGTH) and where each window begins."""
    text = encode(texts()[module])
    size = BLOCK * LENGTH
    whole = len(text) // size
    starts = np.arange(whole * BLOCK).reshape(whole, BLOCK) * LENGTH
    return text[: whole * size].reshape(whole, BLOCK, LENGTH), starts


def splits(classes: Sequence[Sequence[str]], rows: Sequence[int], rng: np.random.Generator) -> list[Windows]:
    """As many windows of each class as ``rows`` says for each split, from blocks drawn for it.

    Args:
      classes: the modules of each.
      rows: windows of a class in each split, multiples of ``BLOCK``.
      rng: deals the blocks out, and shuffles the rows of a split.

    Raises:
      ValueError: a class has too little text in this version of Python.
    """
    modules = list(texts())
    parts: list[list[Windows]] = [[] for _ in rows]
    for label, names in enumerate(classes):
        text, start = (np.concatenate(arrays) for arrays in zip(*map(blocks, names), strict=True))
        number = np.concatenate([np.full(len(blocks(m)[0]), modules.index(m)) for m in names])
        if sum(rows) > len(text) * BLOCK:
            raise ValueError(
                f"{', '.join(names)}: {len(text) * BLOCK} windows in this Python, {sum(rows)} asked for."
            )
        dealt = np.split(rng.permutation(len(text)), np.cumsum(rows) // BLOCK)
        for part, chosen in zip(parts, dealt, strict=False):
            place = np.stack([np.repeat(number[chosen], BLOCK), start[chosen].ravel()], axis=1)
            window = text[chosen].reshape(-1, LENGTH)
            part.append(Windows(window, np.full(len(window), label, np.int32), place))
    return [_shuffled(part, rng) for part in parts]


def _shuffled(parts: Sequence[Windows], rng: np.random.Generator) -> Windows:
    joined = Windows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = rng.permutation(len(joined.label))
    return Windows(*(array[order] for array in joined))
