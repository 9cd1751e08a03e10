"""``python -m benchmarks.claims [--page docs/claims.md]``: what became of the claims in ``claims.json``.

An entry of ``claims.json`` says whose claim it is, the command that tests it at a small size, and what was
measured when. A check is a figure and what was asked of it before, as ``"<= 1e-5"`` or ``"== DIVERGED"``. The
verdict follows from the checks, by `verdict`; nobody writes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
from collections.abc import Sequence
from pathlib import Path

ENTRIES = Path(__file__).parent / "claims.json"
HOLDS, IN_PART, NOT_HERE, NOT_MEASURED = "holds", "holds in part", "does not hold here", "not measured"
_ASKED = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
_PAGE = """\
# Claims of the literature

The headline claims of the papers whose methods are here, each at the size of minutes on two CPU cores. A
verdict is about the claim at this size and about nothing else: most papers work with networks a thousand
times larger.

It follows from the checks: a claim *holds* where all of them are met, *holds in part* where some are, *does
not hold here* where none is, and is *not measured* where there is no figure on record. Figures are those of
the commit named; later ones may move them in the last digit. `python -m benchmarks.claims --page
docs/claims.md` writes this page from [benchmarks/claims.json](../benchmarks/claims.json). [Further
papers](papers.md) has 17 problems of papers whose methods are no part of the library.
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """A figure, and what it had to be."""

    what: str
    got: float | str
    asked: str

    @property
    def met(self) -> bool:
        sign, _, wanted = self.asked.partition(" ")
        if sign not in _ASKED or not wanted:
            raise ValueError(f"asked is a sign of {[*_ASKED]} and a value, got {self.asked!r}.")
        return bool(_ASKED[sign](self.got, wanted if isinstance(self.got, str) else float(wanted)))


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim: ``title`` of a section, its ``paper``, what was done, and where the figures are from."""

    title: str
    paper: str
    claim: str
    command: str
    experiment: str = ""
    date: str = ""
    commit: str = ""
    note: str = ""
    checks: tuple[Check, ...] = ()


def load(path: Path = ENTRIES) -> tuple[Claim, ...]:
    """All entries, in order."""
    return tuple(
        Claim(**{**entry, "checks": tuple(Check(**check) for check in entry.get("checks", ()))})
        for entry in json.loads(path.read_text())
    )


def verdict(claim: Claim) -> str:
    """By the rule that the page states."""
    met = [check.met for check in claim.checks]
    if not met:
        return NOT_MEASURED
    return HOLDS if all(met) else IN_PART if any(met) else NOT_HERE


def page(claims: Sequence[Claim]) -> str:
    """Markdown: a table of all, and a section for each."""
    verdicts = [verdict(claim) for claim in claims]
    counts = [
        f"{verdicts.count(kind)} {words}"
        for kind, words in ((HOLDS, "hold"), (IN_PART, "hold in part"), (NOT_HERE, "do not hold here"))
    ]
    summary = f"Of {len(claims)} claims {', '.join(counts)}; {verdicts.count(NOT_MEASURED)} are not measured."
    lines = [_PAGE, summary, "", "| claim | of | verdict |", "|---|---|---|"]
    lines += [
        f"| [{claim.title}](#{anchor(claim.title)}) | {claim.paper} | {verdict(claim)} |" for claim in claims
    ]
    for claim in claims:
        lines += ["", f"## {claim.title}", "", f"{claim.paper}: {claim.claim}"]
        if claim.experiment:
            lines += ["", claim.experiment]
        if claim.checks:
            lines += ["", "| | measured | asked | |", "|---|---|---|---|"]
            lines += [
                f"| {check.what} | {check.got} | {check.asked} | {'met' if check.met else 'not met'} |"
                for check in claim.checks
            ]
        ending = f"**{verdict(claim).capitalize()}.**" + f" {claim.note}" * bool(claim.note)
        source = f" ({claim.date}, {claim.commit})" if claim.commit else ""
        lines += ["", f"{ending} `{claim.command}`{source}"]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """As Markdown makes them of headings."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="write the page there")
    args = parser.parse_args(argv)
    claims = load()
    if args.page is not None:
        args.page.write_text(page(claims))
    for claim in claims:
        print(f"{verdict(claim):20} {claim.title}")


if __name__ == "__main__":
    main()
