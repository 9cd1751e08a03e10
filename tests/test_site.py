"""Pages hold together: links and anchors exist, every page and public name has its place, claims are current.

The site itself is built by ``make docs-test``. Here are the same questions to the Markdown, in seconds.
"""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import bilevel
from benchmarks import __main__ as benchmarks_main
from benchmarks import claims

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("notebooks/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|data):: ([\w.]+)", re.MULTILINE)
# Imported by name, not from `bilevel`.
BY_NAME = ("bilevel.nn", "bilevel.nn.linen", "bilevel.nn.nnx", "bilevel.sklearn")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {claims.anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def test_links_are_found():
    assert sum(len(LINK.findall(page.read_text())) for page in PAGES) > 100
    assert "where-to-go" in anchors(ROOT / "README.md")


def test_every_page_is_in_the_tables_of_contents():
    tables = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.M | re.S)
    listed = [line for table in tables for line in table.splitlines() if line and not line.startswith(":")]
    assert len(listed) == len(set(listed))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} - {"index"}
    assert set(listed) == pages


def public_names() -> dict[str, object]:
    """What users may import, by its full name; the names of modules are those of what is in them."""
    spaces = [*BY_NAME, *(f"bilevel.{n}" for n in bilevel.__all__ if inspect.ismodule(getattr(bilevel, n)))]
    names = {f"bilevel.{n}": getattr(bilevel, n) for n in bilevel.__all__ if f"bilevel.{n}" not in spaces}
    for space in spaces:
        module = importlib.import_module(space)
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", None) == space and n[0] != "_"]
        names |= {f"{space}.{name}": getattr(module, name) for name in getattr(module, "__all__", own)}
    return names


def test_the_reference_has_every_public_name_and_no_other():
    documented = DIRECTIVE.findall("".join(page.read_text() for page in (DOCS / "reference").glob("*.md")))
    assert len(documented) == len(set(documented))
    public = public_names()
    assert set(documented) <= set(public)
    # Some have two names, and one entry.
    there = {id(public[name]) for name in documented}
    assert {name for name, x in public.items() if id(x) not in there} == set()


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    example = re.search(r"## Example.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len(example.splitlines()) <= 25
    assert (DOCS / "images" / "cleaning.png").stat().st_size < 100_000


def test_claims_are_those_of_the_file():
    assert (DOCS / "claims.md").read_text() == claims.page(claims.load())


def test_commands_of_claims_exist():
    known = {*benchmarks_main.NAMES, *benchmarks_main.LONG}
    for claim in claims.load():
        program, *rest = claim.command.split()
        if program == "pytest":
            assert (ROOT / rest[0]).is_file(), claim.command
        elif program == "python":
            assert rest[:2] == ["-m", "benchmarks"]
            assert rest[2] in known, claim.command
        else:
            assert claim.command == "bilevel demo"
        # A figure has its commit, and what has none says nothing.
        assert bool(claim.checks) == bool(claim.commit) == bool(claim.date), claim.title


def test_verdicts_follow_from_the_checks():
    def of(*asked):
        checks = tuple(claims.Check("", 0.5, text) for text in asked)
        return claims.verdict(claims.Claim("", "", "", "", checks=checks))

    assert of() == claims.NOT_MEASURED
    assert of("< 0.6", "<= 0.5", "== 0.5", "> 0.4", ">= 0.5") == claims.HOLDS
    assert of("< 0.5", "> 0.4") == claims.IN_PART
    assert of("< 0.5", "> 0.5", "== 1") == claims.NOT_HERE
    assert claims.Check("", "DIVERGED", "== DIVERGED").met
    assert not claims.Check("", "STALLED", "== DIVERGED").met
    with pytest.raises(ValueError, match="asked"):
        _ = claims.Check("", 1.0, "about 1").met


def test_faults_of_a_built_site_are_found(tmp_path):
    spec = importlib.util.spec_from_file_location("check_site", DOCS / "check_site.py")
    check_site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_site)
    assert check_site.faults(tmp_path) == [f"{tmp_path}: no pages"]
    page = tmp_path / "a.html"
    page.write_text(
        '<p id="here"></p><a href="#here">1</a><a href="https://elsewhere.org">2</a><img src="a.html">'
    )
    assert check_site.faults(tmp_path) == []
    page.write_text(
        '<a href="#gone">1</a><a href="gone.html">2</a><img src="b.png">'
        '<script src="https://cdn.org/x.js"></script>'
    )
    (tmp_path / "a.css").write_text("@import url(https://fonts.org/x.css);")
    assert len(check_site.faults(tmp_path)) == 5
