"""The page that compares runs."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmprune.page import facts, html, svg
from llmprune.page.svg import Axis, Series, percent, plain
from llmprune.runs import read_run, require_file

PAGE = "comparison.html"


def write_comparison(folders: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write the comparison of output folders as one HTML file, `comparison.html` by default; return where it is.

    Where `png.can_draw`, its figures also become PNG files in a folder beside it.

    Raises:
        CheckpointError: a folder is no output of llmprune.
        RecipeError: `path` is no place for a page.
    """
    target, runs = Path(PAGE if path is None else path), _named(folders)
    require_file(target, Path(PAGE).suffix)
    return html.write(target, comparison_page(runs))


def comparison_page(runs: dict[str, dict[str, Any]]) -> str:
    """Return the page that compares runs, given by the name of their folder."""
    title = "Comparison of runs"
    models = sorted({str(run["model"]) for run in runs.values()})
    return html.document(
        title,
        [
            f"<h1>{title}</h1>\n<p class=soft>{escape(', '.join(models))}</p>",
            _table(runs),
            _evaluations(runs),
            html.figures("By depth", [_sparsities(runs), _against_magnitude(runs), *_errors(runs)]),
            html.figures("Perplexity", _perplexities(runs)),
        ],
    )


def _named(folders: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Return the runs by the names of their folders, with the parents' where those are the same."""
    paths = [Path(folder) for folder in folders]
    alike = len({path.name for path in paths}) < len(paths)
    return {str(path) if alike else path.name: read_run(path) for path in paths}


def _table(runs: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            facts.title_of(run),
            percent(run["sparsity"]["sites"]),
            percent(run["sparsity"]["all_parameters"]),
            f"{facts.mean_error(run['sites']):.4g}",
            facts.norms_of(run["sites"]),
            html.or_empty(facts.mean_share(run["sites"]), ".3f"),
            f"{sum(run['timings'].values()):.1f} s",
            f"{run['peak_memory_bytes']['host'] / 2**30:.2f} GiB",
        ]
        for name, run in runs.items()
    ]
    header = ["run", "method", "zeros in matrices", "in all parameters", "mean output error", "measured by",
              "of magnitude's", "time", "peak memory"]  # fmt: skip
    note = "<p class=soft>Errors measured by different norms are not to be compared.</p>"
    differ = len({facts.norms_of(run["sites"]) for run in runs.values()}) > 1
    return f"<h2>Runs</h2>\n{html.table(header, rows)}{note * differ}"


def _evaluations(runs: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, entry["data"], f"{entry['perplexity']:.2f}", html.or_empty(entry.get("dense_perplexity"), ".2f"),
         html.or_empty(entry.get("kl_divergence"), ".4f"), html.or_empty(entry.get("top1_agreement"), ".1%")]
        for name, run in runs.items()
        for entry in run.get("evaluations", [])
    ]  # fmt: skip
    if not rows:
        return ""
    header = ["run", "data", "perplexity", "dense", "KL divergence", "top-1 agreement"]
    return f"<h2>Evaluation</h2>\n{html.table(header, rows)}"


def _figure(title: str, label: str, series: list[Series], caption: str, format: svg.Format, top: float = 0.0) -> str:
    points = [point for entry in series for point in entry.points]
    if not points:
        return ""
    x = Axis.around("block", [a for a, _ in points], plain, whole=True)
    y = Axis.around(label, [*(b for _, b in points), top], format, zero=True)
    return html.figure(title, svg.chart(title, x, y, series), caption, svg.legend(series))


def _errors(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return one figure for each norm: errors that were measured with different norms are not to be compared."""
    norms = dict.fromkeys(site["error_norm"] for run in runs.values() for site in run["sites"])
    return [_errors_by(norm, runs) for norm in norms]


def _errors_by(norm: str, runs: dict[str, dict[str, Any]]) -> str:
    series = []
    for colour, (name, run) in enumerate(runs.items()):
        blocks = facts.by_block(site for site in run["sites"] if site["error_norm"] == norm)
        if blocks:
            points = [(float(block), facts.mean_error(sites)) for block, sites in blocks.items()]
            series.append(Series(name, points, colour=colour))
    caption = "Mean over the matrices of a block; errors by another norm are no measure to compare with."
    return _figure(f"Output error by {norm.replace('_', ' ')}", "relative output error", series, caption, plain)


def _against_magnitude(runs: dict[str, dict[str, Any]]) -> str:
    """Return each run's errors over those of magnitude pruning in that run, which are measured in the same way."""
    series = []
    for colour, (name, run) in enumerate(runs.items()):
        shares = {block: facts.mean_share(sites) for block, sites in facts.by_block(run["sites"]).items()}
        points = [(float(block), share) for block, share in shares.items() if share is not None]
        series += [Series(name, points, colour=colour)] if points else []
    caption = "Mean over the matrices of a block. Below 1 the outputs change less than under magnitude pruning."
    title = "Output error, against that of magnitude pruning"
    return _figure(title, "share of its error", series, caption, plain, 1.0)


def _sparsities(runs: dict[str, dict[str, Any]]) -> str:
    series = [
        Series(
            name, [(float(block), facts.sparsity_of(sites)) for block, sites in facts.by_block(run["sites"]).items()]
        )
        for name, run in runs.items()
    ]
    return _figure("Zeros in each block", "share of zeros", series, "Of the pruned matrices.", percent, 1.0)


def _perplexities(runs: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    for data in dict.fromkeys(entry["data"] for run in runs.values() for entry in run.get("evaluations", [])):
        rows: list[tuple[str, float]] = []
        dense: dict[str, float] = {}
        for name, run in runs.items():
            for entry in run.get("evaluations", []):
                if entry["data"] == data:
                    rows.append((name, float(entry["perplexity"])))
                    dense |= {"dense": entry["dense_perplexity"]} if entry.get("dense_perplexity") else {}
        title = f"Perplexity on {data}"
        picture = svg.bars(title, [*dense.items(), *rows], lambda value: f"{value:.2f}")
        found.append(html.figure(title, picture, "Lower is better."))
    return found
