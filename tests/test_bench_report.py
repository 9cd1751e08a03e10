"""What the reports of the studies say, in the terminal, on the page and between two of them."""

import dataclasses
import html.parser
import json
import math
import re
import shutil

import numpy as np
import pytest

from benchmarks import __main__ as entry
from benchmarks import browser, catalogue, charts, compare, overall, page, report, summary, tune_methods
from benchmarks.methods import FAMILIES, METHODS, Setting
from benchmarks.problems import PROBLEMS
from benchmarks.rows import CurvePoint, Job, Machine, Row
from benchmarks.study import Request, Study

LIKE = Row(
    "ridge", "random", 0, seconds=0.2, commit="abc", command="bilevel bench run <x>",
    machine=Machine("3.11", "0.10", "cpu", 2, "a processor", 0.5), started="2026-01-01T00:00:00+00:00",
    compile_seconds=1.5, run_seconds=0.21, status="TIME", message="The time was up.",
    curve=(CurvePoint(0.1, 10.0, 2.0, 2.0, 2.0), CurvePoint(0.2, 20.0, 1.0, 1.0, 1.0)),
    value=1.0, solved=1.0, test=2.0, metrics={"accuracy": 0.5}, optimum=1.0,
)  # fmt: skip


def row(problem="ridge", method="random", seed=0, **changes) -> Row:
    return dataclasses.replace(LIKE, problem=problem, method=method, seed=seed, **changes)


def late(seconds: float, end: float = 1.0):
    """Changes of a run that arrives then, at this value."""
    return {"curve": (CurvePoint(0.1, 10, 3, 3, 3), CurvePoint(seconds, 30, 1, 1, end)), "solved": end}


@pytest.fixture
def study(tmp_path):
    """Two problems, one of them not known; the default arrives first, and runs failed and were refused."""
    study = Study(tmp_path)
    study.ask(Request(("ridge", "odd"), ("default", "random", "maid"), (0, 1, 2)), 0.2)
    for seed in (0, 1):
        study.append(row(method="default", seed=seed, metrics={}))
        study.append(row(seed=seed, **late(0.4, 1.01)))
    nothing = {"curve": (), "solved": math.nan, "optimum": None, "compile_seconds": math.nan}
    study.append(row("odd", status="DIVERGED", message="It <b>went</b> up.", **nothing))
    study.append(row("odd", "maid", status="REFUSED", message="No constants.", **nothing))
    return study


# --- Numbers ----------------------------------------------------------------------------------------------


def test_excess_is_relative_where_the_lowest_is_positive():
    assert list(summary.excess([2.0, 3.0], 2.0)) == [0.0, 0.5]
    assert list(summary.excess([-1.0, 3.0], -2.0)) == [1.0, 5.0]
    assert np.isnan(summary.excess(1.0, np.inf))


def test_the_lowest_known_is_of_a_problem_and_seed():
    rows = [
        row(solved=3.0, optimum=None),
        row(method="grid", optimum=0.5),
        row(method="grid", seed=1, solved=-1, curve=()),
        row("odd", solved=math.nan, optimum=None, curve=()),
    ]
    assert summary.lowest_known(rows) == {("ridge", 0): 0.5, ("ridge", 1): -1, ("odd", 0): math.inf}


def test_bands_are_quartiles_from_the_last_start_to_the_last_end():
    found = [
        (np.array([1.0, 3.0]), np.array([4.0, 2.0])),
        (np.array([2.0, 8.0]), np.array([6.0, 1.0])),
        (np.array([1.5]), np.array([5.0])),
    ]
    at, low, middle, high = summary.band(found)
    assert (at[0], at[-1]) == (2.0, 8.0)
    assert (low[0], middle[0], high[0]) == (4.5, 5.0, 5.5)
    assert (low[-1], middle[-1], high[-1]) == (1.5, 2.0, 3.5)


def test_profiles_are_shares_within_a_factor_of_the_least_cost():
    rows = [
        *(row(method="default", seed=seed, **late(0.2)) for seed in (0, 1)),
        row(method="random", seed=0, **late(0.1)),
        row(method="random", seed=1, **late(0.8)),
        row("odd", "grid", solved=math.nan, curve=(), optimum=None),  # which nobody solves
    ]
    ratios = summary.costs(rows, "seconds")
    assert ratios["default"] == pytest.approx([2.0, 1.0])
    assert ratios["random"] == pytest.approx([1.0, 4.0])
    assert np.all(np.isinf(ratios["grid"]))
    shares = summary.profile(ratios["random"], np.array([1.0, 3.9, 4.0]))
    assert list(shares) == [0.5, 0.5, 1.0]
    # With compilation, 1.5 s each.
    assert summary.costs(rows, "cold")["random"] == pytest.approx([1.0, 2.3 / 1.7])
    found = {own.method: own for own in overall.overall(rows)}
    assert list(found) == ["default", "random", "grid"]
    assert (found["random"].arrived, found["random"].factor) == (2, 2.5)
    assert found["grid"].worst == math.inf


def test_no_verdict_praises_a_method_without_a_value():
    rows = [
        row(method="default", solved=math.nan, curve=()),
        row(**late(0.3)),
        row(method="grid", solved=9.0),
    ]
    found = summary.entries(rows, [])
    assert summary.verdict(found) == (
        "Random ends lowest, 0 % above the lowest known value; random is the only one within 2 % on all "
        "seeds, after 0.3 s. The default ends - above, within 2 % on 0 of 1 seeds."
    )
    assert summary.verdict(found[:1]) == "No method has a value on most seeds."


@pytest.mark.parametrize(
    ("values", "answer", "arrives"),
    [
        ([3.0, 1.01, 1.0], 1.0, 2.0),
        ([3.0, 1.0, 3.0, 1.0], 1.0, 2.0),  # the answer was there before it went away
        ([3.0, 1.01, 3.0, 1.0], 1.0, 4.0),
        ([3.0, 1.0, 3.0], 3.0, math.inf),  # it passed by
        ([3.0, math.nan, 1.01], 1.01, 3.0),
        ([1.0, 1.0], 1.0, 1.0),
        ([], 1.0, math.inf),
    ],
)
def test_arrived_is_within_and_stays(values, answer, arrives):
    curve = tuple(CurvePoint(float(i), 0.0, v, v, v) for i, v in enumerate(values, start=1))
    assert summary.reached(row(curve=curve, solved=answer), 1.0) == arrives


# --- Terminal ---------------------------------------------------------------------------------------------


def test_what_the_terminal_says(study, capsys):
    assert entry.main(["report", str(study.folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith(": 6 of 18 jobs done, 0.2 s a run")
    assert "default 2/3 1.5 0.21 1 (1 to 1) 0 % 2 - 0.2 (2/2) TIME" in lines
    assert "random 2/3 1.5 0.21 1.01 (1.01 to 1.01) 1 % 2 0.5 0.4 (2/2) TIME" in lines
    assert "random 1/3 - 0.21 nan (nan to nan) - 2 0.5 never DIVERGED" in lines
    assert "maid 0/3 - - - - - - - REFUSED" in lines
    assert "odd, random, seed 0: DIVERGED. It <b>went</b> up." in lines
    assert (
        "Default ends lowest, 0 % above the lowest known value; default is first within 2 % on all seeds, "
        "after 0.2 s." in lines
    )
    assert lines[-1] == f"The page is {study.folder / 'report.html'}."


def test_a_half_written_row_is_left_out_and_said(study, capsys):
    with study.rows_path.open("a") as file:
        file.write('{"half')
    assert entry.main(["report", str(study.folder)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{study.rows_path}: a half-written last row (6 bytes) is left out.\n"
    assert ": 6 of 18 jobs done" in said.out
    assert study.rows_path.read_text().endswith('{"half')


def test_list_names_everything_with_its_count(capsys):
    assert entry.main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (*PROBLEMS, *METHODS):
        assert re.search(rf"^  {name} ", said, re.MULTILINE)
    for name, listed in PROBLEMS.items():
        task = listed.make(0)
        assert sum(np.size(leaf) for leaf in task.hparams.values()) == listed.hparams, name
    for size in catalogue.SIZES.values():
        assert set(size.problems) <= set(PROBLEMS)
        assert set(size.methods) <= set(METHODS)


# --- The page ---------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """The tags that are open at the end, and what refers to elsewhere."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.outside = [], [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named["href"]] if "href" in named else []
        self.outside += [named["src"]] if "src" in named else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_holds_everything(study):
    page.save(study, study.folder / "page.html")
    text = (study.folder / "page.html").read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert reader.outside == []
    assert {link[1:] for link in reader.links} == {"overall", "ridge", "odd", "endings", "how"}
    assert {link[0] for link in reader.links} == {"#"}
    assert set(reader.ids) == {"overall", "ridge", "odd", "endings", "how"}
    assert not re.search(r"https?://|url\(|@import", text)
    # Escaped, and never hidden.
    assert "bilevel bench run &lt;x&gt;" in text
    assert "It &lt;b&gt;went&lt;/b&gt; up." in text
    assert "No constants." in text
    assert "1 of 6 runs failed, diverged or found no value." in text
    assert len(text) < 2e6


def test_a_page_that_cannot_be_written_is_one_line(study, capsys):
    (study.folder / "folder.html").mkdir()
    assert entry.main(["report", str(study.folder), "--output", str(study.folder / "folder.html")]) == 2
    assert re.fullmatch(r"error: .*folder.html cannot be written: is a directory.\n", capsys.readouterr().err)


def test_steps_keep_a_value_until_the_next_one():
    path = charts.steps(np.array([0.0, 1, 2, 3]), np.array([5.0, 5, 4, 4]))
    assert path == "M0.0 5.0H2.0V4.0H3.0"
    axis = charts.log_axis([0.1, 1000.0], 0, 100)
    assert axis.at([0.1, 10.0, 1000.0, 1e9, math.nan]) == pytest.approx([0, 50, 100, 100, 100])
    assert axis.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])


@pytest.mark.thorough
@pytest.mark.skipif(not any(map(shutil.which, browser.NAMES)), reason="needs a browser")
def test_headers_sort_in_a_browser(study):
    text = page.page(study)
    tried, faults = browser.check(text, 390)
    assert tried >= 2 * (9 + 12 + 12)
    assert faults == []
    tried, faults = browser.check(text.replace("const sign = down ? -1 : 1;", "const sign = 1;"), 390)
    assert any("descending" in fault for fault in faults)


# --- Two of them ------------------------------------------------------------------------------------------


def test_a_change_is_more_than_noise_where_its_interval_leaves_out_zero():
    # Over three seeds: logs 0.1, 0.2 and 0.3, t 4.303, s 0.1.
    change = compare.change([1.0, 1.0, 1.0, math.nan], np.exp([0.1, 0.2, 0.3, 9.0]))
    assert change == pytest.approx((0.2, 4.302653 * 0.1 / math.sqrt(3), 3))
    assert not change.counts(0.0)
    assert compare.change([1.0, 1.0], [1.2, 1.2]).counts(0.1)
    assert not compare.change([1.0, 1.0], [1.2, 1.2]).counts(0.3)
    assert not compare.change([1.0], [2.0]).counts(0.0)
    assert str(compare.change([], [])) == "-"


def test_what_compare_says(study, tmp_path, capsys):
    other = Study(tmp_path / "other")
    other.ask(Request(("ridge",), ("default", "random"), (0, 1)), 0.2)
    for seed in (0, 1):
        other.append(row(method="default", seed=seed, **late(0.4)))
        other.append(row(seed=seed, **late(0.4, 1.5)))
    assert entry.main(["compare", str(study.folder), str(other.folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ridge, default 2 1 (1 to 1) 2 (2 to 2) slower" in lines
    assert "ridge, random 2 1.49 (1.49 to 1.49) - worse, there on 0 seeds, not 2" in lines
    assert lines[-1] == "2 of 2 changed; 2 runs have no partner in the other study."
    assert entry.main(["compare", str(study.folder), str(tmp_path / "none")]) == 2
    assert "holds no study" in capsys.readouterr().err
    alone = Study(tmp_path / "alone")
    alone.ask(Request(("mlp",), ("random",), (0,)), 0.2)
    alone.append(row("mlp"))
    assert entry.main(["compare", str(study.folder), str(alone.folder)]) == 2
    assert "have no run in common" in capsys.readouterr().err


# --- The recorded search ----------------------------------------------------------------------------------


def test_the_search_takes_the_setting_of_the_lowest_mean_score():
    names = {setting: tune_methods.name_of("soba", setting) for setting in FAMILIES["soba"].grid}
    good, bad, *others = names
    rows = [
        row("kfold", names[good], status="REFUSED", solved=math.nan, curve=()),
        row(method=names[good], solved=1.01, curve=()),
        row(method=names[bad], solved=math.nan, curve=(), status="DIVERGED"),
        *(row(method=names[other], solved=2.0, curve=()) for other in others),
        row(method=tune_methods.name_of("soba", FAMILIES["soba"].setting), solved=3.0, curve=()),
    ]
    found = tune_methods.scores(rows)
    assert found[names[good]] == {"ridge": pytest.approx(-2.0)}
    assert found[names[bad]] == {"ridge": 1.0}
    assert tune_methods.winners(["soba"], found) == {"soba": good}


def test_the_record_holds_what_the_methods_run_at():
    record = json.loads(tune_methods.TUNED_PATH.read_text())
    assert set(record["seeds"]).isdisjoint(range(100))
    for family, setting in record["winners"].items():
        assert (f"{family}_tuned" in METHODS) == (Setting(*setting) != FAMILIES[family].setting)
        scores = record["scores"]
        known = FAMILIES[family].settings
        best = min(known, key=lambda s, f=family: np.mean(list(scores[tune_methods.name_of(f, s)].values())))
        assert Setting(*setting) == best


def test_jobs_are_asked_for_once(study):
    study.ask(Request(("ridge",), ("default", "grid"), (0,)), 0.2)
    jobs = report.jobs_of(study)
    assert len(jobs) == len(set(jobs)) == 19
    assert Job("ridge", "grid", 0) in jobs
