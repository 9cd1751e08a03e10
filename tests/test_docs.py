"""The Python in README.md and docs/ runs and prints what stands below it; so do the examples.

One process for each file, without the settings of `conftest.py`, as a reader has none of them; only
compilation is made cheap as there. The blocks of a Markdown file share a namespace. A fence without a
language directly below a block holds what the block prints, and a block that prints has one; a script states
its output in its last lines, as ``# > text``. The last digit of a printed decimal may be off by one.
"""

import re
from pathlib import Path

import pytest
from scripts import as_a_reader

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE_NAMES = {
    *("README", "notation", "recipes", "adding_an_estimator", "choosing", "coming_from_jaxopt"),
    *("scaling", "checkpoints", "certificates", "stochastic", "online", "self_tuning", "fixed_points"),
    *("schedules", "populations", "regularisers", "coming_from_optuna", "scikit_learn", "papers"),
    *("seeing_a_run", "index", "getting_started", "methods", "faq", "coming_from_higher"),
    *("coming_from_betty", "claims", "peers", "benchmarks", "changelog"),
}
END_OF_BLOCK = "-- end of block --"
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def read(page: Path) -> tuple[str, list[str]]:
    """A script with the page's Python on its own line numbers, and what each block has to print."""
    script, outputs, fence, previous = [], [], None, ""
    for line in page.read_text().splitlines():
        if fence is None and line.startswith("```"):
            fence, text = line[3:].strip(), []
            shows_output = fence == "" and previous == "end of python"
            previous = ""
        elif fence is not None and line == "```":
            if fence == "python":
                outputs.append("")
                line = f"print({END_OF_BLOCK!r})"
                previous = "end of python"
            elif shows_output:
                outputs[-1] = "\n".join(text)
            script.append(line if fence == "python" else "")
            fence = None
            continue
        elif fence is not None:
            text.append(line)
        elif line:
            previous = ""
        script.append(line if fence == "python" and not line.startswith("```") else "")
    assert fence is None, f"{page.name}: a fence is not closed"
    return "\n".join(script) + "\n", outputs


def run(script: Path, cwd: Path, dropped: str = "device_count") -> str:
    """What a script prints, run as a reader would, without the flags of XLA that ``dropped`` finds."""
    done = as_a_reader(script, cwd, 300, dropped)
    assert done.returncode == 0, f"{script.name}:\n{done.stderr}"
    assert "Warning" not in done.stderr, f"{script.name}:\n{done.stderr}"
    return done.stdout


def assert_printed(printed: str, expected: str) -> None:
    printed, expected = printed.strip("\n"), expected.strip("\n")
    assert DECIMAL.sub("#", printed) == DECIMAL.sub("#", expected), f"{printed!r} instead of {expected!r}"
    for got, wanted in zip(DECIMAL.findall(printed), DECIMAL.findall(expected), strict=True):
        mantissa, _, exponent = wanted.partition("e")
        last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(got) - float(wanted)) < 1.5 * last_digit, f"{printed!r} instead of {expected!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs_and_prints_what_it_says(page, tmp_path):
    source, outputs = read(page)
    script = tmp_path / f"{page.stem}.py"
    script.write_text(source)
    *printed, rest = run(script, tmp_path).split(END_OF_BLOCK + "\n")
    assert rest == ""
    for got, expected in zip(printed, outputs, strict=True):
        assert_printed(got, expected)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_example_runs_and_prints_what_it_says(script, tmp_path):
    expected = re.findall(r"^# > ?(.*)$", script.read_text(), re.MULTILINE)
    assert expected
    # They compute more than they compile: convolutions take four times as long without optimisations.
    printed = run(script, tmp_path, "device_count|optimization_level")
    assert_printed(printed, "\n".join(expected))


def test_pages_and_examples_are_found():
    assert {page.stem for page in PAGES} >= PAGE_NAMES
    assert len(EXAMPLES) >= 3


def test_a_wrong_number_is_noticed():
    assert_printed("loss 0.124 at 3\n", "loss 0.123 at 3")
    for wrong in ("loss 0.125 at 3", "loss 0.123 at 4", "gain 0.123 at 3", "loss 0.123", ""):
        with pytest.raises(AssertionError):
            assert_printed(wrong, "loss 0.123 at 3")
