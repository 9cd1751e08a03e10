"""Runs over several processes: the same numbers as in one, one voice, and a word where a process is gone."""

import itertools
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from implementations import ESTIMATORS, METHODS

import bilevel
from bilevel import hosts

WORKER = Path(__file__).with_name("on_devices.py")


def start(jobs: str, where: Path, processes=1, devices=1, **settings) -> list[subprocess.Popen]:
    """A process for each index; ``jobs``: names of functions of the worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = str(where / f"{processes}x{devices}.npz")
    common = {"jobs": jobs.split(), "devices": devices, "processes": processes, "port": port, "out": out}
    command = [sys.executable, "-W", "error::RuntimeWarning", str(WORKER)]
    return [
        subprocess.Popen(
            [*command, json.dumps({**common, **settings, "index": index})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(workers: list[subprocess.Popen], seconds=400) -> list[str]:
    """What each process printed; all have to end well."""
    until = time.monotonic() + seconds
    try:
        for worker in workers:
            worker.wait(max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pass
    ends = [(worker.kill(), *worker.communicate())[1:] for worker in workers]
    for worker, (out, err) in zip(workers, ends, strict=True):
        assert worker.returncode == 0, out + err
    return [out for out, _ in ends]


def results(jobs: str, where: Path, processes=1, devices=1, **settings) -> dict[str, np.ndarray]:
    """What the jobs found, by names that begin with the job's."""
    finish(start(jobs, where, processes, devices, **settings))
    return dict(np.load(where / f"{processes}x{devices}.npz"))


def assert_same(got, expected, rtol=1e-10):
    assert got.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        scale = np.max(np.abs(value[np.isfinite(value)]), initial=0)
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder, known = tmp_path_factory.mktemp("one"), {}

    def of(jobs, **settings):
        if jobs not in known:
            known[jobs] = results(jobs, folder, **settings)
        return known[jobs]

    return of


@pytest.mark.thorough
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 4)], ids=["8 devices", "2 processes x 4"])
def test_every_estimator_and_method_agrees_with_one_device(one_device, tmp_path, processes, devices):
    got = results("table", tmp_path, processes, devices)
    assert len(got) == len(ESTIMATORS) + len(METHODS) + 2  # and MAID and HOAG
    assert_same(got, one_device("table"))


JOBS = (
    "whole minibatches process_local explicit sharded_params iterable pairs population members "
    "iterable_for_members"
)


@pytest.mark.parametrize(
    ("jobs", "processes", "devices"),
    [
        pytest.param("minibatches process_local members", 2, 2, id="2 x 2, some"),
        pytest.param(JOBS, 2, 2, id="2 x 2", marks=pytest.mark.thorough),
        pytest.param("minibatches process_local", 4, 1, id="4 x 1", marks=pytest.mark.thorough),
    ],
)
def test_several_processes_agree_with_one(one_device, tmp_path, jobs, processes, devices):
    folders = [tmp_path / name for name in ("several", "one")]
    got = results(jobs, tmp_path, processes, devices, folder=str(folders[0]))
    assert_same(got, one_device(jobs, folder=str(folders[1])))


def test_a_run_goes_on_with_other_processes(one_device, tmp_path):
    run = tmp_path / "run"
    results("checkpoint", tmp_path, 2, 2, folder=str(run), steps=7)
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000005.npz", "step-00000007.npz"]
    results("checkpoint", tmp_path, 1, 4, folder=str(run), steps=13)
    got = results("checkpoint", tmp_path, 4, 1, folder=str(run), steps=20)
    assert_same(got, one_device("checkpoint", folder=str(tmp_path / "other"), steps=20))


def test_sizes_beyond_32_bits():
    for size in (-1, 0, 5, 2**31, 3_000_000_000, 7 * 2**33 + 1):
        halves = np.asarray(hosts._halves(size), np.int32)
        assert hosts._joined(halves) == size
    blocks = list(hosts._blocks(2**33 + 1))
    assert (blocks[0].start, blocks[-1].stop) == (0, 2**33 + 1)
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    assert {b.stop - b.start for b in blocks} == {hosts._BLOCK, 1}


def test_one_process_reports_and_writes(tmp_path):
    path = tmp_path / "result.bilevel"
    got = results("saved", tmp_path, 2, 2, file=str(path))
    loaded = bilevel.load(path)
    np.testing.assert_array_equal(loaded.params["w"], got["saved: leaf 0"])
    np.testing.assert_array_equal(loaded.hparams["l2"], got["saved: leaf 1"])


def test_a_process_that_is_killed_ends_the_other_soon(tmp_path):
    folder = tmp_path / "run"
    first, second = start("endless", tmp_path, 2, 1, folder=str(folder))
    try:
        while "stepping" not in first.stdout.readline():
            assert first.poll() is None
        while not list(folder.glob("step-*")):
            time.sleep(0.05)
        second.kill()
        killed = time.monotonic()
        first.wait(timeout=60)
        assert time.monotonic() - killed < 20
    finally:
        for worker in (first, second):
            worker.kill()
        errors = [worker.communicate()[1] for worker in (first, second)][0]
    assert first.returncode != 0
    assert "PeerError: Another process of this run has ended" in errors
    assert "from the last checkpoint" in errors
    # Both go on from there.
    kept = max(int(path.stem[5:]) for path in folder.glob("step-*"))
    assert kept >= 10
    steps = kept + 5
    got = results("checkpoint_whole", tmp_path, 2, 1, folder=str(folder), steps=steps)
    assert len(got["checkpoint_whole: value"]) == steps
    assert_same(got, results("checkpoint_whole", tmp_path, 1, 1, folder=str(tmp_path / "anew"), steps=steps))


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    first, second = finish(start("terminated", tmp_path, 2, 1, folder=str(folder), after=6.0))
    assert "Another process was told to stop." in first
    assert "Ended by SIGTERM." in second
    done = int(np.load(tmp_path / "2x1.npz")["terminated: done"])
    assert (folder / f"step-{done:08d}.npz").exists()


def test_mistakes_of_one_process_are_told_to_all(tmp_path):
    jobs = (
        "failing_callback failing_iterable empty_iterable iterables_of_other_shapes "
        "iterables_of_other_lengths iterables_with_a_number_of_their_own iterable_that_nothing_splits "
        "different_arrays exchanged_in_blocks each_alone"
    )
    first, second = finish(start(jobs, tmp_path, 2, 2, folder=str(tmp_path / "runs")))
    assert "KeyError: 'a mistake in a callback'" in first
    assert "PeerError: A callback of the first process failed" in second
    assert "PeerError: The data of another process failed" in first
    assert "OSError: a file is missing" in second
    assert "PeerError: Another process could not begin the run" in first
    assert "ValueError: train is an iterable without any batch" in second
    assert "The data of another process ended." in first
    assert "train ended after 35 batches" in second
    for out in (first, second):
        for words in (
            "train differs from process to process: batches of shape (16, 8) float64, (16,) float64 in "
            "process 1, (8, 8)",
            "train[2] of the first batch differs between processes whose devices hold the same of it",
            "train is an iterable, of which each process gives its own rows, but nothing says how",
        ):
            assert words in out
        assert re.search(r"train differs from process to process.*make_array_from_process_local_data", out), (
            out
        )


def test_a_mesh_has_devices_of_all_processes_or_of_one(tmp_path):
    for out in finish(start("part_of_the_processes", tmp_path, 3, 1)):
        assert "mesh has devices of some of the 3 processes" in out
