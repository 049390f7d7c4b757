"""The frame of a page, and its tables: HTML with the style sheet inside and nothing outside."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from llmprune.page import png
from llmprune.runs import replace_text


def document(title: str, sections: Sequence[str]) -> str:
    """Return a whole page; the policy in its head forbids the browser to fetch anything."""
    style = (files("llmprune.page") / "style.css").read_text("utf-8")
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write(path: Path, page: str) -> Path:
    """Write a page, and its figures as PNG files where that is possible; return where it is."""
    replace_text(path, page)
    if png.can_draw():
        png.write_figures(path)
    return path


def figure(title: str, picture: str, caption: str, legend: str = "") -> str:
    """Return a picture with its heading, its legend, and what it shows."""
    return f"<figure><h3>{escape(title)}</h3>{legend}{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(title: str, parts: Sequence[str]) -> str:
    """Return a section of figures side by side, or nothing where there is none."""
    shown = "\n".join(part for part in parts if part)
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f'{heading}<div class="figures">\n{shown}\n</div>' if shown else ""


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Return the main figures in large print, each with what it is."""
    items = "".join(f"<li><b>{escape(value)}</b>{escape(name)}</li>" for name, value in facts)
    return f'<ul class="tiles">{items}</ul>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls sideways where the page is narrow."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def or_empty(value: float | None, form: str) -> str:
    """Return a figure in a format such as `.3f`, nothing where there is none."""
    return "" if value is None else format(value, form)


def bullets(title: str, lines: Sequence[str]) -> str:
    """Return a section with one point a line, or nothing where there is none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{escape(title)}</h2>\n<ul>{items}</ul>" if items else ""
