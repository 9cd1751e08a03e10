"""The command: what it refuses, and in how many words."""

import importlib
import sys
import types

import numpy as np
import pytest
from made_results import result

from bilevel import cli, result_report


def refused(argv, capsys):
    """What is said on stderr."""
    try:
        status = cli.main(argv)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    return err


def test_unknown_commands_and_options_list_those_there_are(capsys):
    assert all(name in refused(["dance"], capsys) for name in ("'dance'", "demo", "inspect", "bench"))
    assert "--fast (options: -h, --help, --output, --seed, --no-progress)" in refused(
        ["demo", "--fast"], capsys
    )
    assert "--fast (options: -h, --help, --version)" in refused(["--fast"], capsys)
    assert "PATH" in refused(["inspect"], capsys)


def test_help_names_all_commands(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("usage: bilevel", "demo", "inspect", "bench"))
    for argv, words in ((["inspect", "-h"], ["PATH", "--plot", "--html"]), (["demo", "-h"], ["--seed"])):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


# --- inspect ------------------------------------------------------------------------------------------------


def test_a_result_is_told_drawn_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(result_report, "_pictures", lambda result: ([], []))
    given = result(lambda t: {"l2": np.array(1 - t)})
    given.save(tmp_path / "run.npz")
    picture, page = tmp_path / "run.svg", tmp_path / "run.html"
    argv = ["inspect", str(tmp_path / "run.npz"), "--plot", str(picture), "--html", str(page)]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'run.npz'}: a result after 40 outer steps"
    assert f"best {given.best.value:.6g} at step 39" in out
    assert "1 first, 0.025 best, 0 last" in out
    assert lines[-2:] == [f"written: {picture}", f"written: {page}"]
    assert "<svg" in picture.read_text()
    assert "bilevel.load(&#x27;" in page.read_text()


def test_what_cannot_be_inspected(tmp_path, capsys, monkeypatch):
    assert refused(["inspect", str(tmp_path)], capsys).startswith(f"error: {tmp_path} holds no checkpoint")
    assert (
        refused(["inspect", str(tmp_path / "no")], capsys) == f"error: there is no file {tmp_path / 'no'}.\n"
    )
    assert "must end in .png, .pdf, .svg" in refused(["inspect", "x", "--plot", "x"], capsys)
    assert "must end in .html" in refused(["inspect", "x", "--html", "x.png"], capsys)
    assert "'no' is not a folder" in refused(["inspect", "x", "--html", "no/x.html"], capsys)
    result(lambda t: np.array(t)).save(tmp_path / "run.npz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["inspect", str(tmp_path / "run.npz"), "--plot", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err == "error: plots need matplotlib: pip install 'bilevel[plots]'.\n"


# --- bench --------------------------------------------------------------------------------------------------


def test_bench_hands_on_what_stands_behind_it(monkeypatch):
    asked = []
    fake = types.ModuleType("benchmarks.command")
    fake.main = lambda argv: asked.append(argv) or 7
    monkeypatch.setitem(sys.modules, "benchmarks.command", fake)
    assert cli.main(["bench", "study", "--help", "--out", "x"]) == 7
    assert cli.main(["bench"]) == 7
    assert asked == [["study", "--help", "--out", "x"], []]


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("benchmarks", "error: bilevel bench needs a checkout of the sources"),
        ("benchmarks.command", "error: bilevel bench needs a checkout of the sources"),  # another package
        ("pandas", "error: bilevel bench needs pandas, which is missing: pip install"),
    ],
)
def test_bench_without_the_sources(missing, words, monkeypatch, capsys):
    def gone(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", gone)
    err = refused(["bench", "study"], capsys)
    assert err.startswith(words)
    assert err.count("\n") == 1
