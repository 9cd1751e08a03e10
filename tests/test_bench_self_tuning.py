"""The study of self-tuning networks: what is compared is what it says, and its rows survive a file."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from benchmarks import self_tuning, self_tuning_report
from benchmarks.problems import regularised
from benchmarks.rows import save_lines
from benchmarks.self_tuning import Point, Row
from bilevel.nn import dropout


@pytest.mark.parametrize("name", ["language", "digits"])
def test_losses_are_noisy_in_training_and_quiet_in_validation(name):
    with jax.enable_x64(False):
        task = regularised.TASKS[name](0)
        hparams = jax.tree.map(jnp.float32, task.hparams)
        rows, _ = task.train.batch(jax.random.key(0), 0)
        inner = jax.jit(task.problem.inner)
        one, two = (inner(task.params, hparams, (rows, jax.random.key(i))) for i in (0, 1))
        assert one != two
        strong = hparams | {self_tuning.SETTINGS[name].rates[0]: jnp.float32(0.8)}
        outer = jax.jit(task.problem.outer)
        values = [outer(task.params, h, task.valid.arrays) for h in (hparams, strong)]
        assert jax.tree.leaves(values[0]) == jax.tree.leaves(values[1])
        assert len(task.hparams) >= 7
        assert set(self_tuning.ends(task)) == set(task.hparams)


def test_the_gated_task_has_its_optimum_in_closed_form():
    with jax.enable_x64(False):
        task = regularised.gated(0)
        lowest, strength = regularised.gated_optimum(task)
        (x, y), (v, t) = (np.asarray(a, np.float64) for a in task.train.source.arrays), task.valid.arrays
        u, d, vt = np.linalg.svd(x, full_matrices=False)
        gate = d**2 / (d**2 + 40 * strength)
        params = {"q": jnp.asarray(vt.T * gate, jnp.float32), "s": jnp.asarray((u.T @ y) / d, jnp.float32)}
        value = task.problem.outer(params, None, (v, t))
        np.testing.assert_allclose(value, lowest, rtol=1e-4)
        grads = jax.grad(task.problem.inner)(params, {"strength": strength}, ((x, y), None))
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4


def test_an_epoch_of_language_has_no_window_of_another_split():
    task = regularised.language(3)
    parts = [np.asarray(x) for x in (task.train.source.arrays, task.valid.arrays, task.test)]
    rows = [{row.tobytes() for row in part} for part in parts]
    assert all(
        len(a & b) <= 2 for a, b in itertools.combinations(rows, 2)
    )  # text repeats itself now and then


def test_searches_stay_in_the_box():
    task = regularised.digits(0)
    box = self_tuning.ends(task)
    for search in (self_tuning.random_search, self_tuning.grid_search):
        proposals = search(box, self_tuning.SETTINGS["digits"].rates, 0)
        seen = [proposals.send(None if i == 0 else 1.0)[0] for i in range(20)]
        for hparams in seen:
            for name, (lo, hi, kind) in box.items():
                assert lo <= hparams[name] <= hi
                assert kind != "whole" or hparams[name] == round(hparams[name])
    grid = {tuple(sorted(hparams.items())) for hparams in seen[:16]}
    assert len(grid) == 16  # no cell twice


def test_a_search_ends_with_its_time_and_keeps_the_best(monkeypatch):
    clock = itertools.count()

    def run(task, inner, path, steps, seed):
        value = path(np.zeros(1))["x"][0]
        for i in range(3):
            next(clock)
            yield Point(i + 1.0, 10 * (i + 1), value - i, 0.0, np.nan)

    def proposals(box, rates, seed):
        for value in (5.0, 3.0, 9.0, 9.0, 9.0):
            yield {"x": value}, None

    monkeypatch.setattr(self_tuning, "plain", run)
    monkeypatch.setattr(self_tuning, "ends", lambda task: {})
    points, best = self_tuning.searched(None, self_tuning.SETTINGS["digits"], None, proposals, 30, 7.0, 0)
    assert best == {"x": 3.0}
    assert [point.seconds for point in points] == [1, 2, 3, 4, 5, 6, 7]
    assert min(point.valid for point in points) == 1.0


def inner(params, hparams, batch):
    (x, y), key = batch
    return jnp.mean((dropout(x, hparams["rate"], key) @ params["w"] - y) ** 2)


def outer(params, hparams, batch):
    return jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)


TINY = bilevel.Problem(inner, outer, constraints=bilevel.interval(0, 0.9))


def tiny(seed: int, hparams=None):
    """Least squares with dropout, which compiles fast."""
    rng = np.random.default_rng(seed)
    train, valid, test = (
        tuple(jnp.asarray(x, jnp.float32) for x in (rng.standard_normal((40, 3)), rng.standard_normal(40)))
        for _ in range(3)
    )
    sources = bilevel.with_rng(bilevel.minibatches(train, 10)), bilevel.minibatches(valid, 10)
    params = {"w": jnp.zeros(3, jnp.float32)}
    return regularised.RegularisedTask(TINY, params, hparams or {"rate": 0.05}, *sources, test)


@pytest.fixture(scope="module")
def rows():
    """A study of seconds."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setitem(self_tuning.SETTINGS, "tiny", self_tuning.Setting((3e-3,), 0.2, ("rate",), (0.05,)))
        patch.setitem(regularised.TASKS, "tiny", tiny)
        patch.setattr(self_tuning, "CHUNK", 4)
        self_tuning.chosen.cache_clear()
        yield self_tuning.study(["tiny"], [0], arms=("random", "grid"))


def test_methods_replays_and_searches_are_all_there(rows):
    arms = {"stn", "delta_stn", "start", "random", "grid"}
    arms |= {f"{what} of {arm}" for what in ("final", "replay") for arm in ("stn", "delta_stn")}
    assert {row.arm for row in rows} == arms
    by_arm = {row.arm: row for row in rows}
    stn = by_arm["stn"]
    assert stn.points[-1].seconds >= 0.2
    assert len(stn.path["rate"]) == len(stn.points)
    assert by_arm["replay of stn"].points[-1].steps == stn.points[-1].steps
    assert by_arm["start"].hparams == pytest.approx({"rate": 0.05})
    assert all(np.isfinite(row.best.valid) for row in rows)


def test_rows_survive_a_file_and_are_reported(rows, tmp_path, capsys):
    moved = dataclasses.replace(rows[0], start=("rate", 2.0))
    save_lines([*rows, moved], tmp_path / "runs.jsonl")
    again = self_tuning.load(tmp_path / "runs.jsonl")
    assert str(again[:-1]) == str(rows)  # nan is not equal to itself
    self_tuning_report.show(again)
    printed = capsys.readouterr().out
    assert "stn beats random: " in printed
    assert "range 0.00 at the start" in printed
    self_tuning_report.draw(again, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"tiny.png", "starts.png"}


def test_a_verdict_counts_seeds():
    def row(arm, seed, test):
        return Row("t", arm, seed, None, [Point(1.0, 1, 1.0, test, 0.0)], {}, {})

    made = [row("stn", 0, 1.0), row("stn", 1, 1.0), row("random", 0, 2.0), row("random", 1, 0.5)]
    assert self_tuning_report.verdicts(made) == ["stn beats random: 1 of 2 seeds (does not hold)"]
