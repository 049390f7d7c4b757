"""The page of one run."""

from html import escape
from pathlib import Path
from typing import Any

from llmprune.page import facts, html, svg
from llmprune.page.svg import Axis, Series, percent, plain
from llmprune.page.weights import Histogram, histograms
from llmprune.runs import command_of, read_run, require_file

PAGE = "report.html"


def write_page(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of an output folder as one HTML file, OUT/report.html by default, and return where it is.

    Where `png.can_draw`, its figures also become PNG files in a folder beside it, `OUT/report`.

    Raises:
        CheckpointError: the folder is no output of llmprune.
        RecipeError: `path` is no place for a page.
    """
    folder = Path(folder)
    target = folder / PAGE if path is None else Path(path)
    run = read_run(folder)
    require_file(target, Path(PAGE).suffix)
    return html.write(target, run_page(run, histograms(folder, run)))


def run_page(run: dict[str, Any], weights: list[Histogram]) -> str:
    """Return the page of a run: what `llmprune.json` holds, and histograms of the weights."""
    sites = run["sites"]
    return html.document(
        f"{facts.title_of(run)}: {run['model']}",
        [
            _head(run),
            _tiles(run),
            evaluations(run),
            html.figures("By depth", [_errors(run), _against_magnitude(sites), _sparsities(sites), _experts(sites)]),
            html.figures("Weights", [_weights(entry) for entry in weights]),
            html.figures("Cost of the run", [_timings(run), _memory(run)]),
            html.bullets("Notes", _notes(run)),
            _left_dense(run),
            _sites(sites),
        ],
    )


def evaluations(run: dict[str, Any]) -> str:
    """Return the table of what was measured, and how to measure it where nothing was."""
    found = run.get("evaluations", [])
    if not found:
        command = "llmprune eval MODEL OUT --data wikitext2 --save"
        return f"<h2>Evaluation</h2>\n<p>Nothing was measured yet: <code>{command}</code>, then this report again.</p>"
    header = ["data", "perplexity", "dense", "ratio", "KL divergence", "top-1 agreement", "window", "dtype"]
    notes = "".join(f"<p class=soft>{escape(entry['data'])}: {escape(entry['convention'])}.</p>" for entry in found)
    return f"<h2>Evaluation</h2>\n{html.table(header, [_evaluation(entry) for entry in found])}\n{notes}"


def _evaluation(entry: dict[str, Any]) -> list[str]:
    dense, kl, agreement = (entry.get(key) for key in ("dense_perplexity", "kl_divergence", "top1_agreement"))
    return [
        entry["data"],
        f"{entry['perplexity']:.2f}",
        f"{dense:.2f}" if dense else "",
        f"{entry['perplexity'] / dense:.3f}" if dense else "",
        html.or_empty(kl, ".4f"),
        f"{100 * agreement:.1f} %" if agreement is not None else "",
        str(entry["length"]),
        entry["dtype"],
    ]


def _head(run: dict[str, Any]) -> str:
    calibration = run["calibration"]
    seen = f"calibrated on {calibration['note']}" if calibration else "without calibration"
    return (
        f"<h1>{escape(str(run['model']))}</h1>\n<p class=soft>{escape(facts.title_of(run))}, {escape(seen)}, "
        f"llmprune {escape(run['versions'].get('llmprune', ''))}</p>\n<pre>{escape(command_of(run))}</pre>"
    )


def _tiles(run: dict[str, Any]) -> str:
    peak = run["peak_memory_bytes"]
    found = [
        ("zeros in the pruned matrices", percent(run["sparsity"]["sites"])),
        ("zeros in all parameters", percent(run["sparsity"]["all_parameters"])),
        ("matrices pruned", plain(len(run["sites"]))),
        ("mean relative output error", f"{facts.mean_error(run['sites']):.3g}"),
        ("time", f"{sum(run['timings'].values()):.1f} s"),
        ("peak memory", f"{peak['host'] / 2**30:.2f} GiB"),
    ]
    return html.tiles(found + ([("peak on the GPU", f"{peak['device'] / 2**30:.2f} GiB")] if peak["device"] else []))


def _depth(sites: list[facts.Site]) -> Axis:
    blocks = [float(block) for block in facts.by_block(sites)]
    return Axis.around("block", blocks, plain, whole=True)


def _per_kind(sites: list[facts.Site], key: str, format: svg.Format) -> list[Series]:
    found = []
    for kind, members in facts.by_kind(sites).items():
        points = [(float(facts.block_of(site) or 0), float(site[key])) for site in members]
        labels = [f"{site['name']}: {format(site[key])}" for site in members]
        found.append(Series(kind, points, labels, line=all(facts.expert_of(site) is None for site in members)))
    return found


def _errors(run: dict[str, Any]) -> str:
    sites, blocks = run["sites"], "dense" if run.get("one_pass") else "pruned"
    series = _per_kind(sites, "error", lambda value: f"{value:.4g}")
    if not series:
        return ""
    y = Axis.around("relative output error", [b for entry in series for _, b in entry.points], plain, zero=True)
    title = "Output error of each matrix"
    return html.figure(
        title,
        svg.chart(title, _depth(sites), y, series),
        "Squared change of the outputs over the squared outputs on the calibration tokens, inputs from the "
        f"{blocks} blocks before; measured with {facts.norms_of(sites)}.",
        svg.legend(series),
    )


def _against_magnitude(sites: list[facts.Site]) -> str:
    shares = [site | {"share": share} for site in sites if (share := facts.share_of_magnitude(site)) is not None]
    series = _per_kind(shares, "share", lambda value: f"{value:.3f}")
    if not series:
        return ""
    title = "Output error, against that of magnitude pruning"
    ends = [float(block) for block in facts.by_block(shares)]
    level = Series("magnitude", [(min(ends), 1.0), (max(ends), 1.0)], marks=False, colour=7)
    y = Axis.around("share of its error", [1.0, *(b for entry in series for _, b in entry.points)], plain, zero=True)
    return html.figure(
        title,
        svg.chart(title, _depth(shares), y, [*series, level]),
        "Below 1 the outputs change less than if the smallest weights of the matrix were removed. Magnitude's error is "
        "measured in the same way, on some rows of each matrix.",
        svg.legend([*series, level]),
    )


def _sparsities(sites: list[facts.Site]) -> str:
    series = _per_kind(sites, "sparsity", percent)
    if not series:
        return ""
    blocks = facts.by_block(sites)
    mean = Series("whole block", [(float(block), facts.sparsity_of(members)) for block, members in blocks.items()])
    title = "Allocation: zeros in each matrix"
    y = Axis("share of zeros", 0.0, 1.0, percent)
    dots = [Series(entry.name, entry.points, entry.labels, line=False) for entry in series]
    return html.figure(
        title,
        svg.chart(title, _depth(sites), y, [*dots, mean]),
        "Every matrix, and each block as a whole, weighted by size.",
        svg.legend([*dots, mean]),
    )


def _experts(sites: list[facts.Site]) -> str:
    experts = [site for site in sites if facts.expert_of(site) is not None and site["tokens"] > 0]
    if not experts:
        return ""
    series = [
        Series(kind, points, line=False, labels=[f"{site['name']}: {site['tokens']:,} tokens" for site in members])
        for kind, members in facts.by_kind(experts).items()
        for points in [[(float(facts.block_of(site) or 0), float(site["tokens"])) for site in members]]
    ]
    title = "Calibration tokens that each expert saw"
    y = Axis.around("tokens", [float(site["tokens"]) for site in experts], plain, log=True)
    picture = svg.chart(title, _depth(experts), y, series)
    return html.figure(title, picture, "Experts that saw few tokens are pruned on thin evidence.", svg.legend(series))


def _weights(entry: Histogram) -> str:
    series = [Series("after", svg.steps(entry.edges, entry.after), marks=False)]
    if entry.before is not None:
        series.append(Series("before", svg.steps(entry.edges, entry.before), marks=False))
    title = f"Weights of {entry.kind}"
    x = Axis("weight", entry.edges[0], entry.edges[-1], plain)
    y = Axis.around("weights", [b for part in series for _, b in part.points], plain, zero=True)
    missing = "" if entry.before is not None else " The base model does not lie on this machine."
    caption = f"All {entry.kind} together, zeros left out, up to a million weights a matrix.{missing}"
    return html.figure(title, svg.chart(title, x, y, series), caption, svg.legend(series))


def _timings(run: dict[str, Any]) -> str:
    rows = sorted(run["timings"].items(), key=lambda row: -row[1])
    title = "Seconds in each phase"
    machine = run["hardware"]
    where = machine["gpu"] or f"{machine['machine']}, {machine['threads']} threads"
    return html.figure(title, svg.bars(title, rows, lambda value: f"{value:.3g} s"), f"On {where}.")


def _memory(run: dict[str, Any]) -> str:
    stages = list(run.get("memory_bytes", {}).values())
    if not stages:
        return ""
    parts = [("resident", "host")] + ([("on the GPU", "device")] if any(used["device"] for used in stages) else [])
    series = [
        Series(name, [(float(block), used[key] / 2**30) for block, used in enumerate(stages)], marks=len(stages) < 40)
        for name, key in parts
    ]
    title = "Memory over the run"
    x = Axis.around("part of the model, in the order of the run", [0.0, len(stages) - 1.0], plain, whole=True)
    y = Axis.around("GiB", [b for entry in series for _, b in entry.points], plain, zero=True)
    caption = "The most that was seen while each part was pruned; resident counts the libraries and mapped files too."
    return html.figure(title, svg.chart(title, x, y, series), caption, svg.legend(series))


def _notes(run: dict[str, Any]) -> list[str]:
    return [*run["notes"], *(f"{site['name']}: {note}" for site in run["sites"] for note in site["notes"])]


def _left_dense(run: dict[str, Any]) -> str:
    rows = [[name, reason] for name, reason in run["left_dense"].items()]
    if not rows:
        return ""
    return f"<h2>Left dense</h2>\n<details><summary>{len(rows)} matrices beside norms</summary>{_two(rows)}</details>"


def _two(rows: list[list[str]]) -> str:
    return html.table(["matrix", "why"], rows)


def _sites(sites: list[facts.Site]) -> str:
    rows = [
        [site["name"], "x".join(map(str, site["shape"])), site["pattern"], percent(site["sparsity"]),
         f"{site['error']:.4g}", html.or_empty(facts.share_of_magnitude(site), ".3f"), plain(site["tokens"])]
        for site in sites
    ]  # fmt: skip
    header = ["matrix", "shape", "pattern", "zeros", "output error", "of magnitude's", "tokens"]
    found = html.table(header, rows)
    return f"<h2>Every matrix</h2>\n<details><summary>{len(rows)} matrices</summary>{found}</details>"
