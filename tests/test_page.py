"""The report page: every figure is there and right, nothing is fetched, and a real browser draws it all."""

import base64
import copy
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llmprune
import tiny
from llmprune import cli, runs
from llmprune.allocation import kind_of
from llmprune.errors import CheckpointError, RecipeError
from llmprune.page import comparison, facts, png, run, svg, write_comparison, write_page
from llmprune.solving import magnitude_error

EVALUATION = {
    "data": "wikitext2", "length": 512, "windows": 9, "dtype": "float32", "convention": "tail dropped",
    "perplexity": 12.5, "kl_divergence": 0.125, "top1_agreement": 0.875, "dense_perplexity": 10.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The outputs of three runs on one model, one of them evaluated."""
    folder = tmp_path_factory.mktemp("models")
    dense = tiny.save(tiny.model("llama"), folder / "dense")
    made = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        out = folder / method
        llmprune.prune(dense, out, method=method, pattern="2:4", calibration=tiny.ids(), exclude="*.0.mlp.up*")
        made.append(out)
    runs.add_evaluations(made[0], [EVALUATION])
    return made


@pytest.fixture
def page(outs: list[Path], tmp_path: Path) -> str:
    return write_page(outs[0], tmp_path / "report.html").read_text("utf-8")


def pictures(page: str) -> dict[str, ElementTree.Element]:
    """Return the figures of a page by their names, parsed strictly."""
    found = (ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    return {str(picture.get("aria-label")): picture for picture in found}


def circles(picture: ElementTree.Element) -> list[ElementTree.Element]:
    return list(picture.iter("circle"))


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("config.json", "config.json would hold no such file as its name says: give a name that ends in .html"),
        ("a.html", "a.html is a folder: give the name of a file, such as a.html/figures.html"),
        ("nowhere/a.html", "nowhere/a.html cannot be written: there is no folder nowhere; make it first"),
    ],
)
def test_a_page_is_not_written_where_none_can_be(
    outs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "a.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError) as of_one:
        write_page(outs[0], to)
    with pytest.raises(RecipeError) as of_several:
        write_comparison(outs, to)
    assert str(of_one.value) == str(of_several.value) == words and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "config.json").read_text("utf-8") == "{}"


def test_the_page_has_every_figure(page: str) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert set(pictures(page)) == {
        "Output error of each matrix", "Allocation: zeros in each matrix", "Seconds in each phase",
        "Output error, against that of magnitude pruning", "Memory over the run",
        *(f"Weights of {kind}" for kind in kinds),
    }  # fmt: skip


def test_every_matrix_has_its_point_and_its_row(page: str, outs: list[Path]) -> None:
    sites = runs.read_run(outs[0])["sites"]
    marks = circles(pictures(page)["Output error of each matrix"])
    assert {str(mark[0].text) for mark in marks} == {f"{site['name']}: {site['error']:.4g}" for site in sites}
    for site in sites:
        assert f"<td>{site['name']}</td>" in page


def test_points_lie_where_the_axes_say(page: str, outs: list[Path]) -> None:
    sites = {site["name"]: site for site in runs.read_run(outs[0])["sites"]}
    marks = circles(pictures(page)["Output error of each matrix"])
    errors = [sites[str(mark[0].text).split(":")[0]]["error"] for mark in marks]
    heights = [float(mark.get("cy", 0)) for mark in marks]
    slope, bottom = numpy.polyfit(errors, heights, 1)
    assert slope < 0 and bottom == pytest.approx(svg.HEIGHT - 42, abs=0.1)  # an error of 0 is on the axis below
    assert heights == pytest.approx([slope * error + bottom for error in errors], abs=0.1)


def test_errors_are_shown_against_those_of_magnitude(page: str, outs: list[Path]) -> None:
    sites = runs.read_run(outs[0])["sites"]
    marks = circles(pictures(page)["Output error, against that of magnitude pruning"])
    shares = {f"{site['name']}: {site['error'] / site['magnitude_error']:.3f}" for site in sites}
    assert {str(mark[0].text) for mark in marks} == shares
    assert all(site["error"] < site["magnitude_error"] for site in sites)  # by SparseGPT
    by_magnitude = runs.read_run(outs[2])["sites"]
    assert all(site["error"] == pytest.approx(site["magnitude_error"], rel=1e-5) for site in by_magnitude)


def test_the_error_of_magnitude_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_TI = torch.randn(1200, 16, generator=generator), torch.randn(50, 16, generator=generator)
    gram = llmprune.Gram(16, x_TI.device)
    gram.add(x_TI, 1)
    kept_OI = weight_OI.clone().view(-1, 4)
    kept_OI.scatter_(1, kept_OI.abs().argsort(1)[:, :2], 0)
    change_O, whole_O = (((w @ x_TI.T) ** 2).sum(1) for w in (weight_OI - kept_OI.view(1200, 16), weight_OI))
    expected = float(change_O[:100].sum() / whole_O[:100].sum())
    assert magnitude_error(weight_OI[:100], gram, llmprune.NM(2, 4)) == pytest.approx(expected, rel=1e-5)
    of_every_tenth = float(change_O[::10].sum() / whole_O[::10].sum())  # 1200 rows are more than are looked at
    assert magnitude_error(weight_OI, gram, llmprune.NM(2, 4)) == pytest.approx(of_every_tenth, rel=1e-5)
    half = llmprune.Unstructured(0.5, "block")
    assert 0 < magnitude_error(weight_OI, gram, half) < magnitude_error(weight_OI, gram, llmprune.NM(2, 4))


def test_the_memory_of_every_stage_is_a_point(page: str, outs: list[Path]) -> None:
    found = runs.read_run(outs[0])
    assert list(found["memory_bytes"]) == [f"model.layers.{block}" for block in range(tiny.BLOCKS)]
    assert len(circles(pictures(page)["Memory over the run"])) == tiny.BLOCKS
    assert all(used["host"] <= found["peak_memory_bytes"]["host"] for used in found["memory_bytes"].values())


def test_no_point_lies_on_the_upper_edge(outs: list[Path]) -> None:
    found = copy.deepcopy(runs.read_run(outs[0]))
    for block, used in enumerate(found["memory_bytes"].values()):
        used["host"] = (1 << 30) + block * 1000  # about the same all along, far above zero
    heights = [float(mark.get("cy", 0)) for mark in circles(pictures(run.run_page(found, []))["Memory over the run"])]
    assert heights and all(12 + 8 < height < svg.HEIGHT / 2 for height in heights)
    assert svg.Axis.around("x", [0.0], svg.plain, zero=True).high > 0


def test_a_page_of_an_older_or_a_newer_llmprune(outs: list[Path]) -> None:
    found = copy.deepcopy(runs.read_run(outs[0]))
    found.pop("memory_bytes"), found.pop("one_pass")
    for site in found["sites"]:
        site.pop("magnitude_error")
        site["something_new"] = [1]
    found |= {"allocation": {"new": {"curve": [0.1]}}, "tuning": None}
    shown = pictures(run.run_page(found, []))
    assert "Memory over the run" not in shown and "Output error of each matrix" in shown
    assert "Zeros in each block" in pictures(comparison.comparison_page({"a": found, "b": found}))


def test_the_output_error_is_of_the_inputs_that_the_run_saw(outs: list[Path]) -> None:
    found = runs.read_run(outs[0])
    assert "from the pruned blocks before" in run.run_page(found, [])
    assert "from the dense blocks before" in run.run_page(found | {"one_pass": ["2:4"]}, [])


def test_figures_of_a_page_become_pictures_of_their_own(page: str) -> None:
    style = png._style()
    assert "var(" not in style and "#0072b2" in style
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == len(pictures(page))
    for figure in figures:
        name, text = png.standalone(figure, style)
        drawn = ElementTree.fromstring(text)
        shapes = sum(figure.count(f"<{kind} ") for kind in ("polyline", "circle", "rect"))
        legend = figure.count("<li>")
        assert re.fullmatch(r"[\w-]+", name) and text.count("<title>") == figure.count("<title>")
        kinds = ("polyline", "circle", "rect")
        assert sum(1 for part in drawn.iter() if part.tag.rpartition("}")[2] in kinds) == shapes + legend


@pytest.mark.skipif(not png.can_draw(), reason="needs resvg: pip install 'llmprune[png]'")
def test_png_files_lie_beside_the_page(outs: list[Path], tmp_path: Path) -> None:
    page = write_page(outs[0], tmp_path / "report.html").read_text("utf-8")
    files = sorted((tmp_path / "report").iterdir())
    assert len(files) == len(pictures(page))
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == 3 * svg.WIDTH


def test_without_resvg_the_command_says_what_is_missing(
    outs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(png, "can_draw", lambda: False)
    arguments = ["report", str(outs[0]), "--to", str(tmp_path / "x.html")]
    cli.cli.main(arguments, standalone_mode=False)
    assert capsys.readouterr().out.splitlines() == [f"written to {tmp_path / 'x.html'}", png.MISSING]
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_the_histograms_count_the_weights_that_are_left(outs: list[Path]) -> None:
    facts_of_run = runs.read_run(outs[0])
    from llmprune.page.weights import histograms

    for entry in histograms(outs[0], facts_of_run):
        members = [site for site in facts_of_run["sites"] if kind_of(site["name"]) == entry.kind]
        total, zeros = sum(map(facts.weights_in, members)), sum(site["zeros"] for site in members)
        assert entry.before is not None and 0.99 * total <= sum(entry.before) <= total
        assert 0.95 * (total - zeros) <= sum(entry.after) <= total - zeros


def test_without_the_base_model_the_page_says_so(outs: list[Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(outs[0], tmp_path / "out"))
    report = json.loads((out / "llmprune.json").read_text("utf-8"))
    (out / "llmprune.json").write_text(json.dumps(report | {"model": "org/nowhere"}), "utf-8")
    page = write_page(out).read_text("utf-8")
    assert "The base model does not lie on this machine" in page
    assert "Weights of q_proj" in pictures(page) and ">before<" not in page


def test_the_page_has_the_evaluation_or_says_how_to_make_one(page: str, outs: list[Path], tmp_path: Path) -> None:
    row = ["wikitext2", "12.50", "10.00", "1.250", "0.1250", "87.5 %", "512", "float32"]
    assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "--save" in write_page(outs[1], tmp_path / "other.html").read_text("utf-8")


def test_names_cannot_break_the_page(outs: list[Path]) -> None:
    strange = copy.deepcopy(runs.read_run(outs[0]))
    strange["model"] = '<script>alert("x")</script> & co'
    strange["notes"] = ["a < b"]
    found = run.run_page(strange, [])
    assert "<script" not in found and "a &lt; b" in found
    assert pictures(found)


def test_experts_have_a_figure_of_their_tokens(outs: list[Path], tmp_path: Path) -> None:
    assert "Calibration tokens that each expert saw" not in run.run_page(runs.read_run(outs[0]), [])
    dense = tiny.save(tiny.model("qwen3-moe"), tmp_path / "moe")
    llmprune.prune(dense, tmp_path / "out", method="wanda", pattern="2:4", calibration=tiny.ids())
    page = write_page(tmp_path / "out").read_text("utf-8")
    sites = [site for site in runs.read_run(tmp_path / "out")["sites"] if facts.expert_of(site) is not None]
    marks = circles(pictures(page)["Calibration tokens that each expert saw"])
    seen = {f"{site['name']}: {site['tokens']:,} tokens" for site in sites if site["tokens"]}
    assert {str(mark[0].text) for mark in marks} == seen and len(seen) > 8
    assert "Weights of gate_up_proj" in pictures(page) and ">before<" in page


def test_a_run_without_sites_still_has_a_page(outs: list[Path]) -> None:
    empty = runs.read_run(outs[0]) | {"sites": [], "timings": {}}
    assert "Nothing" in run.run_page(empty | {"evaluations": []}, [])


def test_a_comparison_keeps_errors_of_different_norms_apart(outs: list[Path], tmp_path: Path) -> None:
    page = write_comparison(outs, tmp_path / "comparison.html").read_text("utf-8")
    found = pictures(page)
    assert set(found) == {
        "Zeros in each block", "Output error by gram", "Output error by column norm", "Output error by weights",
        "Perplexity on wikitext2", "Output error, against that of magnitude pruning",
    }  # fmt: skip
    assert all(f"<td>{out.name}</td>" in page for out in outs)
    for out, norm in zip(outs, ("gram", "column norm", "weights"), strict=True):
        error = facts.mean_error(runs.read_run(out)["sites"])
        assert f"<td>{error:.4g}</td><td>{norm}</td>" in page
    assert "by different norms are not to be compared" in page
    alike = comparison.comparison_page({name: runs.read_run(outs[0]) for name in ("a", "b")})
    assert "<td>gram</td>" in alike and "by different norms" not in alike
    texts = [str(text.text) for text in found["Perplexity on wikitext2"].iter("text")]
    assert texts == ["dense", "10.00", "sparsegpt", "12.50"]


def test_runs_of_one_name_are_told_apart_by_their_folders(outs: list[Path], tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(outs[0], tmp_path / parent / "out")
    page = write_comparison([tmp_path / "a" / "out", tmp_path / "b" / "out"], tmp_path / "c.html").read_text("utf-8")
    assert str(tmp_path / "a" / "out") in page and str(tmp_path / "b" / "out") in page


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an output of llmprune"):
        write_page(tmp_path)
    with pytest.raises(CheckpointError, match="is not an output of llmprune"):
        write_comparison([tmp_path], tmp_path / "x.html")


@example(low=1e-9, span=1e-6, whole=True)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), whole=st.booleans())
@settings(max_examples=60, deadline=None)
def test_ticks_are_few_and_on_the_axis(low: float, span: float, whole: bool) -> None:
    axis = svg.Axis("x", low, low + span, svg.plain, whole=whole)
    ticks = axis.ticks()
    assert len(ticks) <= 8 and all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in ticks)
    assert whole or len(ticks) >= 2
    assert not whole or all(tick == round(tick) for tick in ticks)


@given(st.floats(1e-6, 1e5), st.floats(1.5, 1e6))
@settings(max_examples=60, deadline=None)
def test_ticks_of_a_log_axis(low: float, factor: float) -> None:
    axis = svg.Axis("x", low, low * factor, svg.plain, log=True)
    assert 1 <= len(axis.ticks()) <= 14
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks())


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
browser_here = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or not any(map(shutil.which, BROWSERS)),
    reason="needs playwright and Chromium: pip install playwright, and Chromium on the PATH (apt-get install chromium)",
)
DRAWN = """() => [...document.querySelectorAll('svg')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const shapes = [...svg.querySelectorAll('polyline, circle, rect')].filter(shape => {
    const box = shape.getBoundingClientRect(), style = getComputedStyle(shape);
    const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1
      && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
    return inside && box.width + box.height > 0 && (style.fill !== 'none' || style.stroke !== 'none');
  });
  const all = svg.querySelectorAll('polyline, circle, rect').length;
  return {name: svg.getAttribute('aria-label'), width: frame.width, height: frame.height, shapes: shapes.length, all};
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next(path for path in map(shutil.which, BROWSERS) if path)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@browser_here
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_every_figure_and_fetches_nothing(
    browser: Any, outs: list[Path], tmp_path: Path, width: int, scheme: str
) -> None:
    files = [write_page(outs[0], tmp_path / "report.html"), write_comparison(outs, tmp_path / "comparison.html")]
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for file in files:
        page = context.new_page()
        fetched: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request, fetched=fetched: fetched.append(request.url))
        page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
        page.goto(file.as_uri())
        figures = page.evaluate(DRAWN)
        assert len(figures) == len(pictures(file.read_text("utf-8"))) > 4
        for figure in figures:
            assert figure["width"] > 300 and figure["height"] > 20, figure
            assert figure["shapes"] == figure["all"] > 0, figure
        assert fetched == [file.as_uri()] and complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    context.close()


@browser_here
def test_paper_shows_every_matrix(browser: Any, outs: list[Path], tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(write_page(outs[0], tmp_path / "report.html").as_uri())
    tables, sites = page.locator("details .wide"), runs.read_run(outs[0])["sites"]
    assert tables.count() == 2 and not tables.nth(0).is_visible() and not tables.nth(1).is_visible()
    page.emulate_media(media="print")
    for place, row in ((0, "model.layers.0.mlp.up_proj.weight"), (1, sites[-1]["name"])):
        cell = tables.nth(place).get_by_text(row, exact=True)
        assert cell.is_visible() and cell.bounding_box()["height"] > 5
    page.close()


@browser_here
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_where_a_table_goes_on(browser: Any, outs: list[Path], tmp_path: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme=scheme)
    page.goto(write_comparison(outs, tmp_path / "comparison.html").as_uri())
    table = page.locator(".wide").first
    beyond = table.evaluate("part => part.scrollWidth - part.clientWidth")
    assert beyond > 100
    paper = 255 if scheme == "light" else 20
    for place, shaded in ((0, [False, True]), (beyond // 2, [True, True]), (beyond, [True, False])):
        table.evaluate("(part, place) => { part.scrollLeft = place }", place)
        assert [abs(edge - paper) > 30 for edge in edges(browser, table.screenshot())] == shaded, place
    page.close()


EDGES = """async data => {
  const picture = new Image();
  picture.src = 'data:image/png;base64,' + data;
  await picture.decode();
  const canvas = new OffscreenCanvas(picture.width, picture.height), context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  return [1, picture.width - 2].map(column => {
    const pixels = context.getImageData(column, 0, 1, picture.height).data;
    return [...pixels].filter((_, place) => place % 4 === 0).sort((a, b) => a - b)[picture.height >> 1];
  });
}"""


def edges(browser: Any, data: bytes) -> list[float]:
    """Return the median red of the leftmost and of the rightmost pixels of a PNG picture."""
    page = browser.new_page()
    found: list[float] = page.evaluate(EDGES, base64.b64encode(data).decode())
    page.close()
    return found


def test_the_page_reads_nothing_from_elsewhere(page: str) -> None:
    assert not re.search(r"(?:src|href)=|url\(|@import|<script|<link", page)
    assert comparison.PAGE.endswith(".html")
