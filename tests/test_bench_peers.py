"""The benchmark of peers: right answers, what workers say, and what is made of it."""

import json
import sys
import types

import numpy as np
import pytest

from benchmarks import methods, runner
from benchmarks.found import Found
from benchmarks.peers import cold as cold_runs
from benchmarks.peers import command, handles, instances, jax_by_hand, measured, ours, questions, report
from benchmarks.peers import searches as all_searches
from benchmarks.peers.handles import Handle
from benchmarks.peers.measured import CANNOT, FAILED, RIGHT, WRONG, Question, Row
from benchmarks.peers.worker import Worker

KINDS = {kind: make("small") for kind, make in instances.KINDS.items()}


def slope(fn, at, step: float) -> float:
    return (fn(at + step) - fn(at - step)) / (2 * step)


# --- Right answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logistic", "cleaning"])
def test_the_implicit_answer_is_the_slope_of_the_outer_loss_of_solutions(kind):
    instance = KINDS[kind]
    h = instance.h.astype(float)
    along = np.random.default_rng(1).standard_normal(h.shape)

    def outer(t):
        moved = instance._replace(h=h + t * along)
        return instances.reference(moved).outer(instances.solution(moved, 1e-12))

    assert np.vdot(instances.implicit(instance), along) == pytest.approx(slope(outer, 0.0, 1e-3), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unrolled_answer_is_the_slope_of_the_outer_loss_after_the_steps(kind):
    # Away from the solution, where the first step moves; h - 1 is no logarithm of the rate given.
    instance = KINDS[kind]._replace(w=np.zeros_like(KINDS[kind].w), h=KINDS[kind].h.astype(float) - 1)
    h, ref = instance.h, instances.reference(instance)
    along = np.random.default_rng(1).standard_normal(h.shape)

    def outer(t):
        w, moved = instance.w, h + t * along
        for _ in range(7):
            w = w - (np.exp(moved) if kind == "rate" else 0.5) * ref.gradient(w, moved)
        return ref.outer(w)

    found = instances.unrolled(instance, 7, 0.5)
    assert np.vdot(found, along) == pytest.approx(slope(outer, 0.0, 1e-4), rel=1e-6)


def test_steps_needed_are_the_first_that_suffice():
    instance = KINDS["logistic"]
    expected = instances.implicit(instance)
    steps = instances.steps_needed(instance, expected, 1e-3)
    errors = [instances.relative(instances.implicit(instance, n), expected) for n in (steps - 1, steps)]
    assert errors[1] <= 1e-3 < errors[0]


def test_an_answer_of_another_shape_or_without_numbers_is_infinitely_wrong():
    assert instances.relative(np.ones(2), np.ones(3)) == np.inf
    assert instances.relative(np.full(3, np.nan), np.ones(3)) == np.inf


@pytest.mark.parametrize("kind", cold_runs.KINDS)
def test_cold_runs_begin_at_nothing(kind):
    begun = instances.started(kind, "middle")
    trained = instances.KINDS[kind]("middle")
    assert not begun.w.any()
    assert np.all(begun.h == np.float32(instances.FIRST[kind]))
    for name in ("x", "y", "valid_x", "valid_y"):
        np.testing.assert_array_equal(getattr(begun, name), getattr(trained, name))


def test_cold_runs_are_judged_by_trained_params():
    instance = KINDS["cleaning"]
    expected = instances.reference(instance).outer(instance.w)
    start = instance._replace(w=np.zeros_like(instance.w))
    assert cold_runs.judged(start, [instance.h, np.full_like(instance.h, np.nan)])[0] == pytest.approx(
        expected
    )


# --- Peers that need no other package ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The float64 question of each task, about the small cleaning problem."""
    folder = tmp_path_factory.mktemp("peers")
    return {
        task: next(q for q in make(folder, KINDS["cleaning"]) if q.dtype == "float64")
        for task, (make, _) in questions.TASKS.items()
    }


class Here:
    """A worker in this process, asked as one in another is."""

    def __init__(self, peer):
        self.worker = Worker(peer)

    def ask(self, request):
        return json.loads(json.dumps(self.worker.answer(json.loads(json.dumps(request)))))


@pytest.mark.parametrize("task", questions.TASKS)
def test_ours_and_by_hand_are_right(asked, task):
    peers = [peer for peer in (*ours.PEERS, *jax_by_hand.PEERS) if not isinstance(peer.tasks[task], str)]
    workers = {peer.name: Here(peer) for peer in peers}
    if task == "along":  # one tolerance in place of a search among all
        rows = [
            measured.answered(workers[name], name, asked[task], [setting])
            for name, setting in (
                ("bilevel", 1e-5),
                ("bilevel, gradient alone", 1e-5),
                ("JAX by hand", asked[task].setting),
            )
        ]
    else:
        rows = measured.all_answered(workers, asked[task])
    assert [row.status for row in rows] == [RIGHT] * len(peers)
    rows = measured.timed(workers, rows, 3, 60.0)
    assert all(len(row.seconds) == 3 and row.compile_seconds > 0 for row in rows)
    if task == "unrolled":
        megabytes = {row.peer: row.megabytes for row in rows}
        assert megabytes["bilevel"] < 0.5 * megabytes["bilevel, remat=False"]


@pytest.mark.parametrize("peer", [ours.PEERS[0], jax_by_hand.PEERS[0]], ids=lambda peer: peer.name)
def test_a_learned_rate_is_right_whatever_rate_is_given(tmp_path, peer):
    question = next(q for q in questions.unrolled(tmp_path, KINDS["rate"]) if q.dtype == "float64")
    row = measured.answered(Here(peer), peer.name, question, [[instances.UNROLLED_STEPS, 7.0]])
    assert row.status == RIGHT


def test_too_few_steps_are_found_wrong(asked):
    row = measured.answered(Here(jax_by_hand.PEERS[0]), "JAX by hand", asked["implicit"], [3])
    assert (row.status, row.setting) == (WRONG, 3)
    assert row.error > asked["implicit"].accurate


def test_what_a_peer_has_no_means_for_is_a_row(asked):
    row = measured.answered(Here(ours.PEERS[2]), "bilevel, remat=False", asked["implicit"], [20])
    assert row == Row("bilevel, remat=False", CANNOT, "the same with any remat")


def test_every_peer_is_listed_with_its_module():
    folder = handles.ROOT / "benchmarks" / "peers"
    modules = {
        path.stem: path.read_text() for path in folder.glob("*.py") if "\nPEERS = (" in path.read_text()
    }
    assert set(modules) == set(handles.MODULES)
    for module, names in handles.MODULES.items():
        assert all(f'"{name}"' in modules[module] for name in names)
    assert [peer.name for peer in (*ours.PEERS, *jax_by_hand.PEERS)] == list(handles.NAMES[:6])


# --- Workers ----------------------------------------------------------------------------------------------

ECHO = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        os._exit(7)
    if request["do"] == "sleep":
        time.sleep(60)
    print(json.dumps({"error": request["setting"], "compile_seconds": None, "megabytes": 1.0}), flush=True)
"""


def echo() -> Handle:
    return Handle([sys.executable, "-c", ECHO])


def prepare(setting: float) -> dict:
    return {"do": "prepare", "setting": setting}


def test_a_worker_answers_dies_and_is_given_up():
    handle = echo()
    assert handle.ask(prepare(0.5))["error"] == 0.5
    assert handle.ask({"do": "die"}) == {"failed": "its process ended with status 7"}
    assert handle.ask(prepare(0.5)) == {"failed": "its process ended with status 7"}
    handle.close()
    slow = echo()
    assert slow.ask({"do": "sleep"}, 0.2) == {"failed": "took more than 0 s"}
    assert slow.ask(prepare(0.5)) == {"failed": "took more than 0 s"}
    slow.close()


def test_a_package_that_is_missing_is_a_row(tmp_path):
    log = tmp_path / "log.txt"
    without = "import sys; sys.modules['higher'] = None; from benchmarks.peers.worker import main; "
    code = without + "main('with_higher', 'higher')"
    handle = Handle([sys.executable, "-c", code], log=log)
    row = measured.answered(handle, "higher", Question("unrolled", [], tmp_path, "float64", 1.0), [[]])
    handle.close()
    assert row.status == FAILED
    assert row.reason.startswith("cannot be imported: ModuleNotFoundError: ")
    assert "Traceback" in log.read_text()


def test_an_error_in_a_peer_is_an_answer():
    found = Here(ours.PEERS[0]).ask({"do": "time", "calls": 1})
    assert found == {"failed": "RuntimeError: nothing is prepared"}


def test_settings_are_tried_until_one_is_accurate(tmp_path):
    question = Question("along", 1, tmp_path, "float32", 1e-3)
    handle = echo()
    row = measured.answered(handle, "a", question, [0.5, 1e-4, 1e-5])
    assert (row.setting, row.status) == (1e-4, RIGHT)
    best = measured.loosest(handle, "a", question, [0.5, 0.1, 1e-3, 1e-4, 1e-5])
    assert (best.setting, best.status) == (1e-3, RIGHT)
    assert measured.loosest(handle, "a", question, [0.5, 0.1]).status == WRONG
    handle.close()


# --- What is made of it -----------------------------------------------------------------------------------


def timed(peer: str, *seconds: float, status: str = RIGHT, **more) -> Row:
    return Row(peer, status, error=1e-5, setting=20, seconds=seconds, **more)


def case(task: str, rows, **more) -> dict:
    found = {
        "task": task, "kind": "logistic", "size": "small", "shape": [500, 200, 20], "dtype": "float32",
        "setting": [100, 0.5] if task == "unrolled" else 20.0, "accurate": 1e-3,
        "rows": [row.__dict__ for row in rows], "versions": {"jaxopt": {"jaxopt": "0.8.5"}},
        "where": {"commit": "abc", "processor": "a processor", "load": 0.5, "clock": "process_time"},
    }  # fmt: skip
    return json.loads(json.dumps({**found, **more}))


ROWS = [
    timed("bilevel", 1.0, 2.2, 3.0, compile_seconds=2.0, megabytes=0.5),
    timed("JAX by hand", 1.0, 2.0, 3.0),
    timed("jaxopt", 2.0, 4.0, 6.0, megabytes=4.0),
    timed("higher", 9.0, 9.0, 9.0, megabytes=50.0),
    timed("betty", 0.1, 0.1, 0.1, status=WRONG),
    Row("gradhpo, greedy", CANNOT, "has no linear solver"),
    Row("torchopt", FAILED, "took more than 600 s"),
]


def test_the_fastest_is_another_one_that_is_right():
    assert measured.fastest(ROWS).peer == "JAX by hand"
    assert measured.fastest([ROWS[0], *ROWS[4:]]) is None
    assert measured.ratio(ROWS[0], ROWS[1]) == pytest.approx(1.0)


def test_verdicts():
    assert report.verdicts(case("implicit", ROWS)) == [("time, of JAX by hand", pytest.approx(1.0), 1.05)]
    found = report.verdicts(case("unrolled", ROWS))
    assert found[1:] == [("memory, of jaxopt", 0.125, 0.1), ("memory, of higher", 0.01, 0.1)]
    assert report.verdicts(case("along", [Row("bilevel", WRONG), *ROWS[1:]])) == []
    slow = [
        timed("bilevel", 45.0, 10.0, value=0.1),
        timed("Optuna, TPE", 200.0, 300.0, value=0.3),
        timed("Optuna, CMA-ES", 200.0, 300.0, value=0.2),
        timed("random", 200.0, 300.0, value=0.1),
        Row("Optuna, TPE, Hyperband", FAILED, "no memory"),
    ]
    run = case("searches", slow, setting=300.0, shape=None)
    time, loss = report.verdicts(run)
    assert time == ("time to the best of Optuna, worst seed", 0.15, 0.1)
    assert loss[:2] == ("loss of the best of Optuna, of ours, at the end", 2.0)
    assert report.sentences(run)[1] == "loss of the best of Optuna, of ours, at the end: 2"
    assert "| loss of the best of Optuna, of ours, at the end | 2 |  |  |" in report.page_of([run])


def test_a_title_says_what_is_learned():
    assert ": learned learning rate, 500 and" in report.title(case("unrolled", ROWS, kind="rate"))


def test_kept_cases_become_tables_and_a_page(tmp_path, capsys):
    for task in ("unrolled", "implicit"):
        report.save(tmp_path, case(task, ROWS))
    report.save(tmp_path, case("cold", [timed("bilevel", 2.0, value=0.25), timed("jaxopt", 3.0)], shape=None))
    kept = report.load(tmp_path)
    assert [found["task"] for found in kept] == ["implicit", "unrolled", "cold"]
    assert command.main(["--report", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "gradhpo, greedy" in shown
    assert "cannot: has no linear solver" in shown
    assert "memory, of jaxopt: 0.125 (asked: at most 0.1, missed)" in shown
    page = tmp_path / "page.md"
    assert command.main(["--page", str(page), "--out", str(tmp_path)]) == 0
    text = page.read_text()
    assert "| unrolled, logistic, small, float32 | memory, of higher | 0.01 | 0.1 | met |" in text
    assert "| betty | 1.0e-05 |  | 100 | 0.05 |  |  | wrong |" in text
    assert "| bilevel | 0.2500 | 2.00 | 0.67 |  |  |" in text
    assert "jaxopt 0.8.5" in text
    assert "features, float32, CPU time." in text


def test_a_cold_run_counts_until_the_target():
    runs = [
        {"seconds": [1.0, 2.0, 3.0], "values": [0.9, 0.5, 0.4]},
        {"seconds": [1.0, 2.5], "values": [0.9, 0.4]},
    ]
    assert cold_runs.row("a", runs, 0.5) == Row("a", RIGHT, setting=0.5, seconds=(2.0, 2.5), value=0.4)
    assert cold_runs.row("a", runs, 0.1).status == WRONG
    assert cold_runs.row("a", [*runs, {"failed": "died"}], 0.5) == Row("a", FAILED, "died")
    looks = cold_runs.looks(300)
    assert (looks[0], looks[-1]) == (1, 300)


def test_a_run_is_looked_at_in_time():
    h = np.zeros(1)

    def advance():
        h[0] += 1  # in place, as torch's Adam does
        return h

    times, hs = cold_runs.looked(300, advance)
    assert np.ravel(hs).tolist() == cold_runs.looks(300).tolist()
    assert len(times) == len(hs)
    assert times == sorted(times)


def test_no_point_of_a_run_counts_as_better_than_its_answer(monkeypatch):
    found = Found(np.zeros((3, 4)), 3.0, "", "", ("answer",), later=lambda points: [])
    method = types.SimpleNamespace(
        check=lambda: None, warm_up=lambda task: 0.5, run=lambda task, budget, seed: found
    )
    monkeypatch.setitem(methods.METHODS, "default", method)
    points = [types.SimpleNamespace(seconds=t, solved=v) for t, v in [(1.0, 0.9), (2.0, 0.2), (3.0, 0.3)]]
    monkeypatch.setattr(runner, "thinned_curve", lambda task, ended: points)
    monkeypatch.setattr(runner, "judged", lambda task, candidates: {("answer",): (0.3, 0.4, {})}[candidates])
    curve = all_searches.curve("logistic", "bilevel", 0, 1.0)
    assert curve == {"seconds": [1.0, 2.0, 3.0], "values": [0.9, 0.3, 0.3], "compile_seconds": 0.5}


def test_searches_are_compared_with_the_best_sampler_of_each_seed():
    def run(*values):
        return {"seconds": [1.0, 2.0, 3.0], "values": list(values), "compile_seconds": 0.5}

    found = {
        "bilevel": [run(0.9, 0.3, 0.2), run(0.5, 0.5, 0.5)],
        "Optuna, TPE": [run(0.9, 0.5, 0.3), run(0.9, 0.9, 0.6)],
        "Optuna, CMA-ES": [run(0.9, 0.5, 0.4), run(0.8, 0.5, 0.5)],
        "grid": [run(0.9, 0.9, 0.9), {FAILED: "no memory"}],
        all_searches.SKLEARN: [{CANNOT: "fits no networks"}] * 2,
    }
    by_arm = {row.peer: row for row in all_searches.compared(found)}
    assert by_arm["bilevel"].seconds == (2.0, 1.0)
    assert by_arm["Optuna, TPE"].seconds == (3.0, np.inf)
    assert by_arm["Optuna, CMA-ES"].value == pytest.approx(0.45)
    assert by_arm["grid"] == Row("grid", FAILED, "no memory")
    assert by_arm[all_searches.SKLEARN] == Row(all_searches.SKLEARN, CANNOT, "fits no networks")


def test_what_a_search_has_no_means_for():
    grid = all_searches.curve("logistic", "grid", 0, 1.0)
    assert grid == {CANNOT: "a grid of 30 axes has at least 3**30 points"}


def test_without_the_environment_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(handles, "PYTHON", tmp_path / "python")
    with pytest.raises(SystemExit) as left:
        command.main(["implicit"])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [command.MISSING]
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "no task 'nonsense'; choose from: implicit, unrolled" in capsys.readouterr().err
    assert command.main(["--report", "--out", str(tmp_path / "none")]) == 1
