import importlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import sklearn.datasets
from rich.console import Console

import bilevel
from bilevel import cli, demo


@pytest.fixture(scope="module")
def report():
    return demo.run(seed=1, steps=150, progress=False)


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits(3)


def test_half_of_the_training_labels_are_wrong_and_no_other(digits):
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    true = {pixels.tobytes(): label for pixels, label in zip(x, y, strict=True)}

    def right(split):
        keys = [np.round(np.asarray(row) * 16).tobytes() for row in split["x"]]
        return np.array([true[key] for key in keys]) == np.asarray(split["y"])

    assert len(true) == len(x) == 1797
    assert digits.corrupted.sum() == 500
    np.testing.assert_array_equal(right(digits.train), ~digits.corrupted)
    assert right(digits.valid).all()
    assert right(digits.test).all()
    assert [len(s["y"]) for s in (digits.train, digits.valid, digits.test)] == [1000, 300, 497]


def test_wrong_labels_are_spread_over_all_other_classes():
    target, shift = sklearn.datasets.load_digits().target, np.zeros(10)
    for seed in range(10):
        y = target[np.random.default_rng(seed).permutation(1797)][:1000]
        shift += np.bincount((np.asarray(demo.load_digits(seed).train["y"]) - y) % 10, minlength=10)
    assert shift[0] == 5000
    # 5000 wrong labels over nine classes: 556 each, standard deviation 22.
    assert np.all(np.abs(shift[1:] - 5000 / 9) < 5 * 22)


def test_learned_weights_find_wrong_labels_and_repair_the_model(report):
    assert report.noisy.accuracy > 0.6
    assert report.learned.accuracy > report.noisy.accuracy + 0.03
    assert report.learned.accuracy > report.clean.accuracy - 0.03
    assert report.f1 > 0.9
    assert min(report.precision, report.recall) > 0.85


def test_run_ends_well_and_is_recorded(report):
    result = report.result
    assert result.status == bilevel.Status.BUDGET
    assert np.isfinite(result.history["test"]).sum() == 15
    assert result.history["error"].max() < 0.05
    assert result.counts["inner_grad"] == 150 * 20 * 1000
    assert result.counts["outer_grad"] == 150 * 300
    assert result.hparams["weight"].shape == (1000,)
    assert result.hparams["l2"].shape == (10,)


def test_baselines_are_trained_to_convergence(report):
    weights = {"noisy": np.ones(1000), "clean": ~report.data.corrupted}
    for name, weight in weights.items():
        model = getattr(report, name)
        hparams = {"weight": np.asarray(weight, float), "l2": model.l2}
        grad = jax.grad(demo.train_loss)(model.params, hparams, report.data.train)
        assert np.linalg.norm([np.linalg.norm(g) for g in grad.values()]) < 1e-4


def test_detection_of_a_known_case():
    suspected = np.array([True, True, False, False, True])
    corrupted = np.array([True, False, True, False, True])
    assert demo.detection(suspected, corrupted) == (2 / 3, 2 / 3)
    assert demo.detection(np.zeros(5, bool), corrupted) == (0.0, 0.0)


def test_command_prints_the_figures_and_saves_the_picture(report, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "run", lambda seed, progress: asked.append((seed, progress)) or report)
    path = tmp_path / "out.png"
    assert cli.main(["demo", "--output", str(path), "--seed", "7", "--no-progress"]) == 0
    assert asked == [(7, False)]
    assert path.read_bytes().startswith(b"\x89PNG")
    out = " ".join(capsys.readouterr().out.split())
    for figure in (report.noisy.accuracy, report.learned.accuracy, report.clean.accuracy, report.f1):
        assert f"{figure:.3f}" in out
    assert "3,000,000" in out
    assert "All 150 outer steps are done" in out
    assert "out.png" in out


def test_picture_has_its_panels_and_24_digits(report):
    fig = demo.draw(report)
    assert len(fig.axes) == 4 + 24
    weight = np.asarray(report.result.hparams["weight"])
    lowest = int(np.argmin(weight))
    np.testing.assert_allclose(
        fig.axes[4].images[0].get_array(), np.asarray(report.data.train["x"][lowest]).reshape(8, 8)
    )
    assert fig.axes[4].get_title().startswith(f"label {report.data.train['y'][lowest]},")


@pytest.mark.parametrize("missing", ["sklearn.datasets", "matplotlib.figure"])
def test_missing_extra_is_named_before_any_work(missing, monkeypatch, capsys):
    real = importlib.import_module

    def without(name, *args):
        if name == missing:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(demo, "run", lambda *a, **k: pytest.fail("the job was started"))
    assert cli.main(["demo"]) == 2
    assert "pip install 'bilevel[demo]'" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ImportError, match="needs scikit-learn and matplotlib"):
        demo.main("demo.png", 0, False, Console())


def test_extras_are_not_imported_with_the_demo():
    code = (
        "import sys, bilevel.cli, bilevel.demo; sys.exit(bool({'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["demo", "--version"]),
        (["demo", "--help"], ["--output", "--seed", "--no-progress"]),
        (["--version"], [f"bilevel {bilevel.__version__}"]),
    ],
)
def test_help_and_version(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_without_arguments_prints_help(capsys):
    assert cli.main([]) == 0
    assert "usage: bilevel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "--seed", "-1"], "whole number from 0"),
        (["demo", "--seed", "x"], "whole number from 0"),
        (["demo", "--output", "picture"], "must end in .png, .pdf, .svg"),
        (["demo", "--output", "no/such/folder/demo.png"], "'no/such/folder' is not a folder"),
        (["dance"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert words in capsys.readouterr().err
