"""The folder of checkpoints: one owner, the newest whole file, and nothing lost when something fails."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from bilevel import archive, checkpoint
from bilevel.checkpoint import Checkpoints, Folder, as_checkpoints, check_same_run, checkpoints

# --- Settings ----------------------------------------------------------------------------------------------


def test_settings(tmp_path):
    assert checkpoints("runs/a") == Checkpoints("runs/a", every=50, keep=3, reread=False)
    assert repr(checkpoints(Path("runs") / "a", 7, keep=np.int64(2), reread=np.True_)) == (
        "Checkpoints(path='runs/a', every=7, keep=2, reread=True)"
    )
    assert as_checkpoints("runs/a") == as_checkpoints(Path("runs/a")) == checkpoints("runs/a")
    settings = checkpoints(tmp_path, every=3)
    assert as_checkpoints(settings) is settings
    with pytest.raises(AttributeError):
        settings.every = 4


@pytest.mark.parametrize(
    ("call", "error", "fragments"),
    [
        (lambda: checkpoints(3), TypeError, ["path must be", "got 3"]),
        (lambda: checkpoints(None), TypeError, ["path must be", "got None"]),
        (lambda: checkpoints(b"runs"), TypeError, ["path must be", "got b'runs'"]),
        (lambda: checkpoints(""), ValueError, ["path must be", "empty"]),
        (lambda: checkpoints("a", every=0), ValueError, ["every must be at least 1, got 0"]),
        (lambda: checkpoints("a", every=1.5), TypeError, ["every must be a whole number, got 1.5"]),
        (lambda: checkpoints("a", keep=0), ValueError, ["keep must be at least 1, got 0"]),
        (lambda: checkpoints("a", keep=True), TypeError, ["keep must be a whole number, got True"]),
        (lambda: checkpoints("a", reread=1), TypeError, ["reread must be True or False, got 1"]),
        (lambda: as_checkpoints(50), TypeError, ["checkpoint must be", "bilevel.checkpoints", "got 50"]),
        (lambda: as_checkpoints(b"a"), TypeError, ["checkpoint must be", "got b'a'"]),
        (lambda: as_checkpoints(""), ValueError, ["checkpoint must be", "empty"]),
    ],
)
def test_wrong_settings(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


# --- Entering a folder -------------------------------------------------------------------------------------


def folder(path, keep=3):
    return Folder(checkpoints(path, keep=keep))


def written(path, *steps, keep=3):
    """A folder in which files of these steps have been written."""
    with folder(path, keep) as run:
        for step in steps:
            assert run.write(step, {"x": np.full(20, step)}, {"step": step}) is None
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != "lock")


def refused(path, *fragments):
    with pytest.raises(ValueError, match="checkpoint") as caught, folder(path):
        pass
    message = str(caught.value)
    assert message.startswith("checkpoint: ")
    assert message.endswith(".")
    assert "\n" not in message
    for fragment in (str(path), *fragments):
        assert fragment in message


def test_a_folder_is_made_with_its_parents(tmp_path):
    with folder(tmp_path / "a" / "b") as run:
        assert run.newest() is None
    assert (tmp_path / "a" / "b").is_dir()


def test_the_path_is_a_file(tmp_path):
    path = tmp_path / "run"
    path.write_text("mine")
    refused(path, "is a file", "give a folder")
    refused(path / "below", "cannot be created", "Not a directory")
    assert path.read_text() == "mine"


def test_a_path_that_no_system_takes(tmp_path):
    refused(tmp_path / ("x" * 300), "cannot be created", "File name too long")
    refused(tmp_path / "a\0b", "cannot be created", "null")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        refused(tmp_path, "cannot be written to", "Permission denied")
        refused(tmp_path / "below", "cannot be created", "Permission denied")
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_folder(tmp_path, monkeypatch):
    """Its lock may be there from earlier, and be open to writing."""
    written(tmp_path, 1)

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        refused(tmp_path, "cannot be written to", "Read-only file system")
    with folder(tmp_path):  # the refused one has let go of the lock
        pass


def test_what_is_not_ours_stays(tmp_path):
    others = ["notes.txt", "step-1.npz.bak", "step-00000001.npy", ".step-00000001.npz.tmp", "model.npz",
              "tmp-step-00000001.npz", "step-0001.npz"]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    written(tmp_path, *range(1, 6), keep=1)
    assert names(tmp_path) == sorted([*others, "folder", "step-00000005.npz"])
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}


def test_a_lock_that_is_not_ours(tmp_path):
    (tmp_path / "lock").write_text("my diary")
    refused(tmp_path, "lock was not written by a run", "another folder")
    assert (tmp_path / "lock").read_text() == "my diary"


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    for name in (".step-00000050.npz.0123abcd.tmp", ".step-123456789.npz.ffffffff.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with folder(tmp_path):
        assert names(tmp_path) == []


# --- One owner ---------------------------------------------------------------------------------------------


def test_two_runs_in_one_process(tmp_path):
    with folder(tmp_path) as first:
        refused(tmp_path, "in use by another run, of this process", "Give another folder")
        assert first.write(1, {"x": np.zeros(1)}, {}) is None
    with folder(tmp_path) as second:
        assert second.newest() is not None


def test_a_failing_run_lets_go(tmp_path):
    with pytest.raises(KeyError), folder(tmp_path):
        raise KeyError
    with folder(tmp_path):
        pass


HOLD = """
import sys
from bilevel.checkpoint import Folder, checkpoints
with Folder(checkpoints(sys.argv[1])) as run:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes(tmp_path):
    """The holder is named, and one that is killed leaves no lock behind."""
    env = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        try:
            assert holder.stdout.readline() == "held\n"
            refused(tmp_path, f"in use by another run, of process {holder.pid}.")
        finally:
            holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        assert (tmp_path / "lock").read_text() == f"{holder.pid}\n"
    with folder(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint, "_lock", no_locks)
    with pytest.warns(RuntimeWarning, match="has no locks") as caught, folder(tmp_path) as run:
        assert run.write(1, {"x": np.zeros(1)}, {}) is None
    assert caught[0].filename == __file__


# --- Writing -----------------------------------------------------------------------------------------------


def test_the_newest_files_stay(tmp_path):
    with folder(tmp_path, keep=2) as run:
        for step in (50, 100, 150, 200):
            run.write(step, {"x": np.full(3, step)}, {"step": step})
            content, path = run.newest()
            assert path == tmp_path / f"step-{step:08}.npz"
            trees, meta = archive.read(content)
            assert meta == {"step": step}
            np.testing.assert_array_equal(trees["x"], [step] * 3)
    assert names(tmp_path) == ["step-00000150.npz", "step-00000200.npz"]


def test_steps_are_ordered_as_numbers(tmp_path):
    written(tmp_path, 99_999_999, 100_000_000, 100_000_001, keep=2)
    assert names(tmp_path) == ["step-100000000.npz", "step-100000001.npz"]


def test_fewer_are_kept_than_were(tmp_path):
    written(tmp_path, 1, 2, 3, 4, keep=4)
    written(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004.npz", "step-00000005.npz"]


def test_a_step_written_again_is_replaced(tmp_path):
    with folder(tmp_path) as run:
        run.write(1, {"x": np.zeros(2)}, {})
        run.write(1, {"x": np.ones(2)}, {})
        np.testing.assert_array_equal(archive.read(run.newest()[0])[0]["x"], [1, 1])
    assert names(tmp_path) == ["step-00000001.npz"]


def test_files_of_later_steps_are_not_the_newest_any_more(tmp_path):
    written(tmp_path, 10, 20, 30)
    written(tmp_path, 15, keep=2)
    assert names(tmp_path) == ["stale-step-00000020.npz", "stale-step-00000030.npz", "step-00000010.npz",
                               "step-00000015.npz"]  # fmt: skip
    with folder(tmp_path) as run:
        assert run.newest()[1].name == "step-00000015.npz"


def test_a_folder_that_vanishes(tmp_path):
    path, moved = tmp_path / "run", tmp_path / "moved"
    with folder(path) as run:
        path.rename(moved)
        assert run.write(50, {"x": np.zeros(1)}, {}) == (
            f"The checkpoint of step 50 could not be written to {path}/step-00000050.npz: the folder is no "
            "longer there."
        )
    assert not path.exists()
    assert names(moved) == []


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"), [(os, "fsync"), (os, "replace"), (archive, "_write_npy")], ids=lambda x: str(x)
)
def test_a_full_disk(tmp_path, monkeypatch, module, name):
    written(tmp_path, 50)
    with folder(tmp_path, keep=1) as run:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            message = run.write(100, {"x": np.zeros(9)}, {})
        assert message == (
            f"The checkpoint of step 100 could not be written to {tmp_path}/step-00000100.npz: No space left "
            "on device."
        )
        assert names(tmp_path) == ["step-00000050.npz"]
        assert run.newest()[1].name == "step-00000050.npz"
        assert run.write(150, {"x": np.zeros(9)}, {}) is None
    assert names(tmp_path) == ["step-00000150.npz"]


def test_a_file_that_may_not_grow(tmp_path):
    """A limit of the system, not of a test: the write fails in the middle of an array."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with folder(tmp_path) as run:
        run.write(1, {"x": np.zeros(10)}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            message = run.write(2, {"x": np.zeros(1_000_000)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.fullmatch(r"The checkpoint of step 2 could not be written to .*: File too large\.", message)
        assert names(tmp_path) == ["step-00000001.npz"]


def test_what_is_no_array_is_an_error(tmp_path):
    with folder(tmp_path) as run, pytest.raises(TypeError, match="only arrays"):
        run.write(1, {"x": object()}, {})
    assert names(tmp_path) == []


def test_old_files_that_cannot_be_removed(tmp_path, monkeypatch):
    """The file is written; the next one removes what is left."""
    with folder(tmp_path, keep=1) as run:
        run.write(1, {"x": np.zeros(1)}, {})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", full)
            assert run.write(2, {"x": np.zeros(1)}, {}) is None
        assert len(names(tmp_path)) == 2
        run.write(3, {"x": np.zeros(1)}, {})
        assert names(tmp_path) == ["step-00000003.npz"]


# --- Damage ------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "another file": lambda path: path.write_text("mine"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_skipped(tmp_path, damage):
    written(tmp_path, 50, 100)
    DAMAGE[damage](tmp_path / "step-00000100.npz")
    left = (tmp_path / "step-00000100.npz").read_bytes()
    with folder(tmp_path) as run:
        with pytest.warns(RuntimeWarning, match="going on from step 50, step-00000050.npz") as caught:
            content, path = run.newest()
        assert path.name == "step-00000050.npz"
        assert archive.read(content)[1] == {"step": 50}
        assert len(caught) == 1
        assert "step-00000100.npz is damaged (it is kept as damaged-step-00000100.npz)" in str(
            caught[0].message
        )
        assert (tmp_path / "damaged-step-00000100.npz").read_bytes() == left
        assert run.newest()[1] == path  # and nothing more to warn of
        run.write(100, {"x": np.zeros(1)}, {})
    assert names(tmp_path) == ["damaged-step-00000100.npz", "step-00000050.npz", "step-00000100.npz"]


def test_several_damaged_files(tmp_path):
    written(tmp_path, 1, 2, 3)
    (tmp_path / "damaged-step-00000003.npz").write_text("of an earlier time")
    flip(tmp_path / "step-00000002.npz")
    flip(tmp_path / "step-00000003.npz")
    with folder(tmp_path) as run, pytest.warns(RuntimeWarning, match="going on from step 1,") as caught:
        assert run.newest()[1].name == "step-00000001.npz"
    assert len(caught) == 2
    assert names(tmp_path) == ["damaged-step-00000002.npz", "damaged-step-00000003-2.npz",
                               "damaged-step-00000003.npz", "step-00000001.npz"]  # fmt: skip
    assert (tmp_path / "damaged-step-00000003.npz").read_text() == "of an earlier time"


def test_an_older_damaged_file_is_left_alone(tmp_path):
    written(tmp_path, 1, 2)
    flip(tmp_path / "step-00000001.npz")
    with folder(tmp_path) as run:
        assert run.newest()[1].name == "step-00000002.npz"
    assert names(tmp_path) == ["step-00000001.npz", "step-00000002.npz"]


@pytest.mark.parametrize(
    ("steps", "count"), [((1, 2), "all 2 checkpoints are"), ((1,), "the only checkpoint is")]
)
def test_all_files_are_damaged(tmp_path, steps, count):
    """No run begins anew over them, however often it is tried."""
    written(tmp_path, *steps)
    for step in steps:
        flip(tmp_path / f"step-{step:08}.npz")
    for _ in range(2):
        with (
            folder(tmp_path) as run,
            pytest.raises(ValueError, match="Move the folder away to begin anew") as caught,
        ):
            run.newest()
        assert f"checkpoint: {count} damaged in {tmp_path}" in str(caught.value)
    assert names(tmp_path) == [f"step-{step:08}.npz" for step in steps]


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    written(tmp_path, 1, 2)
    read = Path.read_bytes

    def failing(path):
        if path.name == "step-00000002.npz":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with (
        folder(tmp_path) as run,
        pytest.warns(RuntimeWarning, match=r"cannot be read \(Input/output error\)"),
    ):
        assert run.newest()[1].name == "step-00000001.npz"


# --- The same run ------------------------------------------------------------------------------------------

VERSIONS = {"jax": "1.0", "numpy": "2.0"}
MINE = {"program": "p", "key": "k", "params": "w", "hparams": "h", "train": "t", "versions": VERSIONS}


def test_the_same_run():
    check_same_run(MINE, dict(MINE), "run")
    check_same_run({**MINE, "versions": {"jax": "0.9"}}, MINE, "run")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"params": "x"}, "params differ."),
        ({"key": "x"}, "key differs."),
        ({"train": "x", "program": "x"}, "train differs."),
        ({"train": "x", "params": "x", "versions": {}}, "params and train differ."),
        ({"train": "x", "params": "x", "key": "x"}, "key, params and train differ."),
        ({"test": "x"}, "test differs."),
    ],
    ids=str,
)
def test_another_run(changed, words):
    expected = f"checkpoint: run/a holds another run: {words} Give another folder, or remove this one."
    for stored, mine in (({**MINE, **changed}, MINE), (MINE, {**MINE, **changed})):
        with pytest.raises(ValueError, match="another run") as caught:
            check_same_run(stored, mine, "run/a")
        assert str(caught.value) == expected


def test_another_program_with_the_same_versions():
    with pytest.raises(ValueError, match="the method, the problem's losses or a setting inside them differ"):
        check_same_run({**MINE, "program": "x"}, MINE, "run")


def test_another_program_with_other_versions():
    stored = {**MINE, "program": "x", "versions": {"jax": "0.9", "numpy": "2.0"}}
    with pytest.warns(
        RuntimeWarning, match=r"written with jax 0.9, numpy 2.0, and this is jax 1.0, numpy 2.0"
    ):
        check_same_run(stored, MINE, "run")


def test_versions():
    versions = checkpoint.versions()
    assert list(versions) == ["bilevel", "jax", "jaxlib", "numpy", "optax", "python"]
    assert versions["numpy"] == np.__version__
    assert versions["python"] == sys.version.split()[0]
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


def test_nothing_warns_when_nothing_is_wrong(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written(tmp_path, 1, 2)
        with folder(tmp_path) as run:
            run.newest()
