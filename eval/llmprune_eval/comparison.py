"""Several models on several texts, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmprune.errors import RecipeError, saying_what_is_kept
from llmprune.runs import add_evaluations, require_output
from llmprune.team.launch import launch
from llmprune_eval.perplexity import Evaluation, measure, read_text
from llmprune_eval.subjects import Place, Subject
from llmprune_eval.windows import Amount

_HEADER = ("model", "data", "perplexity", "bits/byte", "KL to dense", "top-1 agreement", "window", "seconds")


@dataclass(frozen=True)
class Comparison:
    """One evaluation for each model and text, in the order in which they were given."""

    evaluations: list[Evaluation]

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return {"evaluations": [evaluation.to_json() for evaluation in self.evaluations]}

    def __str__(self) -> str:
        cells = [list(_HEADER), *(_cells(evaluation) for evaluation in self.evaluations)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADER))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
        notes = dict.fromkeys(f"{found.data}: {found.convention}" for found in self.evaluations)
        return "\n".join([*lines, *notes])


def compare(
    models: Sequence[Any],
    data: Sequence[Any] = (None,),
    *,
    dense: Any = None,
    length: int | None = None,
    windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    streamed: bool | None = None,
    sparse: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    save: bool = False,
) -> Comparison:
    """Measure several models on several texts, with the distance of each to the dense model.

    Args:
        models, data: as `llmprune.evaluate` takes one of them.
        dense: the model that the others were pruned from; None is the first of `models`, False is none.
        save: add the results to the `llmprune.json` of every model but the dense one.

    The other arguments are those of `llmprune.evaluate`.

    Raises:
        LlmpruneError: one of its kinds.
    """
    if not models:
        raise RecipeError("there is no model to evaluate: give at least one")
    place = Place.of(device, dtype, streamed, trust_remote_code, sparse)
    amount = Amount(length, windows, batch_size)
    texts = [read_text(models[0], entry) for entry in data]
    subjects = [Subject(model, place, tokenizer) for model in models]
    reference: Subject | None = subjects[0]
    if dense is False:
        reference = None
    elif dense is not None:
        reference = Subject(dense, replace(place, sparse=False), tokenizer)

    def is_kept(subject: Subject) -> bool:
        return save and (subject is not reference or len(models) == 1)

    for subject in filter(is_kept, subjects):
        require_output(subject.folder)
    found: list[Evaluation] = []
    saved: list[str] = []
    with saying_what_is_kept(lambda: f"figures were added to {', '.join(saved)}" if saved else ""):
        while subjects:  # each is let go of once it is measured
            subject = subjects.pop(0)
            other = None if subject is reference else reference
            measured = [measure(subject, text, other, amount) for text in texts]
            if is_kept(subject) and launch().rank == 0:
                add_evaluations(subject.folder, [evaluation.to_json() for evaluation in measured])
                saved.append(subject.name)
            found += measured
    return Comparison(found)


def _cells(found: Evaluation) -> list[str]:
    bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    kl = "" if found.kl_divergence is None else f"{found.kl_divergence:.4f}"
    agreement = "" if found.top1_agreement is None else f"{found.top1_agreement:.2%}"
    sizes = [str(found.length), f"{found.seconds:.1f}"]
    return [found.model, found.data, f"{found.perplexity:.4f}", bits, kl, agreement, *sizes]


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    """Return the cells padded to their columns: names to the left, figures to the right."""
    return [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
