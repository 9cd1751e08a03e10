"""Ctrl-C and termination: a run ends with a Result, or at once where that is asked twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Status, loop, report
from bilevel.interruption import Interrupt
from bilevel.record import Record
from bilevel.run import Run

# What a run takes long for is under way when the script says so.
SCRIPT = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
import bilevel

def pause(seconds, w):
    if seconds > 1:
        print("under way", flush=True)
    time.sleep(float(seconds))
    return w

def inner(w, h, seconds):
    # On matrices: a program of a few operations XLA runs in the thread that calls it, deaf to signals.
    seconds = jnp.where(w == 0, 0.0, seconds)
    much = jnp.full((300, 300), jax.lax.stop_gradient(w))
    late = jax.pure_callback(pause, jax.ShapeDtypeStruct((300, 300), w.dtype), seconds, much @ much)
    return 0.5 * (w - h) ** 2 + 1e-30 * w * jax.lax.stop_gradient(late[0, 0])

def never(w, h, b):
    return 0.5 * (w - 1.0) ** 2

def spin(w, h, rounds):
    # Quick where the run begins, so that it is the second step that takes forever.
    rounds = jnp.where(w == 0, 1.0, rounds)
    first = jnp.float32(0), jnp.full(1000, jax.lax.stop_gradient(w))
    end = jax.lax.while_loop(lambda c: c[0] < rounds, lambda c: (c[0] + 1, jnp.sin(c[1])), first)
    return 0.5 * (w - h) ** 2 + 1e-30 * w * jax.lax.stop_gradient(jnp.sum(end[1]))

def run(inner, much, steps=10_000, path=None, callbacks=(), every=3):
    method = bilevel.alternating(
        bilevel.implicit(bilevel.neumann(1, 0.1)), optax.sgd(0.1), optax.sgd(0.01), inner_steps=1
    )
    try:
        result = bilevel.optimize(
            bilevel.Problem(inner, never), jnp.float32(0), jnp.float32(0.5), np.float32(much), np.float32(0),
            method, steps, progress=False, callbacks=callbacks, judge_every=1,
            checkpoint=path and bilevel.checkpoints(path, every=every),
        )
    except KeyboardInterrupt as error:
        return {"raised": str(error), "back": time.time()}
    return {"status": result.status.name, "message": result.message, "steps": len(result.history["value"]),
            "back": time.time()}
"""


class Child:
    """A script in a process of its own, and the lines that it writes."""

    def __init__(self, script, *arguments):
        env = {**os.environ, "PYTHONPATH": str(Path(bilevel.__file__).parents[1]), "XLA_FLAGS": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT + script, *map(str, arguments)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.watchdog = threading.Timer(90, self.process.kill)
        self.watchdog.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.watchdog.cancel()
        self.process.kill()
        self.process.communicate()

    def until(self, mark):
        for line in self.process.stdout:
            if line.strip() == mark:
                return
        raise AssertionError(f"{mark!r} never came: {self.process.stderr.read()}")

    def send(self, number):
        self.process.send_signal(number)

    def outcome(self):
        out, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        return json.loads(out.splitlines()[-1])


SHORT = """
def tell(step, rows):
    if step == 5:
        print("five", flush=True)
    time.sleep(0.01)

import signal
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
out = run(spin, 10, path=sys.argv[1], callbacks=tell)
out["restored"] = before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
print(json.dumps(out))
"""


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGINT, "Interrupted by the user."), (signal.SIGTERM, "Ended by SIGTERM.")],
    ids=["SIGINT", "SIGTERM"],
)
def test_one_signal_ends_after_the_chunk(tmp_path, number, message):
    with Child(SHORT, tmp_path) as child:
        child.until("five")  # in a callback
        child.send(number)
        out = child.outcome()
    assert out["status"] == "INTERRUPTED"
    assert message in out["message"]
    assert 5 <= out["steps"] < 10_000
    assert out["restored"]
    assert (tmp_path / f"step-{out['steps']:08}.npz").exists()


LONG = """
def tell(step, rows):
    print("under way", flush=True)

out = run(spin, np.inf, path=sys.argv[1], callbacks=tell, every=1)
print(json.dumps(out), flush=True)
"""


@pytest.mark.parametrize("wait", [0.5, 2.0])
def test_two_signals_end_a_long_chunk_at_once(tmp_path, wait):
    """The program cannot be stopped; the process is back in the user's code all the same."""
    with Child(LONG, tmp_path) as child:
        child.until("under way")
        time.sleep(wait)
        child.send(signal.SIGINT)
        time.sleep(wait)
        child.send(signal.SIGINT)
        sent = time.time()
        out = json.loads(child.process.stdout.readline())
    assert out["back"] - sent < 2.5
    assert out["raised"] == (
        f"stopped at once: outer steps 1 and later are lost; checkpoints are in {tmp_path}"
    )
    assert (tmp_path / "step-00000001.npz").exists()


PAUSES = """
out = run(inner, float(sys.argv[1]), steps=3)
print(json.dumps(out), flush=True)
"""


def twice(seconds):
    with Child(PAUSES, seconds) as child:
        child.until("under way")
        child.send(signal.SIGINT)
        time.sleep(0.2)
        child.send(signal.SIGINT)
        return child.outcome()


def test_a_chunk_that_is_done_within_moments_is_kept():
    out = twice(1.2)
    assert (out.get("status"), out.get("steps")) == ("INTERRUPTED", 2), out


# --- In this process -------------------------------------------------------------------------------------

METHOD = bilevel.alternating(bilevel.implicit(bilevel.cg(3)), optax.sgd(0.1), optax.sgd(0.01), inner_steps=1)
PROBLEM = bilevel.Problem(
    lambda w, h, b: 0.5 * (w - b) ** 2 + 0.5 * h * w**2, lambda w, h, b: 0.5 * (w - b) ** 2
)


def run(steps=30, **options):
    arguments = {"key": jax.random.key(0), "progress": False, "judge_every": 1, **options}
    data = jnp.asarray(2.0), jnp.asarray(1.0)
    return bilevel.optimize(PROBLEM, np.float64(0.5), np.float64(0.3), *data, METHOD, steps, **arguments)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_callback(tmp_path, number):
    ended = []

    def struck(step, rows):
        if step == 7:
            signal.raise_signal(number)
        ended.append(step)  # a callback is not torn apart

    result = run(callbacks=struck, checkpoint=tmp_path)
    assert result.status == Status.INTERRUPTED
    assert ended[-1] == len(result.history["value"]) == 7
    assert (tmp_path / "step-00000007.npz").exists()
    whole = run()
    again = run(checkpoint=tmp_path)
    np.testing.assert_array_equal(again.history["value"], whole.history["value"])


@pytest.mark.parametrize("ends", ["steps", "an error", "two interrupts"])
def test_handlers_are_put_back(ends):
    def handle(number, frame):
        raise AssertionError

    def callback(step, rows):
        assert handlers() != [handle, handle]
        if ends == "an error":
            raise OSError
        if ends == "two interrupts":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = handlers()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    try:
        if ends == "an error":
            with pytest.raises(OSError):  # noqa: PT011
                run(callbacks=callback)
        else:
            run(callbacks=callback)
        assert handlers() == [handle, handle]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_signals_that_are_ignored_stay_ignored():
    """As in a job that a shell has sent to the background, whose terminal's Ctrl-C is meant for another."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run(callbacks=lambda step, rows: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.status == Status.BUDGET


def test_handlers_that_python_cannot_put_back_are_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", None)
    with Interrupt() as interrupt:
        assert interrupt.why is None


def test_other_threads_leave_signals_alone():
    before, found = handlers(), []

    def work():
        result = run(callbacks=lambda step, rows: found.append(handlers()))
        found.append(result.status)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found.pop() == Status.BUDGET
    assert found
    assert all(seen == before for seen in found)


def test_a_signal_while_the_last_checkpoint_is_written_costs_nothing(tmp_path, monkeypatch):
    keep = Run._keep

    def struck(self, *args, **settings):
        signal.raise_signal(signal.SIGINT)
        keep(self, *args, **settings)

    monkeypatch.setattr(Run, "_keep", struck)
    result = run(steps=4, checkpoint=bilevel.checkpoints(tmp_path, every=100))
    assert result.status == Status.BUDGET
    assert (tmp_path / "step-00000004.npz").exists()


def twice_struck():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["add", "halve", "result"])
def test_what_is_put_on_record_is_not_torn_apart(tmp_path, monkeypatch, where):
    """A second Ctrl-C waits until it is done; what is left goes on to the same end."""
    starts = {"params": np.full(4, 0.5), "hparams": np.linspace(0.2, 0.8, 4)}
    data = jnp.asarray(2.0), jnp.asarray(1.0)

    def members(path=None):
        return bilevel.optimize(
            PROBLEM, *starts.values(), *data, METHOD, 20, progress=False, judge_every=1,
            population=bilevel.population(4, halve_every=5),
            checkpoint=path and bilevel.checkpoints(path, every=5),
        )  # fmt: skip

    whole, calls = members(), []
    owner, name = {
        "add": (Record, "add"),
        "halve": (loop, "compiled_choice"),
        "result": (report, "result"),
    }[where]
    original = getattr(owner, name)

    def struck(*args, **settings):
        calls.append(1)
        if len(calls) == (1 if where == "result" else 2):
            twice_struck()
        return original(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        result = members(tmp_path)
    expected = Status.INTERRUPTED if where != "result" else Status.BUDGET
    assert expected in result.status
    assert len(result.history["value"]) == int(np.max(result.state.count))
    again = members(tmp_path)
    np.testing.assert_array_equal(again.history["value"], whole.history["value"])
    np.testing.assert_array_equal(again.status, whole.status)


def test_a_third_signal_strikes_anywhere(monkeypatch):
    def struck(*args, **settings):
        twice_struck()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report, "result", struck)
    with pytest.raises(KeyboardInterrupt):
        run()


def test_ctrl_c_after_sigterm_is_the_first():
    with Interrupt() as interrupt, interrupt.waiting():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.why == "Ended by SIGTERM."
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_while_an_iterable_is_awaited():
    """It may wait forever: a second Ctrl-C leaves it alone."""
    taken = threading.Event()

    def endless():
        for _ in range(5):
            yield jnp.asarray(2.0)
        taken.wait()
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    def tell(step, rows):
        if step == 5:
            taken.set()

    result = bilevel.optimize(
        PROBLEM, 0.5, 0.3, endless(), jnp.asarray(1.0), METHOD, 30,
        callbacks=tell, judge_every=1, progress=False,
    )  # fmt: skip
    assert result.status == Status.INTERRUPTED
    assert len(result.history["value"]) == 5
