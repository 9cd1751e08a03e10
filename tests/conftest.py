"""Tests are stricter than users: float64, no silent rank promotion, warnings are errors, four devices.

Of the large tables (a test with many cases, each a program to compile) a fixed third is run, and tests marked
``thorough`` are not; ``--all`` runs everything.
"""

import collections
import hashlib
import importlib.metadata
import os

# Before JAX starts its backend. Tests compile much and compute little: without most optimisations, with the
# older emitters that the XLA of JAX 0.10 has, and with programs that are not split into parts, it takes a
# quarter of the time. (A later XLA does not know the last two flags, and stops where it meets one.) Processes
# that tests start inherit them.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# jax_numpy_dtype_promotion="strict" stays off here: optax's Adam does not survive it (a float to the power of
# an int32 count). The conformance tests switch it on for every estimator and method, with optax.sgd.

settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=10)
settings.load_profile("tests")

# These take longest: begun first, none of them is left to one worker at the end. A file is one worker's.
LONGEST = ("test_docs.py", "test_conformance.py", "test_hosts.py", "test_resume.py", "test_meshes.py")


# Files whose cases take long, and the least cases of a test of which two thirds are left out.
TABLES = {
    *("argmin", "bo_rep", "check", "communication", "conformance", "data", "em", "estimators", "imaging"),
    *("inner_loops", "inner_settings", "known_smoothness", "linear_solvers", "long_horizons", "maid"),
    *("meshes", "model_state", "nn_hypernetwork", "nn_layers", "nn_noise", "online", "optimize", "parallel"),
    *("populations", "presets", "proximal", "resume", "stn", "structure"),
}
LEAST = 4


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every case of the large tables, and thorough tests")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    # Who names one test, by its file and case, means it.
    if config.getoption("--all") or any("::" in arg for arg in config.args):
        return
    cases = collections.Counter((item.path, item.originalname) for item in items)

    def left_out(item) -> bool:
        if item.get_closest_marker("thorough"):
            return True
        table = item.path.stem.removeprefix("test_") in TABLES
        if not table or cases[item.path, item.originalname] < LEAST:
            return False
        # By the name: whatever the order, and no value of a product of cases goes missing.
        return hashlib.sha256(item.name.encode()).digest()[0] % 3 != 0

    left = [item for item in items if left_out(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_files_are_forgotten():
    """They are not run again, and there are gigabytes of them."""
    yield
    jax.clear_caches()


_COMPILED: list[str] = []


def _listen(event: str, seconds: float, **kwargs) -> None:
    del seconds, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def compiled():
    """A function: how many programs have been compiled since it was last called."""
    seen = len(_COMPILED)

    def since() -> int:
        nonlocal seen
        before, seen = seen, len(_COMPILED)
        return seen - before

    return since
