"""The picture of a benchmark: tokens a second, dense beside sparse, as one SVG file."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from llmprune.page.svg import plain

_ROOM, _LEFT, _BAR, _GAP = 420, 120, 22, 34
_COLOURS = {"dense": "#8a8f98", "sparse": "#2a6fdb"}
_STYLE = "text{font:12px sans-serif;fill:#222}.whisker{stroke:#222}.roofline{stroke:#c0392b;stroke-dasharray:4 3}"


@dataclass(frozen=True)
class Bar:
    """A median with the 20th and 80th percentile around it, and where the roofline lies, if it has one."""

    side: str
    median: float
    p20: float
    p80: float
    roofline: float | None = None


def picture(title: str, panels: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Return a file that shows each panel's bars on an axis of their own."""
    parts, y = [f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>'], 40
    for name, bars in panels:
        parts.append(f'<text x="8" y="{y + 12}">{escape(name)}</text>')
        scale = _ROOM / max(value for bar in bars for value in (bar.p80, bar.roofline or 0))
        for bar in bars:
            y += _BAR
            parts += _drawn(bar, y, scale)
        y += _GAP
    parts.append(
        f'<text x="8" y="{y}">Bars: medians; whiskers: 20th to 80th percentile; dashed: what reading the linear layers '
        "alone would allow.</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="660" height="{y + 12}" role="img">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _drawn(bar: Bar, y: int, scale: float) -> list[str]:
    middle, low, high = y + _BAR // 2 - 2, _LEFT + bar.p20 * scale, _LEFT + bar.p80 * scale
    parts = [
        f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">{bar.side}</text>',
        f'<rect x="{_LEFT}" y="{y}" width="{bar.median * scale:.1f}" height="{_BAR - 4}" fill="{_COLOURS[bar.side]}"/>',
        f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"/>',
        f'<text x="{max(high, _LEFT + bar.median * scale) + 8:.1f}" y="{middle + 4}">{plain(bar.median)}</text>',
    ]
    if bar.roofline is not None:
        parts.append(f'<path class="roofline" d="M{_LEFT + bar.roofline * scale:.1f} {y}v{_BAR - 4}"/>')
    return parts
