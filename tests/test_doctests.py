"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import bilevel

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(bilevel.__path__, "bilevel.")
    if module.name != "bilevel.__main__"
)
EXAMPLES = [
    pytest.param(example, id=example.name)
    for name in ["bilevel", *MODULES]
    for example in doctest.DocTestFinder().find(importlib.import_module(name))
    if example.examples
]


def test_examples_are_found():
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example):
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
    assert results.attempted == len(example.examples)
    assert results.failed == 0
