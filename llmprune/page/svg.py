"""Figures as SVG text: lines, points and bars on labelled axes; the colours come from the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 450, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 42
_BAR, _BAR_LABEL = 26, 130
COLOURS = 8  # classes c0 to c7 of the style sheet

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one name; `labels` are shown where a pointer rests on a point.

    `colour` None is that of the series' place in its figure.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    line: bool = True
    marks: bool = True
    colour: int | None = None

    def style(self, place: int) -> str:
        """Return the class that colours the series, the one at `place` in its figure."""
        return f"c{(place if self.colour is None else self.colour) % COLOURS}"


@dataclass(frozen=True)
class Axis:
    """A labelled axis from `low` to `high`."""

    label: str
    low: float
    high: float
    format: Format
    log: bool = False
    whole: bool = False

    @classmethod
    def around(
        cls, label: str, values: Sequence[float], format: Format, zero: bool = False, log: bool = False,
        whole: bool = False,
    ) -> "Axis":  # fmt: skip
        """Return an axis that holds all `values`, with a margin; and 0 where `zero` says so, at its foot if none is below."""
        low, high = min(values), max(values)
        if log:
            return cls(label, low / 1.15, high * 1.15, format, log=True)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        return cls(label, 0.0 if zero and not low else low - margin, high + margin, format, whole=whole)

    def place(self, value: float) -> float:
        """Return where between the ends, from 0 to 1, a value lies."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return the values to mark: round ones, about five."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / 5)
        step = max(step, 1.0) if self.whole else step
        slack = 1e-9 * (self.high - self.low) / step  # for what is at an end but for rounding
        first = math.ceil(self.low / step - slack)
        return [index * step for index in range(first, math.floor(self.high / step + slack) + 1)]


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], names: bool = False) -> str:
    """Return lines or points on two axes; `names` writes the points' labels beside them."""
    parts = [_grid(x, y)]
    for index, entry in enumerate(series):
        places = [(_x(x, a), _y(y, b)) for a, b in entry.points]
        if entry.line and len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="{entry.style(index)}" points="{path}"/>')
        if entry.marks:
            parts += [
                _mark(entry.style(index), place, label) for place, label in zip(places, _labels(entry), strict=True)
            ]
        if names:
            parts += [_name(place, label) for place, label in zip(places, entry.labels, strict=False)]
    return _svg(title, HEIGHT, parts)


def bars(title: str, rows: Sequence[tuple[str, float]], format: Format) -> str:
    """Return one horizontal bar a row, with its value."""
    top = max((value for _, value in rows), default=0.0) or 1.0
    room = WIDTH - _BAR_LABEL - 70
    parts = []
    for index, (name, value) in enumerate(rows):
        y, length = _BAR * index + 4, room * value / top
        parts += [
            f'<text class="name" x="{_BAR_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="c0" x="{_BAR_LABEL}" y="{y}" width="{max(length, 1):.1f}" height="{_BAR - 8}"/>',
            f'<text x="{_BAR_LABEL + length + 6:.1f}" y="{y + 14}">{escape(format(value))}</text>',
        ]
    return _svg(title, _BAR * len(rows) + 4, parts)


def steps(edges: Sequence[float], counts: Sequence[float]) -> list[tuple[float, float]]:
    """Return the outline of a histogram as points."""
    return [
        point
        for left, right, count in zip(edges, edges[1:], counts, strict=False)
        for point in ((left, count), (right, count))
    ]


def legend(series: Sequence[Series]) -> str:
    """Return the names of the series with their colours, as HTML."""
    items = "".join(
        f'<li><i class="{entry.style(index)}"></i>{escape(entry.name)}</li>' for index, entry in enumerate(series)
    )
    return f'<ul class="legend">{items}</ul>'


def plain(value: float) -> str:
    """Return a number in four figures at most."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.4g} %"


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _grid(x: Axis, y: Axis) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
    for value in y.ticks():
        place = _y(y, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {place:.1f}H{right}"/>')
        text = escape(y.format(value))
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    for value in x.ticks():
        text = escape(x.format(value))
        parts.append(f'<text x="{_x(x, value):.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    middle, side = (_LEFT + right) / 2, (_TOP + bottom) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(
        f'<text class="name" transform="translate(11 {side}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
    )
    return "".join(parts)


def _labels(series: Series) -> Sequence[str]:
    return series.labels or [series.name] * len(series.points)


def _mark(style: str, place: tuple[float, float], label: str) -> str:
    return (
        f'<circle class="{style}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.2">'
        f"<title>{escape(label)}</title></circle>"
    )


def _name(place: tuple[float, float], label: str) -> str:
    right = place[0] > 0.7 * WIDTH
    x, anchor = (place[0] - 7, "end") if right else (place[0] + 7, "start")
    return f'<text x="{x:.1f}" y="{place[1] - 5:.1f}" text-anchor="{anchor}">{escape(label)}</text>'


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9)))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low <= value <= high] or [low, high]
