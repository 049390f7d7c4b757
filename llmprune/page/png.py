"""The figures of a page as PNG files, for slides and papers: drawn from the page itself, so that both always agree.

It takes resvg, a renderer of SVG without any dependency, which is an extra: `pip install 'llmprune[png]'`.
"""

import importlib.util
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

from llmprune.page.svg import WIDTH

MISSING = "no PNG files: they take resvg, pip install 'llmprune[png]'"
_SCALE = 3
_LINE, _LETTER = 20, 7.2  # pixels: of a line of the legend, and of one of its letters at most
_FIGURE = re.compile(r"<figure>.*?</figure>", re.DOTALL)
_VARIABLE = re.compile(r"var\((--\w+)\)")


def can_draw() -> bool:
    """Say whether what draws PNG files is installed."""
    return importlib.util.find_spec("resvg_py") is not None


def write_figures(page: Path) -> list[Path]:
    """Draw every figure of a page into a folder beside it that has its name, and return the files.

    Files of an earlier page that has had other figures are left where they are.
    """
    import resvg_py

    folder, style = page.with_suffix(""), _style()
    written = []
    for text in _FIGURE.findall(page.read_text("utf-8")):
        name, picture = standalone(text, style)
        folder.mkdir(exist_ok=True)
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=picture, zoom=_SCALE, background="#ffffff")))
    return written


def standalone(figure: str, style: str) -> tuple[str, str]:
    """Return a file name for a figure of a page, and the figure with its title and its legend as one SVG text."""
    found = ElementTree.fromstring(figure)
    title, svg = str(found.findtext("h3")), found.find("svg")
    assert svg is not None
    names = [(str(item[0].get("class")), str(item[0].tail)) for item in found.iterfind("ul/li")]
    parts = [f'<text class="title" x="4" y="18">{escape(title)}</text>']
    x, y = 4.0, 38
    for colour, name in names:
        width = 22 + _LETTER * len(name)
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + _LINE
        parts.append(f'<rect class="{colour}" x="{x:.0f}" y="{y - 10}" width="11" height="11"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="{y}">{escape(name)}</text>')
        x += width
    top = y + 12 if names else 28
    height = float(str(svg.get("viewBox")).split()[3])
    drawing = "".join(ElementTree.tostring(part, "unicode") for part in svg)
    size = f'width="{WIDTH}" height="{height + top:.0f}" viewBox="0 0 {WIDTH} {height + top:.0f}"'
    return re.sub(r"\W+", "-", title.lower()).strip("-"), (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}'
        f'<g transform="translate(0 {top})">{drawing}</g></svg>'
    )


def _style() -> str:
    """Return the light rules of the page's style sheet that figures need, with the values of its variables."""
    text = (files("llmprune.page") / "style.css").read_text("utf-8")
    values = dict(re.findall(r"(--\w+): ([^;]+);", text[: text.index("@media")]))
    rules = [
        rule
        for rule in re.findall(r"[^{}]+\{[^{}]*\}", text)
        if re.match(r"\s*(svg text|\.axis|\.grid|polyline|\.c\d)", rule)
    ]
    resolved = _VARIABLE.sub(lambda found: values[found[1]], "".join(rules).replace("svg text", "text"))
    font = 'text { font-family: "DejaVu Sans", "Liberation Sans", Arial, sans-serif; font-size: 12px; }'
    return f"{resolved}\n{font}\ntext.title {{ fill: {values['--ink']}; font-size: 15px; font-weight: bold; }}"
