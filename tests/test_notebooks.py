"""Notebooks: each .ipynb has the cells of its .py, executed, with pictures; sources run as scripts."""

import ast
import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import as_a_reader

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
# Those that run by default: the cheapest.
CHEAP = ("01_first_steps",)
MOST_LINES, MOST_BYTES = 25, 1_000_000
CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def cells(source: Path) -> list[tuple[str, str]]:
    """Kind and text of the cells of a source in percent format."""
    parts = CELL.split(source.read_text())
    assert parts[0] == "", f"{source.name}: something stands before the first cell"
    found = []
    for mark, body in zip(parts[1::2], parts[2::2], strict=True):
        assert mark in ("", " [markdown]"), f"{source.name}: unknown cell{mark}"
        kind = "markdown" if mark else "code"
        text = body.strip("\n")
        if kind == "markdown":
            assert all(line.startswith("#") for line in text.splitlines()), f"{source.name}: code in {text!r}"
            text = "\n".join(line[1:].removeprefix(" ") for line in text.splitlines())
        found.append((kind, text))
    return found


def built(source: Path) -> dict:
    return json.loads(source.with_suffix(".ipynb").read_text())


def text_of(cell: dict, name: str = "source") -> str:
    return "".join(cell[name])


by_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def test_notebooks_are_found_and_listed():
    assert len(SOURCES) >= 10
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {source.stem for source in SOURCES}
    listed = re.findall(r"\]\((\d\d_\w+)\.ipynb\)", (FOLDER / "README.md").read_text())
    assert listed == [source.stem for source in SOURCES]


@by_source
def test_notebook_has_the_cells_of_its_source(source):
    notebook = built(source)
    assert [(cell["cell_type"], text_of(cell)) for cell in notebook["cells"]] == cells(source)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@by_source
def test_source_reads_well(source):
    kinds = cells(source)
    assert kinds[0][0] == "markdown"
    assert kinds[0][1].startswith("# ")
    assert "What to conclude" in kinds[-1][1]
    assert "Reference" in kinds[-1][1]
    for kind, text in kinds:
        if kind == "code":
            ast.parse(text)
            imports = len(re.findall(r"^(?:import|from) ", text, re.MULTILINE))
            blank = len(re.findall(r"^$", text, re.MULTILINE))
            lines = len(text.splitlines()) - imports - blank
            assert lines <= MOST_LINES, f"{lines} lines: {text[:200]}"
    links = re.findall(r"\]\(([\w.]+)\)", source.read_text())
    assert all((FOLDER / link).exists() for link in links), links


@by_source
def test_notebook_is_executed_with_pictures_and_says_nothing_of_a_machine(source):
    pictures = 0
    for number, cell in enumerate(c for c in built(source)["cells"] if c["cell_type"] == "code"):
        assert cell["execution_count"] == number + 1
        assert cell["metadata"] == {}
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output
            assert output.get("name") != "stderr", text_of(output, "text")
            png = output.get("data", {}).get("image/png")
            if png is not None:
                pictures += 1
                assert base64.b64decode(png).startswith(b"\x89PNG")
    assert pictures >= 2
    text = source.with_suffix(".ipynb").read_text()
    assert len(text) < MOST_BYTES
    assert not re.search(r"/(?:home|root|work|Users|tmp)/", text)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, id=source.stem, marks=[] if source.stem in CHEAP else [pytest.mark.thorough])
        for source in SOURCES
    ],
)
def test_source_runs_as_a_script(source, tmp_path):
    """In a process of its own, without the settings of `conftest.py` but for its quick compilation."""
    done = as_a_reader(source, tmp_path, 600)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir()), "it leaves files behind"


def test_builder_makes_what_is_there():
    if importlib.util.find_spec("jupytext") is None or importlib.util.find_spec("nbclient") is None:
        pytest.skip("needs pip install 'bilevel[notebooks]'")
    code = (
        "import build; notebook = build.read(build.sources()[0]); "
        "print([(cell.cell_type, cell.source) for cell in notebook.cells])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == cells(SOURCES[0])
