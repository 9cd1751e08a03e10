"""Pictures of the report, as SVG that takes its colours from the page: lines, bands, logarithmic axes."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 42
# What is closer to the lowest known is drawn there.
FLOOR = 1e-4
_SUFFIX = "_tuned"


class Axis(NamedTuple):
    """From the lowest to the highest value on a line of pixels, linear or by logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def at(self, value):
        """Pixels of values; outside, those of the ends."""
        low, high, value = (
            np.log10(x) if self.log else x for x in (self.low, self.high, self.clipped(value))
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def clipped(self, value):
        """Within the ends; what is not a number is infinite."""
        return np.clip(
            np.nan_to_num(np.asarray(value, float), nan=np.inf, posinf=np.inf), self.low, self.high
        )

    def ticks(self) -> list[float]:
        """Powers of ten within the ends, at most six of them; or fifths."""
        if not self.log:
            return list(np.linspace(self.low, self.high, 6))
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first + 1) / 6)))]


def log_axis(values: Sequence[float], start: float, end: float, least: float = 0.0) -> Axis:
    """Around all values; a decade at least."""
    positive = [value for value in values if np.isfinite(value) and value > 0]
    low = max(min(positive, default=1.0), least or 1e-12)
    high = max(max(positive, default=1.0), 10 * low)
    return Axis(least or low, max(high, 10 * least), start, end)


def name_classes(method: str) -> str:
    """The classes by which the page colours a method, and dashes the tuned ones."""
    base = method.removesuffix(_SUFFIX)
    return f"c-{html.escape(base)}" + (" tuned" if method != base else "")


def steps(x: np.ndarray, y: np.ndarray) -> str:
    """A path that keeps each value until the next one, without points that change nothing."""
    path, last = f"M{x[0]:.1f} {y[0]:.1f}", f"{y[0]:.1f}"
    for at, value in zip(x[1:], y[1:], strict=True):
        if f"{value:.1f}" != last:
            last = f"{value:.1f}"
            path += f"H{at:.1f}V{last}"
    return path + f"H{x[-1]:.1f}"


def _back(x: np.ndarray, y: np.ndarray) -> str:
    """The same way from its end to its start, as the rest of a closed path."""
    path, last = f"L{x[-1]:.1f} {y[-1]:.1f}", y[-1]
    for at, value in zip(x[::-1], y[::-1], strict=True):
        if f"{value:.1f}" != f"{last:.1f}":
            path, last = path + f"V{value:.1f}", value
        path += f"H{at:.1f}"
    return _merged(path) + "Z"


def _merged(path: str) -> str:
    """Without horizontal moves that another one follows."""
    parts: list[str] = []
    for part in path.replace("H", "\nH").replace("V", "\nV").split("\n"):
        if parts and part[0] == "H" and parts[-1][0] == "H":
            parts.pop()
        parts.append(part)
    return "".join(parts)


def curves(bands: Mapping[str, tuple], x_label: str, within: float) -> str:
    """Medians and quartiles of the excess of several methods against what they cost."""
    x = log_axis([v for at, *_ in bands.values() for v in (at[0], at[-1])], LEFT, WIDTH - RIGHT)
    tops = [v for _, _, middle, _ in bands.values() for v in middle]
    y = log_axis(tops, HEIGHT - BOTTOM, TOP, least=FLOOR)
    marks = [_series(name, x.at(at), *(y.at(line) for line in lines)) for name, (at, *lines) in bands.items()]
    line = y.at(within)
    rule = f'<path class="rule" d="M{LEFT} {line:.1f}H{WIDTH - RIGHT}"/>'
    return _frame(x, y, x_label, "above the lowest known", _share, rule + "".join(marks))


def _series(name: str, x: np.ndarray, low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> str:
    band = steps(x, low) + _back(x, high)
    return (
        f'<g class="series {name_classes(name)}" data-method="{html.escape(name)}">'
        f'<title>{html.escape(name)}</title><path class="band" d="{band}"/>'
        f'<path class="line" d="{steps(x, middle)}"/>'
        f'<circle cx="{x[-1]:.1f}" cy="{middle[-1]:.1f}" r="2.6"/></g>'
    )


def profiles(found: Mapping[str, tuple[np.ndarray, np.ndarray]], x_label: str) -> str:
    """Shares within a factor of the least cost."""
    x = log_axis([at[-1] for at, _ in found.values()] + [1.0], LEFT, WIDTH - RIGHT)
    y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, log=False)
    marks = [
        f'<g class="series {name_classes(name)}" data-method="{html.escape(name)}">'
        f'<title>{html.escape(name)}</title><path class="line" d="{steps(x.at(at), y.at(share))}"/></g>'
        for name, (at, share) in found.items()
    ]
    return _frame(x, y, x_label, "share of problems and seeds", _share, "".join(marks))


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, y_text, inside: str) -> str:
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y_text(tick)}</text>')
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_plain(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>'
    )
    label = html.escape(f"{y_label}, by {x_label}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{inside}</svg>'
    )


def _plain(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    return f'10<tspan dy="-4" font-size="9">{round(math.log10(value))}</tspan>'


def _share(value: float) -> str:
    return f"{100 * value:g} %" if value < 10 else f"{_plain(value)} x"
