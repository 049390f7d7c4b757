"""The pages of a sensitivity analysis and of a sweep."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.page import html, svg
from llmprune.page.svg import Axis, Series, percent, plain
from llmprune_eval.table import DECODING, Row, Sweep

if TYPE_CHECKING:
    from llmprune_eval.sensitivity import Sensitivity


def sensitivity_page(result: "Sensitivity") -> str:
    """Return the result as one HTML page: curves over the blocks and over the sparsity, and the table."""
    sparsities = sorted({cell.sparsity for cell in result.cells})
    blocks = [
        Series(percent(share), [(float(cell.part), cell.kl_divergence) for cell in result.cells
                                if cell.axis == "block" and cell.sparsity == share])
        for share in sparsities
    ]  # fmt: skip
    kinds = [
        Series(kind, [(cell.sparsity, cell.kl_divergence) for cell in cells])
        for kind, cells in result.parts("kind").items()
    ]
    return html.document(
        f"Sensitivity of {result.settings['model']}",
        [
            f"<h1>Sensitivity of {escape(result.settings['model'])}</h1>\n<p class=soft>{result.settings['method']}, on "
            f"{result.settings['windows']} windows of {escape(result.settings['data'])}; dense perplexity "
            f"{result.dense:.2f}</p>",
            html.figures("KL divergence to the dense model", [
                _figure("One block pruned", "block", blocks, "Nats a token, all other blocks dense.", plain, True),
                _figure("One kind pruned", "share of zeros", kinds, "In all blocks, all other kinds dense.", percent),
            ]),
            html.table(["part", "zeros", "perplexity", "KL divergence"], [
                [f"block {cell.part}" if cell.axis == "block" else cell.part, percent(cell.sparsity),
                 f"{cell.perplexity:.2f}", f"{cell.kl_divergence:.4f}"] for cell in result.cells
            ]),
        ],
    )  # fmt: skip


def _figure(title: str, label: str, series: list[Series], caption: str, format: svg.Format, whole: bool = False) -> str:
    points = [point for entry in series for point in entry.points]
    x = Axis.around(label, [a for a, _ in points], format, whole=whole)
    y = Axis.around("KL divergence", [b for _, b in points], plain, zero=True)
    return html.figure(title, svg.chart(title, x, y, series), caption, svg.legend(series))


def sweep_page(result: Sweep) -> str:
    """Return the sweep as one HTML page: perplexity against size and against decoding speed, and the table."""
    by_size = {row: row.size / 1e6 for row in result.rows}
    by_speed = {row: row.decode for row in result.rows if row.decode is not None}
    pictures = [
        _front("Perplexity against size", "MB, compressed", result, by_size, result.dense_size / 1e6, "smallest",
               "Lower and further left is better. The size is that of all tensors as llmprune compress stores them."),
        _front("Perplexity against decoding speed", "tokens a second", result, by_speed, result.dense_decode,
               "fastest", f"Lower and further right is better; {DECODING}."),
    ]  # fmt: skip
    header = ["method", "pattern", "left", "size", "perplexity", "KL divergence", "top-1 agreement",
              "mean output error", "tokens/s", "layers", "time", "best"]  # fmt: skip
    return html.document(
        f"Sweep over {result.model}",
        [
            f"<h1>Sweep over {escape(Path(result.model).name)}</h1>",
            f"<p class=soft>Perplexity on {escape(result.data)}, {result.dense:.2f} for the dense model.</p>",
            html.figures("", pictures),
            html.table(header, [_cells(row) for row in result.rows]),
            *(f"<p class=soft>{escape(line)}</p>" for line in result.legend()),
        ],
    )


def _front(
    title: str, label: str, result: Sweep, values: dict[Row, float], dense: float | None, mark: str, caption: str
) -> str:
    """Return the rows as points, and the line through those that no other row beats."""
    if not values or dense is None:
        return ""
    series = [
        Series(method, [(values[row], row.perplexity) for row in rows], [row.pattern for row in rows], line=False)
        for method, rows in _by_method(list(values)).items()
    ]
    front = sorted((value, row.perplexity) for row, value in values.items() if getattr(row, mark))
    best = [Series("best", front, marks=False)] if len(front) > 1 else []
    shown = [*series, *best, Series("dense", [(dense, result.dense)], ["dense"])]
    points = [point for entry in shown for point in entry.points]
    x = Axis.around(label, [a for a, _ in points], plain)
    y = Axis.around("perplexity", [b for _, b in points], plain, log=True)
    return html.figure(title, svg.chart(title, x, y, shown, names=True), caption, svg.legend(shown))


def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    return {method: [row for row in rows if row.method == method] for method in dict.fromkeys(r.method for r in rows)}


def _cells(row: Row) -> list[str]:
    decode = "" if row.decode is None else f"{row.decode:.1f}"
    return [
        row.method, row.pattern, percent(row.left), f"{row.size / 1e6:.1f} MB", f"{row.perplexity:.2f}",
        f"{row.kl_divergence:.4f}", percent(row.top1_agreement), f"{row.output_error:.4g}", decode, row.layers or "",
        f"{row.seconds:.1f} s", ", ".join(row.best),
    ]  # fmt: skip
