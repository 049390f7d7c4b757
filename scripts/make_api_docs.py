"""Write docs/API.md from the docstrings of what `import llmprune` offers.

python scripts/make_api_docs.py
"""

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any

import llmprune
from llmprune import methods

TARGET = Path(__file__).parent.parent / "docs" / "API.md"
INTRODUCTION = """# The public API

Written by `scripts/make_api_docs.py` from the docstrings. Every error is an `llmprune.LlmpruneError`, with one line
that names the thing, the cause and the way out."""
_SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:")
_WIDEST = 100


def document() -> str:
    """Return the whole page."""
    names = sorted((name for name in llmprune.__all__ if name != "methods"), key=str.lower)
    listed = "\n".join(f"- `{name}`: {summary(methods.get(name))}" for name in methods.names())
    return "\n\n".join([INTRODUCTION, *map(entry, names), f"## Methods\n\n{listed}"]) + "\n"


def entry(name: str) -> str:
    """Return the section of one public name: how it is called, its docstring, and a class's own public members."""
    thing = getattr(llmprune, name)
    parts = [f"## `llmprune.{name}`", code(head(name, thing)), text(thing)]
    for member in vars(thing) if inspect.isclass(thing) else ():
        found = getattr(thing, member)
        if member.startswith("_") or not inspect.getdoc(found):
            continue
        if isinstance(found, property):
            parts += [f"### `{name}.{member}`", text(found)]
        elif inspect.isroutine(found):
            parts += [f"### `{name}.{member}`", code(head(member, found)), text(found)]
    return "\n\n".join(parts)


def head(name: str, thing: Any) -> str:
    """Return a function's parameters as its source has them, the fields of a dataclass, or what makes another class."""
    if inspect.isclass(thing) and "__init__" in vars(thing) and "__dataclass_params__" not in vars(thing):
        return head(name, thing.__init__).removesuffix(" -> None")
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    if isinstance(node, ast.ClassDef):
        return call(name, [ast.unparse(part) for part in node.body if _is_field(part)], "")
    assert isinstance(node, ast.FunctionDef)
    parameters = [spaced(text) for text in split(ast.unparse(node.args)) if text not in ("self", "cls")]
    return call(name, parameters, f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _is_field(part: ast.stmt) -> bool:
    """Say whether a statement of a dataclass is a field that callers give."""
    return isinstance(part, ast.AnnAssign) and not ast.unparse(part.annotation).startswith("ClassVar")


def call(name: str, parameters: list[str], result: str) -> str:
    """Return a call, one parameter a line where they do not fit on one."""
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= _WIDEST:
        return line
    inside = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{name}(\n{inside}){result}"


def split(parameters: str) -> list[str]:
    """Split at the commas that lie in no bracket."""
    found, depth = [""], 0
    for letter in parameters:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def spaced(parameter: str) -> str:
    """Return an annotated parameter with spaces around its default, which `ast` leaves out."""
    name, equals, default = parameter.partition("=")
    return f"{name} = {default}" if equals and ":" in name else parameter


def text(thing: Any) -> str:
    """Return a docstring as Markdown: the entries of its sections as lists."""
    return "\n".join(map(line_of, (inspect.getdoc(thing) or "").splitlines()))


def line_of(line: str) -> str:
    """Return one line of a docstring as Markdown."""
    if line in _SECTIONS:
        return f"**{line[:-1]}**\n"
    if not line.startswith("    "):
        return line
    name, colon, rest = line[4:].partition(": ")
    return f"- `{name}`: {rest}" if colon and not name.startswith(" ") else f"  {line.strip()}"


def code(lines: str) -> str:
    """Return a block of Python."""
    return f"```python\n{lines}\n```"


def summary(method: Any) -> str:
    """Return the first line of a method's module, and its hyper-parameters."""
    fields = ", ".join(f"`{field.name}={field.default}`" for field in dataclasses.fields(method))
    first = (inspect.getdoc(inspect.getmodule(type(method))) or "").splitlines()[0]
    return f"{first} {f'Options: {fields}.' if fields else ''}".strip()


if __name__ == "__main__":
    TARGET.write_text(document(), "utf-8")
    print(f"written to {TARGET}")
