"""Rows of a run in files that other tools read."""

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import callbacks

NAN = float("nan")


def rows(first, until, members=None, dtype=np.float32, **columns):
    """Rows of a history that can be told apart."""
    step = np.arange(first, until)
    value = (1 / (3 + step)).astype(dtype)
    if members:
        value = value[:, None] + np.arange(members, dtype=dtype)
    full = {
        "step": step,
        "value": value,
        "accepted": value > 0,
        "nonfinite": np.zeros(value.shape, np.int32),
        "test": np.where(step.reshape(-1, *[1] * (value.ndim - 1)) % 2 == 0, value, NAN).astype(dtype),
        "seconds": 0.5 * (1.0 + step),
    }
    return {**full, **columns}


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def objects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


KINDS = {"csv": (callbacks.csv, table), "json": (callbacks.json_lines, objects)}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def steps(found):
    return [int(row["step"]) for row in found]


# --- Lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_are_those_of_the_history(tmp_path, kind, dtype):
    make, read = kind
    log, given = (
        make(tmp_path / "run"),
        rows(0, 4, dtype=dtype, error=np.array([0.1, np.inf, NAN, 1e-30], dtype)),
    )
    log(4, given)
    found = read(tmp_path / "run")
    assert steps(found) == [0, 1, 2, 3]
    assert list(found[0]) == list(given)
    for name in ("value", "error", "seconds"):
        read_back = np.array([row[name] or NAN for row in found], dtype)
        expected = given[name] if make is callbacks.csv else np.where(np.isinf(given[name]), NAN, given[name])
        np.testing.assert_array_equal(read_back, expected)
    assert [row["accepted"] for row in found] == [{"csv": "1", "json_lines": True}[make.__name__]] * 4
    assert found[1]["test"] in ("", None)


def test_columns_are_chosen(tmp_path, kind):
    make, read = kind
    make(tmp_path / "run", columns=["test", "value", "test", "step"])(2, rows(0, 2))
    assert list(read(tmp_path / "run")[0]) == ["step", "test", "value"]
    with pytest.raises(ValueError, match="the history has no loss; it has step, value, accepted"):
        make(tmp_path / "other", columns=["loss"])(2, rows(0, 2))
    for wrong in ("value", [3]):
        with pytest.raises(TypeError, match="columns must be names"):
            make(tmp_path / "other", columns=wrong)


def test_a_row_for_each_member_that_runs(tmp_path, kind):
    make, read = kind
    given = rows(0, 2, members=3)
    given["value"][1, 0] = NAN  # has ended
    given["value"][1, 2] = NAN  # has met a nan, and goes on
    given["nonfinite"][1, 2] = 1
    make(tmp_path / "run")(2, given)
    found = read(tmp_path / "run")
    assert [(int(row["step"]), int(row["member"])) for row in found] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    assert list(found[0])[:3] == ["step", "member", "value"]
    np.testing.assert_array_equal(np.float32(found[3]["value"]), given["value"][1, 1])
    assert [float(row["seconds"]) for row in found] == [0.5, 0.5, 0.5, 1.0, 1.0]


# --- Runs that go on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 3, 4, 6])
def test_rows_take_the_place_of_those_from_their_step_on(tmp_path, kind, first):
    make, read = kind
    path = tmp_path / "run"
    log = make(path)
    log(4, rows(0, 4))
    log(6, rows(4, 6))
    before = path.read_bytes()
    with open(path, "ab") as file:
        file.write(before.splitlines()[-1][:9])  # of a process that was killed
    again = make(path)  # in another process
    again(8, rows(first, 8, value=np.full(8 - first, 9.0)))
    found = read(path)
    assert steps(found) == list(range(8))
    assert [float(row["value"]) == 9 for row in found] == [step >= first for step in range(8)]
    again(10, rows(8, 10))
    log(2, rows(1, 2))  # the first object is given to another run
    assert steps(read(path)) == [0, 1]


def test_a_table_of_other_columns_is_not_gone_on_with(tmp_path):
    callbacks.csv(tmp_path / "run")(2, rows(0, 2))
    with pytest.raises(
        ValueError, match="holds the columns step,value,.* and this run has step,value; give another"
    ):
        callbacks.csv(tmp_path / "run", columns=["value"])(4, rows(2, 4))
    callbacks.csv(tmp_path / "run", columns=["value"])(4, rows(0, 4))  # a new run begins the file anew
    assert list(table(tmp_path / "run")[0]) == ["step", "value"]


def test_rows_wait_where_a_disk_is_full(tmp_path, kind, monkeypatch):
    make, read = kind
    log = make(tmp_path / "run")
    log(2, rows(0, 2))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.warns(
            RuntimeWarning, match="run could not be written: No space left on device; the rows wait"
        ):
            log(4, rows(2, 4))
    with open(tmp_path / "run", "ab") as file:
        file.write(b'{"step": ')  # what had room
    log(6, rows(4, 6))
    assert steps(read(tmp_path / "run")) == list(range(6))


def test_a_file_that_is_taken_away_is_begun_anew(tmp_path, kind):
    make, read = kind
    log = make(tmp_path / "run")
    log(2, rows(0, 2))
    (tmp_path / "run").unlink()
    log(4, rows(2, 4))
    assert steps(read(tmp_path / "run")) == [2, 3]


CHILD = """
import sys, numpy as np
from bilevel import callbacks
log, step = callbacks.csv(sys.argv[1]), 0
while True:
    n = np.arange(step, step + 50)
    log(step + 50, {"step": n, "value": n / 7, "other": n / 3})
    step += 50
    if step == 500:
        print("ready", flush=True)
"""


def test_a_call_writes_once(tmp_path, kind, monkeypatch):
    written = []

    class Raw(io.FileIO):
        def write(self, content):
            written.append(bytes(content))
            return super().write(content)

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Raw(path, mode))
    log = kind[0](tmp_path / "run")
    for first in (0, 2, 4):
        log(first + 2, rows(first, first + 2))
    assert [content.endswith(b"\n") for content in written] == [True] * 3
    assert b"".join(written) == (tmp_path / "run").read_bytes()


@pytest.mark.thorough
def test_a_process_that_is_killed_leaves_whole_lines(tmp_path):
    path = tmp_path / "run.csv"
    child = subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    text = path.read_text()
    assert text.endswith("\n")
    found = table(path)
    assert steps(found) == list(range(len(found)))
    assert float(found[-1]["other"]) == (len(found) - 1) / 3


# --- Paths --------------------------------------------------------------------------------------------------


def test_paths_are_tried_at_once(tmp_path, kind, monkeypatch):
    make, _ = kind
    (tmp_path / "notes").write_text("mine")
    for path, words in (
        (tmp_path / "no" / "run", "the folder .*no does not exist; create it first"),
        (tmp_path, "cannot be written to: Is a directory"),
        (tmp_path / "notes", r"holds something that callbacks\.\w+ did not write; give another file"),
    ):
        with pytest.raises(ValueError, match=words):
            make(path)
    for wrong in (3, None, ""):
        with pytest.raises(TypeError, match="path must be a path, got"):
            make(wrong)
    make(tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == ["notes"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to: Permission denied"):
        make(tmp_path / "run")


# --- TensorBoard --------------------------------------------------------------------------------------------


@pytest.fixture
def board(monkeypatch):
    """What a fake tensorboardX is told."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder = os.path.basename(folder)
            told.append(("open", self.folder, purge_step))

        def add_scalar(self, *args):
            told.append((self.folder, *args[:3]))
            self.walltime = args[3]

        def flush(self):
            told.append(("flush", self.folder, self.walltime))

        def close(self):
            told.append(("close", self.folder))

    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    return told


def test_scalars_of_a_run_that_goes_on(tmp_path, board):
    log = callbacks.tensorboard(tmp_path / "made" / "here", columns=["value", "test"])
    assert (tmp_path / "made" / "here").is_dir()
    log(2, rows(0, 2, dtype=np.float64))
    third, fourth = 1 / 3, 1 / 4
    assert board == [
        ("open", "here", 0),
        ("here", "value", third, 0),
        ("here", "value", fourth, 1),
        ("here", "test", third, 0),
        ("flush", "here", 999.5),
    ]
    log(3, rows(2, 3))
    log(5, rows(1, 5))
    assert [entry for entry in board if entry[0] in ("open", "close")] == [
        ("open", "here", 0), ("close", "here"), ("open", "here", 1)
    ]  # fmt: skip


def test_each_member_is_a_run(tmp_path, board):
    callbacks.tensorboard(tmp_path)(1, rows(0, 1, members=2))
    assert {entry[1] for entry in board if entry[0] == "open"} == {"member-0", "member-1"}
    assert ("member-1", "value", float(np.float32(1 / 3) + np.float32(1)), 0) in board
    assert "seconds" not in {entry[1] for entry in board}


def test_tensorboard_refuses(tmp_path, board, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder: .*file cannot be written to: File exists"):
        callbacks.tensorboard(tmp_path / "file")
    with pytest.raises(TypeError, match="folder must be a path, got None"):
        callbacks.tensorboard(None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"needs tensorboardX: pip install 'bilevel\[tensorboard\]'"):
        callbacks.tensorboard(tmp_path)


# --- In a run -----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_in_one_file(tmp_path):
    def loss(w, h, x):
        return 0.5 * jnp.sum((w - x) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2)

    def outer(w, h, x):
        return jnp.sum((w - x) ** 2), {"l2": jnp.exp(h)}

    problem = bilevel.Problem(loss, outer)
    method = bilevel.alternating(bilevel.one_step(), optax.sgd(0.1), optax.sgd(0.1))

    def run(steps):
        return bilevel.optimize(
            problem, np.zeros(3), np.array(0.0), np.ones(3), np.full(3, 0.5), method, steps, judge_every=2,
            callbacks=[callbacks.csv(tmp_path / "run.csv"), callbacks.json_lines(tmp_path / "run.jsonl")],
            checkpoint=bilevel.checkpoints(tmp_path / "checkpoints", every=3), progress=False,
        )  # fmt: skip

    run(5)
    history = run(9).history
    for found in (table(tmp_path / "run.csv"), objects(tmp_path / "run.jsonl")):
        assert list(found[0]) == list(history)
        for name in ("step", "value", "l2", "seconds"):
            np.testing.assert_array_equal([float(row[name]) for row in found], history[name])
