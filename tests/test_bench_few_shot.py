"""The study of few-shot tasks: its data, its losses, a run of all arms, and the program by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from benchmarks import few_shot as study
from benchmarks import few_shot_cost, few_shot_report
from benchmarks.few_shot import Row
from benchmarks.problems import few_shot
from benchmarks.problems.few_shot import FewShot
from benchmarks.rows import save_lines
from bilevel import em

COUNTS = (3, 3)


def tiny(seed, shots):
    """Three clusters, two of them among six queries."""
    rng = np.random.default_rng(seed)
    parts = []
    for i in range(2):
        labels = np.tile(np.arange(3, dtype=np.int32), 12)
        x = (2 * np.eye(3)[labels] + rng.standard_normal((36, 3))).astype(np.float32)
        parts.append(em.sample_tasks(x, labels, COUNTS[i], shots, 2, 6, 2 * seed + i))
    return FewShot("gaussian", shots, *parts)


# --- Data -------------------------------------------------------------------------------------------------


def rows_of(part):
    train, _ = part
    return {row.tobytes() for name in ("support", "query") for row in train[name].reshape(-1, 64)}


def test_images_of_validation_and_test_are_kept_apart():
    tasks = few_shot.digits(0, 1, (20, 20))
    assert len(rows_of(tasks.valid)) > 500
    assert not rows_of(tasks.valid) & rows_of(tasks.test)
    train, valid = tasks.test
    assert train["support"].shape == (20, 10, 64)
    assert train["query"].shape == (20, 75, 64)
    assert all(len(set(labels)) == 3 for labels in valid["labels"])


def test_similarities_are_on_the_simplex_and_of_use():
    tasks = few_shot.similarities(0, 4, (5, 5))
    train, valid = tasks.test
    assert train["support"].shape == (5, 40, 10)
    np.testing.assert_allclose(train["query"].sum(-1), 1, rtol=1e-5)
    assert 0.6 < np.mean(train["query"].argmax(-1) == valid["labels"]) < 0.95


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".dat"])
def test_files_keep_classes_apart(tmp_path, suffix):
    rng = np.random.default_rng(0)
    names, path = np.repeat(list("abcdefg"), 40), tmp_path / f"letters{suffix}"
    features = rng.standard_normal((280, 4)).round(6) + np.arange(7).repeat(40)[:, None]
    if suffix == ".npz":
        np.savez(path, feature=features.reshape(280, 2, 2), label=names)
    else:
        lines = [f"{','.join(map(str, row))}, {name}" for row, name in zip(features, names, strict=True)]
        path.write_text("\n".join(["@relation letters", "@data", *lines, ""]))
    read, labels = few_shot.read(path)
    np.testing.assert_allclose(read, features)
    np.testing.assert_array_equal(labels, np.arange(7).repeat(40))
    tasks = few_shot.file(path, 0, 2, COUNTS)
    order = np.random.default_rng(0).permutation(7)
    for part, chosen in ((tasks.valid, order[:3]), (tasks.test, order[3:6])):
        train, _ = part
        assert train["support"].shape[1:] == (3 * 2, 4)
        size = np.sqrt(features[np.isin(labels, order[:3])].var(axis=0).sum() / few_shot.VARIANCE)
        there = {row.tobytes() for row in (features[np.isin(labels, chosen)] / size).astype(np.float32)}
        assert {row.tobytes() for row in train["query"].reshape(-1, 4)} <= there


def test_what_no_file_of_features_is(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz has no array feature, label, only \['x'\]"):
        few_shot.read(tmp_path / "a.npz")
    (tmp_path / "b.csv").write_text("1,2,a\n1,b\n")
    with pytest.raises(ValueError, match=r"b\.csv must have rows of the same length"):
        few_shot.read(tmp_path / "b.csv")


# --- Losses and units -------------------------------------------------------------------------------------


def test_the_bounded_loss_is_that_of_the_softmax():
    u = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    params = {"log_assignments": jnp.log(u)}
    loss, metrics = study.bounded_loss(params, None, {"labels": np.array([0, 1])})
    e = np.exp(u)
    expected = -np.mean([0.7 - np.log(e[0].sum()), 0.0 - np.log(e[1].sum())])
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert metrics["accuracy"] == 0.5


def test_published_units_begin_at_the_same_strengths():
    natural, raw = (study.first("gaussian", True, raw) for raw in (False, True))
    for name, value in study.published(raw).items():
        np.testing.assert_allclose(value, natural[name], rtol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "dirichlet"])
def test_a_schedule_is_judged_by_the_map_that_it_was_learned_in(kind):
    train, valid = (few_shot.digits if kind == "gaussian" else few_shot.similarities)(0, 2, COUNTS).valid
    rng = np.random.default_rng(0)
    hparams = {name: rng.uniform(1, 2, 3) for name in study.PER_STEP} | {"scale": 1.2}
    problem, update = study.problem(kind, 2), jax.jit(study.problem(kind, 2).update)
    params = problem.start(hparams, train, jax.random.key(0))
    for j in range(3):
        params = update(params, {name: np.broadcast_to(x, 3)[j] for name, x in hparams.items()}, train)
    expected = problem.outer(params, None, valid)[1]["accuracy"]
    found = study.accuracies(FewShot(kind, 2, (train, valid), ()), [hparams] * 2, "valid", 3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_program_by_hand_has_the_same_loss_and_slope():
    tasks = jax.tree.map(jnp.asarray, few_shot.digits(0, 1, COUNTS).valid)
    first = few_shot_cost.first(3)
    fn = bilevel.hypergradient(few_shot_cost.PROBLEM, bilevel.unrolled(steps=3, per_step=study.PER_STEP))
    made = jax.jit(fn)(None, first, *tasks)
    by_hand = jax.jit(
        jax.value_and_grad(lambda free: few_shot_cost.mean_loss(few_shot_cost.short, free, *tasks))
    )
    value, grad = by_hand(jax.tree.map(jnp.log, first))
    np.testing.assert_allclose(value, made.value, rtol=1e-5)
    for name, slope in grad.items():
        np.testing.assert_allclose(slope, made.grad[name] * first[name], rtol=1e-4, atol=1e-6)


# --- The study --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setattr(study, "LEVELS", {"gaussian": (2, 1, 3)})
        yield study.study(tiny, "tiny", [1], [0, 1], study.DEFAULT, steps=2)


def test_all_arms_are_there_and_judged(rows):
    assert [row.arm for row in rows] == 2 * list(study.DEFAULT)
    for row in rows:
        assert 0 <= row.valid <= 1
        assert 0 <= row.test <= 1
        own = row.arm in ("unem", "unem_ce")
        assert [len(row.hparams[name]) for name in study.NAMES] == ([10, 10, 1] if own else [1, 1, 1])
    by_arm = {row.arm: row for row in rows if row.seed == 1}
    assert by_arm["random"].seconds >= by_arm["unem"].seconds > 0
    assert by_arm["random"].tried % study.CHUNK == 0
    assert by_arm["grid"].tried == 6
    assert by_arm["grid"].hparams["temperature"] == [1.0]
    assert by_arm["em"].hparams == {name: [1.0] for name in study.NAMES}


def test_random_search_needs_the_time_of_another_arm():
    with pytest.raises(
        ValueError, match="random gets the seconds that unem takes: run both, --arms unem random"
    ):
        study.study(tiny, "tiny", [1], [0], ["random"])


def test_two_numbers_act_on_a_gaussian():
    """The grid leaves the temperature at 1: another one is another prior weight and another scale."""
    (train, valid), problem = tiny(0, 1).valid, study.problem("gaussian", 1)
    update, losses = jax.jit(problem.update), []
    for strengths in ((1.5, 1.0, 1.2), (6.0, 4.0, 2.4), (1.5, 1.0, 1.3)):
        hparams = study.constant(*strengths)
        params = problem.start(hparams, train, jax.random.key(0))
        for _ in range(3):
            params = update(params, hparams, train)
        losses.append(float(problem.outer(params, None, valid)[0]))
    assert abs(losses[1] - losses[0]) < 1e-5 < abs(losses[2] - losses[0])


def test_other_runs_of_a_file_are_kept(monkeypatch, tmp_path):
    def row(arm, seed, test):
        return Row("digits", 1, arm, seed, 0.0, test, 0.0, 0, {name: [1.0] for name in study.NAMES})

    save_lines([row("em", 0, 0.5), row("em", 1, 0.6)], tmp_path / "runs.jsonl")
    monkeypatch.setattr(study, "study", lambda *args: args[-1](row("em", 0, 0.7)))
    study.main(["--out", str(tmp_path)])
    assert few_shot_report.load(tmp_path / "runs.jsonl", Row) == [row("em", 1, 0.6), row("em", 0, 0.7)]


def test_a_search_takes_the_best_on_validation():
    tasks = tiny(0, 1)
    points = [study.constant(scale=x) for x in (0.01, 1.0)]
    values = study.accuracies(tasks, points, "valid")
    assert values[0] != values[1]
    assert study.searched(tasks, points)[0] == points[int(values.argmax())]


def test_rows_survive_a_file_and_are_reported(rows, tmp_path, capsys):
    save_lines(rows, tmp_path / "runs.jsonl")
    again = few_shot_report.load(tmp_path / "runs.jsonl", Row)
    assert again == rows
    few_shot_report.show(again)
    printed = capsys.readouterr().out
    assert "tiny, shots 1, 2 seeds" in printed
    assert "  - unem beats em: by " in printed
    few_shot_report.draw(again, tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["tiny_1.png"]


def test_a_verdict_is_of_paired_seeds():
    def row(arm, seed, test):
        return Row("t", 1, arm, seed, 0.0, test, 0.0, 0, {})

    made = [row("unem", 0, 0.8), row("unem", 1, 0.71), row("em", 1, 0.66), row("em", 0, 0.73)]
    (said,) = few_shot_report.verdicts(made)
    assert said == "unem beats em: by 6.0 points, standard error 1.0, 5 asked, in 2 of 2 seeds (holds)"
