"""``python docs/check_site.py FOLDER``: the built site leads nowhere that is not there, and fetches nothing.

Links between its pages and to anchors in them exist; scripts, styles, fonts and pictures are its own. Exits
with 1 and a line for each fault.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, by tag: the attribute, as <a href> waits for a click.
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
# Of <link>, these are hints and addresses, not fetched.
HINTS = {"canonical", "prev", "next", "index", "search", "author"}
REMOTE_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """Anchors, links and fetched addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in FETCHED and found.get(FETCHED[tag]) and not HINTS & set((found.get("rel") or "").split()):
            self.fetched.append(found[FETCHED[tag]])


def faults(folder: Path) -> list[str]:
    """A line for each thing that is wrong."""
    folder = folder.resolve()
    pages = {path: Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    out = [] if pages else [f"{folder}: no pages"]
    for path, page in pages.items():
        name = path.relative_to(folder)
        out += [f"{name}: {fault}" for fault in _of_page(path, page, pages)]
    for style in sorted(folder.rglob("*.css")):
        if REMOTE_STYLE.search(style.read_text()):
            out.append(f"{style.relative_to(folder)}: fetches from elsewhere")
    return out


def _of_page(path: Path, page: Page, pages: dict[Path, Page]):
    for address in page.fetched:
        parts = urlsplit(address)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc:
            yield f"fetches {address}"
        elif not (path.parent / unquote(parts.path)).is_file():
            yield f"no file {address}"
    for address in page.links:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file():
            yield f"no page {address}"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"no anchor {address}"


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python docs/check_site.py FOLDER", file=sys.stderr)
        return 2
    found = faults(Path(argv[0]))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
