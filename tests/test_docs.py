"""The documentation: every command of the tutorial runs, and the API page is that of the docstrings."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import hub_server
import llmprune
import make_api_docs
from hub_server import FakeHub
from llmprune import cli

DOCS = Path(__file__).parent.parent / "docs"
TUTORIAL = (DOCS / "TUTORIAL.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that knows the user's token; the tests run in an empty folder."""
    with hub_server.serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    assert sys.argv[0] == "llmprune", f"not a command of llmprune: {line}"
    cli.main()


def test_every_command_of_the_tutorial_runs(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BLOCKS) >= 8 and {kind for kind, _ in BLOCKS} == {"bash", "python"}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "TUTORIAL.md", "exec"), {})
            continue
        for line in text.splitlines():
            run_command(line, monkeypatch)
    printed = capsys.readouterr().out
    assert "verified: all promises of llmprune.json kept" in printed
    for name in ("pruned/report.html", "comparison.html", "sensitivity/sensitivity.html", "sweep/sweep.html"):
        assert "<svg" in (tmp_path / name).read_text("utf-8")
    for repo in ("tester/pruned-demo", "tester/demo-from-python"):
        assert hub.repos[repo].private and b"perplexity" in hub.repos[repo].files["README.md"]
    for shown in re.findall(r"^```text\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE):
        for line, found in zip(shown.splitlines(), same_table(shown, printed), strict=True):
            assert first_words(line) == first_words(found)


def same_table(shown: str, printed: str) -> list[str]:
    """Return the lines that were printed where the tutorial shows `shown`; its second line, the head, tells it."""
    lines, head = printed.splitlines(), first_words(shown.splitlines()[1])
    start = [first_words(line) for line in lines].index(head) - 1
    return lines[start : start + len(shown.splitlines())]


def first_words(line: str) -> list[str]:
    """Return what does not depend on the processor: the names, no figures that were measured."""
    return [word for word in line.split() if not re.fullmatch(r"\(?[\d.]+%?\)?", word)]


def test_the_api_page_is_that_of_the_docstrings() -> None:
    assert make_api_docs.TARGET.read_text("utf-8") == make_api_docs.document(), "run scripts/make_api_docs.py"


def test_the_api_page_has_every_public_name() -> None:
    page = make_api_docs.document()
    for name in llmprune.__all__:
        assert name == "methods" or f"\n## `llmprune.{name}`\n" in page


@pytest.mark.parametrize("name", ["prune_model", "evaluate", "push_to_hub"])
def test_the_scripts_to_copy_are_short(name: str) -> None:
    script = DOCS.parent / "scripts" / f"{name}.py"
    assert len(script.read_text("utf-8").splitlines()) <= 30


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_map_of_the_code_names_every_module_and_folder_and_none_that_is_not_there() -> None:
    text, root = (DOCS / "CODE.md").read_text("utf-8"), DOCS.parent
    named = set(re.findall(r"`((?:llmprune|kernels|eval|tests)/[\w/.]*)`", text))
    package = root / "llmprune"
    modules = {f"llmprune/{path.name}" for path in package.glob("*.py") if not path.name.startswith("__")}
    folders = {f"llmprune/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert [path for path in named if not (root / path).exists()] == []
    assert modules | folders <= named
