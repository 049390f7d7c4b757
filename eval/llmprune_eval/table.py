"""The table of a sweep: a row for each pruned model, and which of them no other beats."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

DECODING = "decoding on the CPU, one sequence, layers sparse where that is faster"  # what speeds are


@dataclass(frozen=True)
class Row:
    """One pruned model.

    Attributes:
        left: share of all parameters that are not zero.
        size: bytes of all tensors as `llmprune compress` stores them.
        decode: tokens a second with one sequence on the CPU, None where it was not measured.
        layers: what `decode` was measured with: `sparse` linear layers, or `dense` ones where those are faster.
        seconds: of solving, or of the whole run where each has one of its own.
        smallest: no other row, nor the dense model, is as small and has a lower perplexity.
        fastest: no other row, nor the dense model, decodes as fast and has a lower perplexity.
    """

    method: str
    pattern: str
    left: float
    size: int
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    output_error: float
    seconds: float
    out: str
    decode: float | None = None
    layers: str | None = None
    smallest: bool = False
    fastest: bool = False

    @property
    def best(self) -> list[str]:
        """In what no other row beats it: `size`, `speed`, both or neither."""
        return [*["size"] * self.smallest, *["speed"] * self.fastest]


@dataclass(frozen=True)
class Sweep:
    """The dense model's perplexity on `data`, and every pruned model's.

    Attributes:
        dense_size: bytes of all tensors of the dense model.
        dense_decode: tokens a second of the dense model, the median over the last measured rows, each beside it.
        one_pass: whether all were solved from one calibration pass, through the dense model.
        rows: of this sweep, and of earlier ones into the same folder with the same settings.
        settings: what the rows have in common: the model, what they were measured on, and the recipe.
    """

    model: str
    data: str
    convention: str
    dense: float
    dense_size: int
    dense_decode: float | None
    one_pass: bool
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        rates, width = ("tokens/s", 10) if self.dense_decode else ("", 0)
        lines = [
            f"{self.model}: perplexity {self.dense:.2f} dense, on {self.data}",
            f"{'method':14}{'pattern':>8}{'left':>9}{'size':>11}{'perplexity':>12}{'KL':>9}{'top-1':>9}{rates:>{width}}  best",
            f"{'dense':14}{'':8}{1:>9.2%}{self.dense_size / 1e6:>8.1f} MB{self.dense:>12.2f}{'':18}"
            f"{_rate(self.dense_decode):>{width}}".rstrip(),
        ]
        for row in self.rows:
            lines.append(
                f"{row.method:14}{row.pattern:>8}{row.left:>9.2%}{row.size / 1e6:>8.1f} MB{row.perplexity:>12.2f}"
                f"{row.kl_divergence:>9.4f}{row.top1_agreement:>9.2%}{_rate(row.decode):>{width}}  {' '.join(row.best)}".rstrip()
            )
        return "\n".join([*lines, *self.legend()])

    def legend(self) -> list[str]:
        """Return what the columns are, and where the results come from, in lines."""
        passes = "one calibration pass through the dense model" if self.one_pass else "a calibration pass of its own"
        decoding = f"tokens/s: {DECODING}" if self.dense_decode else "speed was not measured"
        return [
            f"each from {passes}; {self.data}: {self.convention}",
            f"size: as `llmprune compress` stores it; {decoding}",
            "best: none, the dense model included, has a lower perplexity and is as small (size), or as fast (speed)",
        ]


def _rate(decode: float | None) -> str:
    return "" if decode is None else f"{decode:.1f}"


def mark_best(rows: list[Row], dense: float, size: int, decode: float | None) -> list[Row]:
    """Return the rows, those marked that no other row beats, nor the dense model by these figures of its own."""
    rivals = [(dense, size, decode), *((row.perplexity, row.size, row.decode) for row in rows)]
    found = []
    for row in rows:
        better = [rival for rival in rivals if rival[0] < row.perplexity]
        smallest = not any(other <= row.size for _, other, _ in better)
        fastest = row.decode is not None and not any((other or 0.0) >= row.decode for _, _, other in better)
        found.append(replace(row, smallest=smallest, fastest=fastest))
    return found
