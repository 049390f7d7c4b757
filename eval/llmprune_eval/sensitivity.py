"""How much each block, and each kind of matrix, minds being pruned: one of them pruned at a time, all else dense.

Each cell prunes a model in memory by the public `prune`, measures it, and puts the dense weights back.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune import data as data_room
from llmprune import methods
from llmprune.allocation import kind_of
from llmprune.calibration import batches, sample
from llmprune.checkpoint.sink import difference
from llmprune.errors import CheckpointError, RecipeError, saying_what_is_kept
from llmprune.locate import DEMO, require_folder
from llmprune.model import Resident
from llmprune.model.sites import Site, is_router, sites_of
from llmprune.page import html
from llmprune.planning import DEFAULT_CALIBRATION, context_length, window_length
from llmprune.progress import Progress
from llmprune.pruning import prune
from llmprune.runs import json_text, replace_text
from llmprune.structure import fault_in, fields_of
from llmprune_eval.pages import sensitivity_page
from llmprune_eval.perplexity import cut_for, perplexity_of, read_text
from llmprune_eval.scores import score
from llmprune_eval.subjects import Place, Subject
from llmprune_eval.windows import Amount, fitting_batch

DEFAULT_SPARSITIES = (0.3, 0.5, 0.7)
DEFAULT_WINDOWS = 32
JOURNAL, RESULT, PAGE = "sensitivity.jsonl", "sensitivity.json", "sensitivity.html"


@dataclass(frozen=True)
class Cell:
    """The model with one part of it pruned.

    Attributes:
        axis: `block` or `kind`.
        part: the block's number, or the kind of matrix such as `q_proj`.
        kl_divergence: KL(dense || pruned) in nats a token.
    """

    axis: str
    part: str
    sparsity: float
    perplexity: float
    kl_divergence: float


@dataclass(frozen=True)
class Sensitivity:
    """The dense model's perplexity and every cell's; `settings` is what they were measured with."""

    settings: dict[str, Any]
    dense: float
    cells: list[Cell]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values, as `sensitivity.json` has them.

        `{"settings": {"model", "data", "windows", "method", ..., "sparsities"}, "dense": perplexity, "cells": [...]}`,
        each cell `{"axis": "block" or "kind", "part", "sparsity", "perplexity", "kl_divergence"}`: `part` is the number
        of the block from 0 on, as text, or the last part of the module's name, such as `q_proj`; `sparsity` a share of
        zeros in (0, 1); `kl_divergence` in nats a token. For every part there is one cell for each of
        `settings.sparsities`, so that those of a part are a curve that an allocation can interpolate from 0 on.
        """
        return {"settings": self.settings, "dense": self.dense, "cells": [asdict(cell) for cell in self.cells]}

    def parts(self, axis: str) -> dict[str, list[Cell]]:
        """Return the cells of every block, or of every kind."""
        chosen = [cell for cell in self.cells if cell.axis == axis]
        return {part: [cell for cell in chosen if cell.part == part] for part in dict.fromkeys(c.part for c in chosen)}

    def __str__(self) -> str:
        sparsities = sorted({cell.sparsity for cell in self.cells})
        lines = [f"{self.settings['model']}: perplexity {self.dense:.2f} dense, on {self.settings['data']}"]
        lines.append("perplexity (KL) at".ljust(20) + "".join(f"{sparsity:>20.0%}" for sparsity in sparsities))
        for axis in ("block", "kind"):
            for part, cells in self.parts(axis).items():
                name = f"block {part}" if axis == "block" else part
                values = (f"{cell.perplexity:.2f} ({cell.kl_divergence:.4f})" for cell in cells)
                lines.append(name.ljust(20) + "".join(f"{value:>20}" for value in values))
        return "\n".join(lines)


def sensitivity(
    model: str | Path,
    out: str | Path | None = None,
    *,
    sparsities: Sequence[float] = DEFAULT_SPARSITIES,
    method: str = "magnitude",
    data: Any = None,
    windows: int = DEFAULT_WINDOWS,
    length: int | None = None,
    calibration: Any = None,
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> Sensitivity:
    """Measure perplexity and KL divergence with one block, or one kind of matrix, pruned at a time.

    The model is held in memory twice: the dense one, and the one that is pruned.

    Args:
        model: a folder, a Hub id, or `demo`.
        out: a folder for the result as JSON and as a page; a run that was stopped goes on there.
        sparsities: shares of zeros, each strictly between 0 and 1.
        method, calibration, samples, seed: as in `llmprune.Recipe`.
        data, length, batch_size: as in `llmprune.evaluate`.
        windows: how many windows of the text to measure on.

    Raises:
        LlmpruneError: one of its kinds.
    """
    amount = Amount(length, windows, batch_size)
    _require_shares(sparsities)
    folder = None if out is None else Path(out)
    if folder is not None:
        require_folder(folder)
    place = Place.of(device, dtype, False, trust_remote_code)
    dense, pruned = Subject(model, place), Subject(model, place)
    cut = cut_for(dense, read_text(model, data), amount)
    batches_BL = batches(cut.tokens, batch_size or fitting_batch(cut, dense.vocabulary))
    calibration = (DEMO if model == DEMO else DEFAULT_CALIBRATION) if calibration is None else calibration
    asked = {"method": method, "calibration": calibration, "samples": samples, "length": length, "seed": seed}
    settings = {"model": str(model), "data": cut.tokens.name, "windows": len(cut.tokens.rows), **_plain(asked)}
    settings |= {"sparsities": list(sparsities), "dtype": str(dense.dtype).removeprefix("torch.")}
    recipe = {"method": method, "calibration": _drawn(dense, asked), "seed": seed}
    journal = _Journal(folder, settings)
    with saying_what_is_kept(journal.kept):
        cells = _measured(dense, pruned, batches_BL, sparsities, recipe, journal)
        loss = score(batches_BL, dense.logits(batches_BL)).loss
        result = Sensitivity(settings, perplexity_of(str(model), loss), cells)
        if folder is not None:
            replace_text(folder / RESULT, json_text(result.to_json()))  # `--allocation` reads it
            html.write(folder / PAGE, sensitivity_page(result))
    return result


def _drawn(subject: Subject, asked: dict[str, Any]) -> list[list[int]] | None:
    """Return the calibration sequences, the same for all cells; None for a method that needs none."""
    if methods.get(asked["method"]).needs is None:
        return None
    documents = data_room.read(asked["calibration"], "calibration")
    tokenizer = None if documents.kind == "input_ids" else subject.tokenizer
    length = window_length(asked["length"], context_length(subject.config))
    tokens = sample(documents, tokenizer, samples=asked["samples"], length=length, seed=asked["seed"])
    return [row.tolist() for row in tokens.rows]


def _measured(
    dense: Subject,
    pruned: Subject,
    batches_BL: list[Tensor],
    sparsities: Sequence[float],
    recipe: dict[str, Any],
    journal: "_Journal",
) -> list[Cell]:
    """Measure the cells that the journal lacks, and return them all."""
    parts = _parts(pruned.network)
    grid = [(axis, part, share) for axis, part in parts for share in sparsities]
    with Progress(len(grid), "sensitivity", "cell") as bar:
        for axis, part, share in grid:
            if not journal.holds(axis, part, share):
                with _pruned(pruned, parts, (axis, part), recipe | {"pattern": share}):
                    scores = score(batches_BL, pruned.logits(batches_BL), dense.logits(batches_BL))
                perplexity = perplexity_of(f"{dense.name} with {part} at {share:.0%}", scores.loss)
                journal.add(Cell(axis, part, share, perplexity, scores.kl_divergence or 0.0))
            bar.step()
    return journal.cells


class _Journal:
    """The cells that are done, kept in a file so that a stopped run goes on."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.cells: list[Cell] = []
        self._path = None if folder is None else folder / JOURNAL
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1] or json.dumps(settings) + "\n"  # a killed run may leave half a line
        first, *rest = whole.splitlines()
        if first != json.dumps(settings):
            cause = _differing(first, settings)
            raise RecipeError(f"{self._path} is of other settings{cause}; choose another folder, or delete it")
        if whole != text:
            replace_text(self._path, whole)
        self.cells = [self._cell(number, line) for number, line in enumerate(rest, start=2)]

    def _cell(self, number: int, line: str) -> Cell:
        try:
            values = json.loads(line)
            fault = fault_in(values, Cell)
        except (ValueError, RecursionError) as error:
            fault = f"it is no JSON ({error})"
        if fault is not None:
            raise CheckpointError(f"{self._path} is damaged in line {number}: {fault}; delete it to measure anew")
        return Cell(**fields_of(Cell, values))

    def kept(self) -> str:
        """Return what a run that is stopped leaves in the file, and how to go on, in words; nothing without a file."""
        if self._path is None:
            return ""
        figures = f"{len(self.cells)} figure{'' if len(self.cells) == 1 else 's'}"
        return f"{figures} kept in {self._path.parent}: run the same command again to go on"

    def holds(self, axis: str, part: str, sparsity: float) -> bool:
        """Say whether a cell is done."""
        return any((cell.axis, cell.part, cell.sparsity) == (axis, part, sparsity) for cell in self.cells)

    def add(self, cell: Cell) -> None:
        """Add a cell, also to the file."""
        self.cells.append(cell)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cell)) + "\n")


def _differing(first: str, settings: dict[str, Any]) -> str:
    """Return in which setting the first line of a journal differs, in words; nothing where that line cannot be read."""
    try:
        cause = difference(json.loads(first), json.loads(json.dumps(settings)))
    except (ValueError, RecursionError):
        return ""
    return f": {cause}" if cause else ""


def _parts(network: Any) -> dict[tuple[str, str], list[Site]]:
    """Return the sites of every block and of every kind, by axis and part."""
    parts: dict[tuple[str, str], list[Site]] = {}
    kinds: dict[tuple[str, str], list[Site]] = {}
    for index, stage in enumerate(Resident(network).blocks):
        for site in sites_of(stage):
            if not is_router(site.tensor):
                parts.setdefault(("block", str(index)), []).append(site)
                kinds.setdefault(("kind", kind_of(site.tensor)), []).append(site)
    return parts | kinds


@contextmanager
def _pruned(
    subject: Subject, parts: dict[tuple[str, str], list[Site]], part: tuple[str, str], recipe: dict[str, Any]
) -> Iterator[None]:
    """Prune one part of a loaded model inside the block, and put its weights back after it."""
    chosen = {site.tensor for site in parts[part]}
    others = dict.fromkeys(site.tensor for sites in parts.values() for site in sites if site.tensor not in chosen)
    host = Resident(subject.network)
    kept = {site: host.weight(site).clone() for site in parts[part]}
    try:
        prune(subject.network, exclude=tuple(others), **recipe)
        yield
    finally:
        for site, weight in kept.items():
            host.weight(site).copy_(weight)


def _require_shares(sparsities: Sequence[float]) -> None:
    if not sparsities or not all(isinstance(share, float) and 0 < share < 1 for share in sparsities):
        raise RecipeError(f"sparsities must be shares strictly between 0 and 1, such as 0.5, not {sparsities!r}")


def _plain(asked: dict[str, Any]) -> dict[str, Any]:
    """Return options as plain values."""
    return {name: value if isinstance(value, str | int | None) else str(value) for name, value in asked.items()}
