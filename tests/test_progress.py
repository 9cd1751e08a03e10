"""What is shown of a run: the numbers, and where they go."""

import io
import os
import sys
import types

import numpy as np
import pytest
import rich.console

from bilevel import progress
from bilevel.problem import Status
from bilevel.progress import Facts, Lines, reporter

NAN = float("nan")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def rows(first, value, **columns):
    """New rows of a history."""
    value = np.asarray(value)
    full = {
        "step": np.arange(first, first + len(value)),
        "value": value,
        "grad_norm": value / 4,
        "accepted": np.isfinite(value),
        "nonfinite": np.zeros(value.shape, np.int32),
    }
    return {**full, **columns}


# --- Numbers ------------------------------------------------------------------------------------------------


def test_rate_and_time_left_are_those_of_the_last_chunks():
    clock = Clock()
    facts = Facts(1000, clock)
    assert facts.pace() == ["compiling"]
    clock.now = 60.0  # of compilation
    facts.add(410, rows(400, [2.0] * 10))  # of a run that went on from step 400
    assert facts.pace() == []
    clock.now = 62.0
    facts.add(500, rows(410, [1.0] * 90))
    assert facts.rate == 45.0
    assert facts.pace() == ["45 steps/s", "11 s left"]
    for i in range(1, 41):  # the slow chunks are all that counts by now
        clock.now += 4.0
        facts.add(500 + i, rows(499 + i, [1.0]))
    assert facts.pace() == ["4 s/step", "30:40 min left"]


def test_the_best_value_is_of_all_rows_that_were_accepted():
    facts = Facts(10)
    facts.add(3, rows(0, [3.0, 0.5, 2.0], accepted=np.array([True, False, True])))
    assert facts.numbers() == ["value 2", "best 2", "grad norm 0.5"]
    facts.add(5, rows(3, [1.0, 4.0]))
    assert facts.numbers() == ["value 4", "best 1", "grad norm 1"]
    facts.add(6, rows(5, [NAN]))
    assert facts.best == 1.0


def test_a_value_that_is_judged_decides():
    facts = Facts(10)
    facts.add(3, rows(0, [3.0, 0.1, 2.0], judged=np.array([2.5, NAN, NAN])))
    assert facts.best == 2.5


def test_of_a_population_the_best_and_those_that_run():
    facts = Facts(10)
    value = np.array([[4.0, 3.0, 2.0], [3.0, NAN, NAN]])
    nonfinite = np.array([[0, 0, 0], [0, 1, 0]])  # the second met a nan and goes on, the third has ended
    facts.add(2, rows(0, value, nonfinite=nonfinite))
    assert facts.numbers() == ["value 3", "best 2 (member 2)", "grad norm 0.75", "2 of 3 running"]
    facts.add(3, rows(2, np.array([[1.0, NAN, NAN]])))
    assert facts.numbers()[1::2] == ["best 1 (member 0)", "1 of 3 running"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (125, "2:05 min"), (12000, "3:20:00 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


# --- Without a terminal -------------------------------------------------------------------------------------


def told(steps, chunk, seconds):
    """The lines of a run whose chunks take so many seconds each."""
    stream, clock = io.StringIO(), Clock()
    facts, lines = Facts(steps, clock), Lines(stream)
    lines.show(facts, last=False)
    for done in range(chunk, steps + 1, chunk):
        clock.now += seconds
        facts.add(done, rows(done - chunk, [1.0] * chunk))
        lines.show(facts, last=False)
    lines.show(facts, last=True)
    return stream.getvalue().splitlines()


def test_a_short_run_is_told_in_a_line_or_two():
    assert told(100, 1, 0.005) == [
        "outer steps 0/100 (0 %)  compiling",
        "outer steps 100/100 (100 %)  value 1  best 1  grad norm 0.25  0.5 s",
    ]


def test_lines_come_each_tenth_or_each_ten_seconds():
    tenths = told(1000, 1, 0.02)  # 20 s
    assert [line.split()[2] for line in tenths[1:-1]] == [f"{n}/1000" for n in range(100, 1001, 100)]
    slow = told(600, 1, 0.5)  # 5 minutes; from 100 s on tenths come first
    assert [line.split()[2] for line in slow[1:5]] == ["20/600", "40/600", "60/600", "80/600"]
    # Hours: a tenth more time each, so that lines are few.
    assert len(told(10**5, 50, 10.0)) < 100
    assert "left" in slow[-3]


def test_lines_hold_no_control_characters(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    with reporter(True, 10) as tell:
        tell(10, rows(0, [1.0] * 10), Status.CONVERGED)
    assert "CONVERGED" in stream.getvalue()
    assert all(c.isprintable() or c == "\n" for c in stream.getvalue())


def test_silence(monkeypatch, capsys):
    with reporter(False, 10) as tell:
        tell(10, rows(0, [1.0] * 10))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", None)  # of a program without a console
    with reporter(True, 10) as tell:
        tell(10, {})


def test_a_closed_stream_ends_no_run(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with reporter(True, 10) as tell:
        stream.close()
        tell(5, rows(0, [1.0] * 5))


# --- A terminal ---------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes a terminal of stderr, and returns one that says what it was sent."""
    master, slave = os.openpty()
    stream = os.fdopen(slave, "w")

    def seen() -> str:
        stream.write(END)
        stream.flush()
        text = ""
        while not text.endswith(END):  # a terminal hands on what it is sent when it likes
            text += os.read(master, 1 << 16).decode()
        return text.removesuffix(END)

    def begin():  # in the test itself: pytest puts its own streams back before it
        monkeypatch.setattr(sys, "stderr", stream)
        return seen

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("CI", raising=False)
    yield begin
    stream.close()
    os.close(master)


END, HIDE, SHOW = "-- end --", "\x1b[?25l", "\x1b[?25h"


def test_a_terminal_is_drawn_and_left_clean(terminal, capsys):
    seen = terminal()
    with reporter(True, 10) as tell:
        sys.stdout.write("a callback's own words")
        tell(10, rows(0, [2.0] * 10), Status.CONVERGED)
    text = seen()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.index(HIDE) < text.index("compiling") < text.index("value 2  best 2") < text.index(SHOW)
    assert "CONVERGED" in text
    assert "10/10" in text
    # They are where they were sent: not in the terminal of the other stream.
    assert capsys.readouterr().out == "a callback's own words"
    assert "own words" not in text


@pytest.mark.parametrize(
    ("error", "word"), [(KeyboardInterrupt(), "INTERRUPTED"), (RuntimeError("no"), "failed: RuntimeError")]
)
def test_errors_leave_it_clean(terminal, error, word):
    seen = terminal()

    def run():
        with reporter(True, 10) as tell:
            tell(5, rows(0, [2.0] * 5))
            raise error

    with pytest.raises(type(error)):
        run()
    text = seen()
    assert text.rindex(word) < text.rindex(SHOW)


def test_it_is_drawn_ten_times_a_second_at_most(terminal):
    seen = terminal()
    with reporter(True, 10**6) as tell:
        for i in range(200):
            tell(i + 1, rows(i, [1.0]))
    assert 2 <= seen().count("outer steps") < 20  # the first and the last always


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_where_a_terminal_cannot_be_drawn_on(terminal, monkeypatch, name, value):
    seen = terminal()
    monkeypatch.setenv(name, value)
    with reporter(True, 10) as tell:
        tell(10, rows(0, [2.0] * 10))
    assert "\x1b" not in seen()


# --- A notebook ---------------------------------------------------------------------------------------------


def test_a_notebook_has_one_output_that_is_replaced(monkeypatch, capsys):
    shown = []
    handle = types.SimpleNamespace(
        update=lambda content, raw: shown.append(("update", content["text/plain"]))
    )

    def display(content, raw, display_id):
        assert raw
        assert display_id
        shown.append(("new", content["text/plain"]))
        return handle

    fake = types.ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    with reporter(True, 10) as tell:
        tell(10, rows(0, [2.0] * 10))
    assert [kind for kind, _ in shown] == ["new", "update"]
    assert shown[-1][1].startswith("outer steps 10/10 (100 %)  value 2  best 2")
    assert capsys.readouterr() == ("", "")
