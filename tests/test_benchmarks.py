"""The runner of the studies: methods, rows, a folder that survives kill -9, and what the commands say."""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as entry
from benchmarks import command, runner, search
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.rows import CurvePoint, Job, Machine, Row, StudyError, from_line, parse, to_line
from benchmarks.study import Request, Study

ROOT = Path(__file__).parents[1]
BOX = {"a": (1e-3, 1e1), "b": (1.0, 16.0)}


FIRST = Job("ridge", "random", 0)


def row(job: Job = FIRST, **changes) -> Row:
    row = Row(
        *job,
        seconds=0.2,
        commit="abc",
        command="bilevel bench run",
        machine=Machine("3.11", "0.10", "cpu", 2, "a processor", 0.5),
        started="2026-01-01T00:00:00+00:00",
        compile_seconds=1.5,
        run_seconds=0.21,
        status="TIME",
        message="The time was up.",
        curve=(CurvePoint(0.1, 10.0, 2.0, 2.0, 2.0), CurvePoint(0.2, 20.0, 1.0, 1.0, 1.0)),
        value=1.0,
        solved=1.0,
        test=2.0,
        metrics={"accuracy": 0.5},
        optimum=0.5,
    )
    return dataclasses.replace(row, **changes)


# --- Rows -------------------------------------------------------------------------------------------------


def test_rows_survive_a_round_trip():
    odd = row(
        value=math.inf,
        solved=-math.inf,
        test=math.nan,
        optimum=None,
        metrics={},
        curve=(CurvePoint(0.0, 1.0, math.nan, math.inf, -math.inf),),
    )
    for given in (row(), odd, row(curve=(), message="ünïcode\nand lines")):
        line = to_line(given)
        assert line.count("\n") == 1
        assert "NaN" not in line
        assert "Infinity" not in line
        # repr, as nan is not equal to itself
        assert repr(from_line(line)) == repr(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema 1 is not known, only 2"),
        ({"seed": 0.5}, "field 'seed' must be a whole number, got 0.5"),
        ({"seed": True}, "field 'seed' must be a whole number, got True"),
        ({"value": None}, 'field \'value\' must be a number, "nan", "inf" or "-inf", got None'),
        ({"value": "big"}, "field 'value' must be a number"),
        ({"value": [1]}, "field 'value' must be a number"),
        ({"problem": 3}, "field 'problem' must be a string, got 3"),
        ({"curve": [[1, 2, 3]]}, "field 'curve' must be a list of [seconds, examples, value, best, solved]"),
        ({"curve": [[1, 2, 3, 4, "x"]]}, "field 'curve' must be a number"),
        ({"metrics": []}, "field 'metrics' must be an object of numbers"),
        ({"machine": {}}, "field 'machine': no field 'backend', 'cores'"),
        ({"machine": 1}, "field 'machine' must be an object"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_line(change, message):
    lines = [to_line(row()), json.dumps(json.loads(to_line(row(Job("ridge", "grid", 0)))) | change) + "\n"]
    with pytest.raises(StudyError) as error:
        parse("".join(lines).encode(), Path("rows.jsonl"))
    assert str(error.value).startswith("rows.jsonl, line 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", "not JSON"),
        (b"\n", "not JSON"),
        (b"[]\n", "not an object"),
        (b'{"schema": NaN}\n', "not JSON (NaN is no number)"),
        (b"{}\n", "schema None is not known"),
        (b'{"schema": 2}\n', "no field 'command'"),
        (b"\xff\n", "codec can't decode"),
        (to_line(row()).encode(), "a second row of ridge, random, seed 0"),
    ],
)
def test_a_malformed_line_is_named(line, message):
    with pytest.raises(StudyError) as error:
        parse(to_line(row()).encode() + line, Path("rows.jsonl"))
    assert str(error.value).startswith("rows.jsonl, line 2: ")
    assert message in str(error.value)


# --- Searches and methods ---------------------------------------------------------------------------------


def proposed(propose, n):
    proposals = propose(BOX, 0)
    found = [next(proposals)]
    while len(found) < n:
        found.append(proposals.send(1.0))
    return np.log([[point[name] for name in BOX] for point in found]), found


def test_grids_are_full_factorials_and_repeat_nothing():
    logs, found = proposed(search.grid, 9**2)
    assert found[0] == pytest.approx({"a": 0.1, "b": 4.0})
    for levels in (3, 5, 9):
        axes = [np.linspace(*np.log(ends), levels).round(9) for ends in BOX.values()]
        wanted = set(itertools.product(*axes))
        assert {tuple(point) for point in logs[: levels**2].round(9)} == wanted


@pytest.mark.parametrize("propose", [search.random, search.grid])
def test_searches_stay_in_the_box_and_follow_the_seed(propose):
    logs, found = proposed(propose, 200)
    low, high = np.log(list(BOX.values())).T
    assert np.all((logs >= low - 1e-12) & (logs <= high + 1e-12))
    assert found == proposed(propose, 200)[1]
    assert len(np.unique(logs, axis=0)) == 200


def checked(method: str):
    if method == "optuna":
        pytest.importorskip("optuna")
    return METHODS[method]


@pytest.mark.parametrize("method", ["default", "implicit", "soba", "maid", "random", "optuna"])
def test_a_method_compiles_before_its_time_begins_and_its_best_value_falls(method, compiled):
    method, task = checked(method), PROBLEMS["ridge"].make(0)
    method.check()
    assert method.warm_up(task) >= 0
    compiled()
    found = method.run(task, 0.2, 0)
    assert compiled() == 0
    seconds, examples, value, best = found.curve.T
    assert np.all(np.diff(seconds) > 0)
    assert np.all(np.diff(examples) > 0)
    assert np.all(np.diff(best) <= 0)
    assert best[-1] == value.min()
    assert seconds[-1] <= found.seconds < 3.0

    curve = runner.thinned_curve(task, found)
    assert len(curve) <= 200
    assert (curve[0].seconds, curve[-1].seconds) == (seconds[0], seconds[-1])
    solved, test, metrics = runner.judged(task, found.candidates)
    assert solved >= task.optimum * (1 - 1e-6)
    if found.status != "TIME":  # how far others come depends on the machine
        assert solved == pytest.approx(task.optimum, rel=1e-3)
    assert min(point.solved for point in curve if not np.isnan(point.solved)) <= solved * (1 + 1e-6)
    if found.later is not None and found.marked > 0:
        marked = float(found.later([found.marked])[0]["l2"])
        assert marked == pytest.approx(float(found.candidates[0]["l2"]), rel=1e-6)
    assert np.isfinite(test)
    assert metrics == {}


def test_a_gradient_method_stops_at_its_time_and_repeats_itself_for_many_hyperparameters():
    task = dataclasses.replace(PROBLEMS["quadratic"].make(0), steps=10**6)
    method = METHODS["default"]
    method.warm_up(task)
    found = method.run(task, 0.2, 0)
    assert found.status == "TIME"
    assert 0.2 <= found.seconds < 3.0
    last = len(found.curve) - 1
    early, late = found.later([0, last])
    assert not np.array_equal(early["log_penalty"], task.hparams["log_penalty"])
    assert np.array_equal(late["log_penalty"], found.candidates[1]["log_penalty"])


def test_a_search_survives_values_that_are_no_numbers():
    task, calls = PROBLEMS["ridge"].make(0), []

    def spread(values):
        calls.append(values)
        return {"l2": np.float32(math.nan if len(calls) in (1, 3) else values["l2"])}

    METHODS["random"].warm_up(task)
    found = METHODS["random"].run(dataclasses.replace(task, spread=spread), 0.2, 0)
    assert np.isnan(found.curve[[0, 2], 2]).all()
    assert np.isinf(found.curve[0, 3])
    assert np.isfinite(found.curve[1:, 3]).all()
    assert found.candidates[0] == {"l2": np.float32(calls[-1]["l2"])}
    assert runner.judged(task, found.candidates)[0] == pytest.approx(found.curve[-1, 3])


def test_an_interrupted_run_is_no_result():
    task = dataclasses.replace(PROBLEMS["quadratic"].make(0), steps=10**6)
    method = METHODS["default"]
    method.warm_up(task)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        method.run(task, 60.0, 0)
    timer.join()


def test_recorded_hyperparameters_are_those_after_the_step():
    task, method = PROBLEMS["ridge"].make(0), METHODS["default"]
    found = method.run(task, 5.0, 0)
    assert found.status == "BUDGET"
    for point, recorded in zip((0, 6, 199), found.later([0, 6, 199]), strict=True):
        again = method._again(task, 0, [point])[0]
        assert float(recorded["l2"]) == pytest.approx(float(again["l2"]), rel=1e-6)


def test_a_row_says_what_a_method_refuses_and_how_it_fails():
    class Broken:
        def check(self):
            pass

        def refusal(self, task):
            return ""

        def warm_up(self, task):
            raise ValueError("no start")

    refused = runner.run(Job("kfold", "soba", 0), 0.2, "a command")
    assert (refused.status, refused.curve) == ("REFUSED", ())
    assert refused.message.startswith("The data of this problem only make sense whole")
    assert METHODS["maid"].refusal(PROBLEMS["logistic"].make(0)).startswith("The constants of this problem")
    failed = runner.run(Job("ridge", "broken", 1), 0.2, "a command", {"broken": Broken()})
    assert (failed.status, failed.message) == ("FAILED", "ValueError: no start")
    assert repr(from_line(to_line(failed))) == repr(failed)


def test_a_curve_is_thinned_more_and_more():
    assert list(runner.thinned(5, 200)) == [0, 1, 2, 3, 4]
    kept = runner.thinned(10**5, 200)
    assert len(kept) <= 200
    assert (kept[0], kept[-1]) == (0, 10**5 - 1)
    assert np.all(np.diff(np.log(kept[100:])) < 0.1)


# --- A folder that survives -------------------------------------------------------------------------------

ASKED = Request(("ridge", "mlp"), ("random", "grid", "default"), tuple(range(8)))
JOBS = ASKED.jobs()
# Without the methods: short jobs, so that there are many moments to be killed at.
WORKER = """
import dataclasses, pathlib, sys, time
sys.path.insert(0, sys.argv[2])
from benchmarks.rows import Job, from_line
from benchmarks.study import Request, Study
like = from_line(pathlib.Path(sys.argv[3]).read_text())
def run(job):
    time.sleep(0.02)
    return dataclasses.replace(like, problem=job.problem, method=job.method, seed=job.seed)
jobs = Request(("ridge", "mlp"), ("random", "grid", "default"), range(8)).jobs()
Study(pathlib.Path(sys.argv[1])).work(jobs, run)
"""


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "study")
    study.ask(ASKED, 0.2)
    return study


def start_worker(study: Study) -> subprocess.Popen:
    like = study.folder / "like.json"
    like.write_text(to_line(row(curve=(CurvePoint(*range(5)),) * 200)))
    command = [sys.executable, "-c", WORKER, str(study.folder), str(ROOT), str(like)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def jobs_in(study: Study) -> list[Job]:
    """With repetitions, which `Study.rows` would refuse."""
    return [from_line(line).job for line in study.rows_path.read_text().splitlines()]


def test_killed_at_any_moment_no_row_is_lost_or_doubled(study):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(6):
        workers = [start_worker(study) for _ in range(2)]
        size = study.rows_path.stat().st_size + rng.integers(1, 30_000)
        while study.rows_path.stat().st_size < size and workers[0].poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        for worker in workers:
            worker.kill()
            worker.communicate()
        now = set(study.rows())
        assert seen < now < set(JOBS)
        seen = now
    worker = start_worker(study)
    worker.communicate()
    assert worker.returncode == 0
    assert sorted(jobs_in(study)) == sorted(JOBS)


def test_workers_share_a_study(study):
    workers = [start_worker(study) for _ in range(3)]
    for worker in workers:
        assert worker.communicate()[1] == ""
        assert worker.returncode == 0
    assert sorted(jobs_in(study)) == sorted(JOBS)


def test_a_row_cut_off_at_any_byte_is_run_again(study, capsys):
    first, last = to_line(row()), to_line(row(JOBS[1]))
    for cut in range(len(last) + 1):
        study.rows_path.write_text(first + last[:cut])
        assert list(study.rows()) == JOBS[:1] + JOBS[1:2] * (cut == len(last))
        ran = []
        study.work(JOBS[:2], lambda job, ran=ran: ran.append(job) or row(job))
        assert ran == ([] if cut == len(last) else [JOBS[1]])
        assert study.rows_path.read_text() == first + last
        said = capsys.readouterr().err
        assert said == (
            f"{study.rows_path}: a half-written last row ({cut} bytes) is cut off.\n" * (0 < cut < len(last))
        )


def test_rows_of_others_are_seen(study):
    assert study.rows() == {}
    other = Study(study.folder)
    for n, job in enumerate(JOBS[:3]):
        (other if n % 2 else study).append(row(job))
        assert list(study.rows()) == list(other.rows()) == JOBS[: n + 1]
    study.rows_path.write_text(study.rows_path.read_text() + "{}\n")
    with pytest.raises(StudyError, match=r"line 4: schema None"):
        study.rows()


def test_a_malformed_line_stops_everything_and_stays(study):
    damaged = to_line(row()) + "{damaged\n" + "half"
    study.rows_path.write_text(damaged)
    with pytest.raises(StudyError, match=r"rows.jsonl, line 2: not JSON"):
        study.work(JOBS, row)
    assert study.rows_path.read_text() == damaged


def test_a_job_that_another_works_on_is_waited_for(study):
    with study.claimed(JOBS[0], wait=False) as mine:
        assert mine is not None
        with study.claimed(JOBS[0], wait=False) as other:
            assert other is None
        with study.claimed(JOBS[1], wait=False) as free:
            assert free is not None


def test_a_request_extends_a_study_of_the_same_budget_only(study):
    seconds, asked = study.settings()
    more = Request(("kfold",), ("random",), (7,))
    study.ask(more, seconds)
    study.ask(more, seconds)
    assert study.settings() == (seconds, [*asked, more])
    with pytest.raises(StudyError, match=r"a study of 0.2 seconds a run, not 3; take the same --seconds"):
        study.ask(more, 3.0)


# --- The commands -----------------------------------------------------------------------------------------


def said(capsys, *argv: str) -> tuple[int, str]:
    """Exit status, and what went to stderr."""
    try:
        status = entry.main(list(argv))
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "run --problems rigde",
            "argument --problems: invalid choice: 'rigde' (choose from 'ridge', 'logi",
        ),
        (
            "run --methods best",
            "argument --methods: invalid choice: 'best' (choose from 'default', 'implicit'",
        ),
        ("run --seeds 0 -1", "argument --seeds: '-1' is not a whole number from 0 on"),
        ("run --seeds 1.5", "argument --seeds: '1.5' is not a whole number from 0 on"),
        ("run --seeds x", "argument --seeds: 'x' is not a whole number from 0 on"),
        ("run --seconds 0", "argument --seconds: '0' is not a positive number of seconds"),
        ("run --seconds nan", "argument --seconds: 'nan' is not a positive number of seconds"),
        ("run --seconds inf", "argument --seconds: 'inf' is not a positive number of seconds"),
        ("run --seconds soon", "argument --seconds: 'soon' is not a positive number of seconds"),
        ("run --workers 0", "argument --workers: '0' is not a whole number from 1 on"),
        ("run --quick --full", "argument --full: not allowed with argument --quick"),
        ("report x --output here.txt", "argument --output: 'here.txt' must end in .html"),
        ("report x --output nowhere/x.html", "argument --output: 'nowhere' is not a folder"),
        ("compare x", "the following arguments are required: DIR"),
    ],
)
def test_wrong_arguments(argv, message, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")] if argv.startswith("run") else []
    status, text = said(capsys, *argv.split(), *out)
    assert status == 2
    # Newer versions of argparse leave some quotation marks out.
    assert message.replace("'", "") in text.replace("'", "")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_needs_a_folder(capsys):
    status, text = said(capsys, "run")
    assert status == 2
    assert "the following arguments are required: --output" in text


def asked(out: Path, *more: str) -> list[str]:
    argv = "run --problems ridge --methods random --seeds 0 --seconds 0.2 --workers 1 --output"
    return [*argv.split(), str(out), *more]


def test_folders_that_cannot_be_used(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "inside", Path("/proc/study")):
        status, text = said(capsys, *asked(out))
        assert status == 2
        assert text.startswith(f"error: the folder {out} cannot be made or written: ")
    assert file.read_text() == "mine"


def test_damaged_studies(tmp_path, capsys):
    study = Study(tmp_path)
    for argv in (("report", str(tmp_path)), ("report", str(tmp_path / "missing"))):
        status, text = said(capsys, *argv)
        assert status == 2
        assert text.startswith(f"error: {argv[1]} holds no study (")
    study.rows_path.write_text(to_line(row()))
    assert "is there, but not" in said(capsys, *asked(tmp_path))[1]
    for settings in ("{", "[]", '{"schema": 1}', '{"schema": 9}'):
        study.settings_path.write_text(settings)
        status, text = said(capsys, *asked(tmp_path))
        assert status == 2
        assert text.startswith(f"error: {study.settings_path} is damaged: ")
    assert study.settings_path.read_text() == settings
    study.settings_path.unlink()
    study.rows_path.unlink()
    study.ask(Request(("ridge",), ("random",), (0,)), 0.2)
    assert said(capsys, "report", str(tmp_path)) == (2, f"error: {tmp_path} has no rows yet.\n")
    assert said(capsys, *asked(tmp_path), "--seconds", "9")[1].startswith(
        f"error: {tmp_path} holds a study of"
    )


@pytest.mark.parametrize(
    ("module", "who"),
    [("optuna", "the method optuna needs optuna"), ("sklearn.datasets", "the problems need scikit-learn")],
)
def test_a_missing_extra_is_named_before_anything_runs(module, who, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    status, text = said(capsys, *asked(tmp_path / "out", "--methods", "random", "optuna"))
    assert status == 2
    assert text == f"error: {who}, which is missing; install it with: pip install -e '.[bench]'.\n"
    assert not (tmp_path / "out").exists()


def test_a_dead_worker_is_reported(tmp_path, capsys, monkeypatch):
    dies = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(command, "_start", lambda _: subprocess.Popen(dies))
    status, text = said(capsys, *asked(tmp_path / "out", "--seeds", "0", "1", "--workers", "2"))
    assert status == 2
    assert text == (
        "error: 2 of 2 workers died (status -9, -9); the rows that are there are good. "
        "Run the same command again for the others.\n"
    )


def test_what_the_pages_name_can_be_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        name for page in pages for name in re.findall(r"python -m benchmarks ([a-z]\w*)", page.read_text())
    }
    assert len(named) > 10
    assert named <= {*entry.NAMES, *entry.LONG, *command.COMMANDS}


def test_every_benchmark_has_a_name():
    folder = ROOT / "benchmarks"
    files = {path.stem: path for path in folder.glob("*.py")}
    files |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    runnable = {name for name, path in files.items() if "\ndef main(" in path.read_text()}
    doors, writers = {"__main__", "command"}, {"claims", "readme_picture"}  # these write pages from results
    assert runnable - doors - writers == {*entry.NAMES, *entry.LONG}


def test_unknown_checks_are_named(capsys):
    assert entry.main(["exactnes"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no benchmark exactnes; choose from: exactness, hparam_count")


# --- From end to end --------------------------------------------------------------------------------------


def python(*argv: str) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_command_takes_its_workers_along_and_is_finished_by_the_next(tmp_path):
    study = Study(tmp_path / "study")
    argv = asked(study.folder, "--methods", "random", "default", "--seconds", "0.5")
    claim = study.claims / "ridge.random.0"
    first = python(*argv)
    deadline = time.monotonic() + 60
    while not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()  # until all workers have closed what they share with it
    with claim.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert study.rows() == {}

    second = python(*argv, "--workers", "2")
    out = second.communicate()[0]
    assert second.returncode == 0
    assert out.startswith(f"2 of 2 jobs to do in {study.folder}\n")
    rows = study.rows()
    assert set(rows) == {Job("ridge", "random", 0), Job("ridge", "default", 0)}
    for done in rows.values():
        assert done.command == (
            "bilevel bench run --problems ridge --methods random default --seeds 0 --seconds 0.5 "
            f"--workers 2 --output {study.folder}"
        )
        assert done.solved == pytest.approx(done.optimum, rel=1e-3)
        assert done.compile_seconds > 0
        assert done.run_seconds < 5

    third = python(*argv)
    assert third.communicate()[0] == f"0 of 2 jobs to do in {study.folder}\n"
    assert third.returncode == 0
    assert repr(study.rows()) == repr(rows)
