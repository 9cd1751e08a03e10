"""Pictures of results: which panels there are, and what they show."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from made_results import STEPS, result

from bilevel import panels, plots
from bilevel.problem import Status

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=500)
NAN = np.nan


def weights(t):
    return 1 / (1 + np.exp(-4 * t * WEIGHTS))


def drawn(given, number=None):
    """Axes by title; ``number``: the one panel that is wanted."""
    every, _ = panels.panels(given)
    fig = plots.figure()
    axes = fig.subplots(len(every), squeeze=False).ravel()
    for ax, panel in zip(axes, every, strict=True):
        panel.draw(ax)
    return (
        axes[number]
        if number is not None
        else [(panel.title, ax) for panel, ax in zip(every, axes, strict=True)]
    )


# --- Which panels -------------------------------------------------------------------------------------------


def test_panels_suit_what_was_tuned():
    given = result(
        lambda t: {
            "filter": np.eye(3) * t,
            "mask": np.ones((8, 9)) * t,
            "rate": np.array(t),
            "short": np.array([t, 1.0]),
            "weight": weights(t),
        }
    )
    figure = given.plot()
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == [
        "outer loss", "gradient norm (free units)", "hparams['filter']",
        "hparams['mask']", "hparams['mask']", "hparams['rate']", "hparams['short']",
        "hparams['weight']", "hparams['weight'], 500 entries",
    ]  # fmt: skip
    pictures = [ax for ax in figure.axes if ax.images]
    np.testing.assert_array_equal(pictures[1].images[0].get_array(), given.best.hparams["mask"])
    # Of a small filter the start stands beside the best one, with a gap between.
    both = np.ma.filled(pictures[0].images[0].get_array(), NAN)
    np.testing.assert_array_equal(
        both, np.hstack([np.zeros((3, 3)), np.full((3, 1), NAN), given.best.hparams["filter"]])
    )
    assert pictures[0].get_xlabel() == "start, best"


def test_of_many_leaves_some_are_named_only():
    given = result(lambda t: {f"layer_{i:02}": {"a_long_name_of_a_rate": np.array(t)} for i in range(15)})
    every, left_out = panels.panels(given)
    assert len(every) == 12
    assert left_out == [f"hparams['layer_{i}']['a_long_name_of_a_rate']" for i in range(10, 15)]
    figure = given.plot()
    figure.canvas.draw()
    assert len(figure.axes) == 12
    text = " ".join(figure.get_supxlabel().split())
    assert text.startswith("not drawn: hparams['layer_10']['a_long_name_of_a_rate'], hparams['layer_11']")
    box = figure._supxlabel.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    # A leaf of many entries has its second panel only where all have a first one.
    few = result(lambda t: {f"w{i}": weights(t) for i in range(6)})
    assert len(panels.panels(few)[0]) == 8
    assert len(panels.panels(few, most=14)[0]) == 14
    assert panels.sentence([str(i) for i in range(10)]) == "not drawn: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert len(panels.short("['x']" * 20)) == 42


def test_metrics_that_are_tested_have_a_panel():
    columns = {
        "accuracy": np.linspace(0, 1, STEPS),
        "test_accuracy": np.linspace(0, 0.9, STEPS),
        "test": np.ones(STEPS),
    }
    given = result(lambda t: np.array(t), columns=columns)
    (_, loss), _, (title, metric), (own, _) = drawn(given)
    assert (title, own) == ("accuracy", "hparams")
    assert [line.get_label() for line in metric.lines] == ["validation", "test"]
    assert [line.get_label() for line in loss.lines] == ["validation", "test", "best"]
    np.testing.assert_array_equal(metric.lines[1].get_ydata(), columns["test_accuracy"])


# --- What they show -----------------------------------------------------------------------------------------


def test_axes_are_logarithmic_where_numbers_ask_for_it():
    wide = result(
        lambda t: {
            "decay": np.array(1e-5 * np.exp(6 * t)),
            "rate": np.array(0.1 + t),
            "strength": np.exp(WEIGHTS * 4 * t),
        },
        columns={"grad_norm": np.geomspace(1, 1e-6, STEPS)},
    )
    scales = [(ax.get_yscale(), ax.get_xscale()) for _, ax in drawn(wide)]
    assert scales == [
        ("linear", "linear"), ("log", "linear"), ("log", "linear"), ("linear", "linear"),
        ("log", "linear"), ("linear", "log"),
    ]  # fmt: skip
    # Weights between 0 and 1 are not, however small the least of them.
    assert {ax.get_yscale() for _, ax in drawn(result(weights))} == {"linear"}


def test_a_histogram_of_the_best_the_end_and_the_start():
    ax = drawn(result(weights), -1)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"best (step {STEPS - 1})",
        "end",
        "start (all)",
    ]
    assert list(ax.lines[0].get_xdata()) == [0.5, 0.5]
    assert sum(patch.get_height() for patch in ax.patches[:40]) == 500
    begun = drawn(result(lambda t: WEIGHTS + t), -1)
    low, high = np.quantile(WEIGHTS, (0.25, 0.75))
    span = next(p for p in begun.patches if p.get_label() == "start, middle half").get_extents()
    assert [span.x0, span.x1] == pytest.approx(begun.transData.transform([(low, 0), (high, 0)])[:, 0])


@pytest.mark.parametrize(
    ("shape", "count", "tile"),
    [
        ((4, 6), 1, (4, 6)),
        ((28, 28, 1), 1, (28, 28)),
        ((9, 9, 3), 1, (9, 9, 3)),  # colours
        ((10, 8, 8), 10, (8, 8)),
        ((10, 28, 28, 1), 10, (28, 28)),
        ((5, 12, 12, 3), 5, (12, 12, 3)),
        ((3, 3, 4, 16), 64, (3, 3)),  # a kernel, channels last
        ((16, 4, 3, 3), 64, (3, 3)),  # channels first
        ((2, 2), None, None),
        ((40, 1), None, None),
        ((2, 2, 2, 2, 2, 2), None, None),
    ],
)
def test_arrays_that_are_pictures(shape, count, tile):
    values = np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)
    found = panels._tiles(values)
    assert (found is None) == (count is None)
    if count:
        assert found.shape == (count, *tile)
        if shape == (3, 3, 4, 16):
            np.testing.assert_array_equal(found[17], values[:, :, 1, 1])


def test_pictures_of_a_leaf_are_a_mosaic_of_at_most_36():
    values = RNG.normal(size=(3, 3, 4, 16))
    ax = drawn(result(lambda t: values * t), 2)
    assert ax.get_title() == "hparams, 36 of 64"
    image = np.ma.filled(ax.images[0].get_array(), NAN)
    assert image.shape == (23, 23)
    np.testing.assert_allclose(image[:3, :3], values[:, :, 0, 0] * (1 - 1 / STEPS), rtol=1e-14)
    assert np.isnan(image[3]).all()
    # Zero is in the middle of the colours.
    assert ax.images[0].norm.vmin == -ax.images[0].norm.vmax


def test_steps_that_were_rejected_are_marked():
    nonfinite = (np.arange(STEPS) % 20 == 3).astype(int)
    marks = drawn(result(lambda t: np.array(t), columns={"nonfinite": nonfinite}), 0).collections
    assert [mark.get_label() for mark in marks] == ["rejected"]
    np.testing.assert_array_equal(marks[0].get_offsets()[:, 0], [3, 23])


def test_of_a_population_the_best_member_is_thick():
    given = result(lambda t, m: {"pair": np.array([t, m]), "weight": weights(t) / (m + 1)}, members=4)
    figure = given.plot()
    figure.canvas.draw()
    pair, band, histogram = figure.axes[2:]
    assert [line.get_linewidth() > 1 for line in pair.lines] == [False] * 6 + [True] * 2
    np.testing.assert_array_equal(band.lines[-1].get_ydata(), given.trajectory.hparams["weight"][:, 0, 2])
    best = given.best.hparams["weight"]
    assert sum(patch.get_height() for patch in histogram.patches[:40]) == best.size == 500


def test_numbers_that_are_not_finite_leave_the_rest():
    def path(t):
        return {
            "x": np.array(NAN if t > 0.5 else 1.0),
            "w": np.full(50, NAN if t > 0.5 else 1.0),
            "m": np.full((5, 5), NAN),
        }

    given = dataclasses.replace(result(path), status=Status.DIVERGED)
    given.plot().canvas.draw()
    assert [title for title, _ in drawn(given)][2:] == ["hparams['m']", "hparams['w']", "hparams['x']"]
    same = drawn(result(lambda t: np.ones(50)), -1)  # all entries are equal, and stay so
    assert max(patch.get_height() for patch in same.patches) == 50


def test_a_leaf_that_cannot_be_read_here_has_its_path(monkeypatch):
    monkeypatch.setattr(panels, "readable", lambda leaf: False)
    given = result(lambda t: {"mask": np.ones((8, 9)) * t})
    assert [title for title, _ in drawn(given)][2:] == ["hparams['mask']"]
    assert [leaf.best for leaf in panels.leaves(given)] == [None]
    assert jax.tree.leaves(given.hparams)[0].shape == (8, 9)


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = result(lambda t: np.array(t))
    for call in (given.plot, lambda: given.report(tmp_path / "run.html")):
        with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'bilevel\[plots\]'"):
            call()
    assert not list(tmp_path.iterdir())
