"""``python -m benchmarks.browser PAGE FOLDER``: a report in a browser without a window.

Takes pictures of it at a desk's width and at a phone's, 390 pixels, light and dark, and checks what its
script does: in a copy of the page a few more lines of script click every header, twice, and the legend, and
write what they find into the document, which the browser prints.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
WINDOWS = {"desktop": (1280, 3200), "phone": (390, 3200)}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_CHECK = """
<pre id="found"></pre><script>
const faults = [];
const value = (cell) => cell.dataset.v ?? cell.textContent;
let sorted = 0;
for (const table of document.querySelectorAll("table.sortable")) {
  const before = [...table.tBodies[0].rows].map((row) => row.textContent).sort().join("\\n");
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const numeric = head.classList.contains("num");
    for (const order of ["ascending", "descending"]) {
      head.querySelector("button").click();
      const all = [...table.tBodies[0].rows].map((row) => value(row.cells[column]));
      const rows = all.filter((entry) => entry !== "");
      const where = `${table.parentNode.ariaLabel}, ${head.textContent}, ${order}`;
      if (head.ariaSort !== order) faults.push(`${where}: aria-sort is ${head.ariaSort}`);
      if (all.slice(rows.length).some((entry) => entry !== "")) faults.push(`${where}: no value is not last`);
      for (let i = 1; i < rows.length; i++) {
        const [a, b] = order === "ascending" ? [rows[i - 1], rows[i]] : [rows[i], rows[i - 1]];
        const wrong = numeric ? Number(a) > Number(b) : a.localeCompare(b) > 0;
        if (wrong) faults.push(`${where}: ${a}, then ${b}`);
      }
      sorted += 1;
    }
  });
  const after = [...table.tBodies[0].rows].map((row) => row.textContent).sort().join("\\n");
  if (after !== before) faults.push(`${table.parentNode.ariaLabel}: rows were lost`);
}
for (const button of document.querySelectorAll(".legend button")) {
  const all = [...document.querySelectorAll(".series")];
  const own = all.filter((group) => group.dataset.method === button.dataset.method);
  for (const shown of [false, true]) {
    button.click();
    if (own.some((group) => (getComputedStyle(group).display !== "none") !== shown)) {
      faults.push(`legend, ${button.textContent}: ${shown ? "not shown" : "not hidden"}`);
    }
  }
}
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
if (wide > 0) faults.push(`the page is ${wide} pixels wider than its window`);
document.getElementById("found").textContent = JSON.stringify({ sorted, faults });
</script>
"""


def find() -> str:
    """The browser's path; ends the program where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    sys.exit(f"error: none of {', '.join(NAMES)} was found; install one with: apt-get install chromium")


def framed(text: str, width: int, height: int) -> str:
    """A page that shows another in a frame, as a window of a browser is never narrower than 500 pixels.

    What the inner page writes into the element ``found`` stands in the outer one's ``said``.
    """
    return f"""<!doctype html><body style="margin:0"><pre id="said" hidden></pre>
<iframe srcdoc="{html.escape(text)}" style="border:0;width:{width}px;height:{height}px"></iframe><script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const found = event.target.contentDocument.getElementById("found");
  document.getElementById("said").textContent = found ? found.textContent : "";
}});</script></body>"""


def opened(text: str, width: int, height: int, *arguments: str) -> str:
    """What the browser prints for a page, as a new user."""
    with tempfile.TemporaryDirectory(prefix="browser-") as folder:
        page = Path(folder, "page.html")
        page.write_text(framed(text, width, height), encoding="utf-8")
        command = [
            find(), *FLAGS, f"--user-data-dir={folder}/user", f"--window-size={width},{height}",
            "--virtual-time-budget=5000", *arguments, page.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def check(text: str, width: int) -> tuple[int, list[str]]:
    """How many orders of columns were tried, and what was wrong, in words."""
    printed = opened(text.replace("</body>", f"{_CHECK}</body>"), width, 900, "--dump-dom")
    found = re.search(r'<pre id="said" hidden="">(.*?)</pre>', printed, re.DOTALL)
    if not found or not found[1]:
        return 0, ["the page's script did not run to its end"]
    told = json.loads(html.unescape(found[1]))
    return told["sorted"], told["faults"]


def pictures(text: str, folder: Path) -> list[Path]:
    """Of both widths, light and dark."""
    paths = []
    for name, (width, height) in WINDOWS.items():
        for theme, number in (("light", 1), ("dark", 0)):
            paths.append((folder / f"{name}-{theme}.png").resolve())
            flag = f"--blink-settings=preferredColorScheme={number}"
            opened(text, width, height, flag, f"--screenshot={paths[-1]}")
    return paths


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.browser", description="Check a report in a browser."
    )
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    text, faults = args.page.read_text(encoding="utf-8"), []
    for path in pictures(text, args.folder):
        print(f"  {path}")
    for name, (width, _) in WINDOWS.items():
        tried, found = check(text, width)
        print(f"  {name}: {tried} orders of columns tried, {len(found)} faults")
        faults += found
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
