"""What each ingredient of the presets is worth: perplexity of models pruned in many ways, calibrated with three seeds.

    python scripts/ablation.py --rows eval/results/ablation.jsonl --length 256 --samples 32 \
        --model MODEL CALIBRATION EVALUATION --model demo demo demo
    python scripts/ablation.py --rows eval/results/ablation.jsonl --table

MODEL is a folder, or `demo`; CALIBRATION and EVALUATION are files that share no text, or `demo`. Everything runs in one
process, in memory. Each result is a JSON row that is added to the file at once; one that is there already, of the same
options, is not measured again, so a run can be stopped and continued. `--table` prints the means over the seeds as
Markdown, the share of SparseGPT's excess log-perplexity over the dense model that is removed, and whether the presets
keep their order; it ends with status 1 where they do not.
"""

import argparse
import copy
import fnmatch
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from bench_peers import machine
from llmprune.locate import locate
from llmprune.recipe import Recipe

DENSE, REFERENCE = "dense", "sparsegpt"
PATTERNS = ["50%", "60%", "70%", "4:8", "2:4"]
SEEDS = [0, 1, 2]
ORDER = ["best", "balanced", "fast", REFERENCE]  # none is to have a higher perplexity than the next
_SEQUENTIAL = {"true_sequential": True}
_TARGET = {**_SEQUENTIAL, "dense_target": 0.5}
_TUNED = {"tune_epochs": 10}
_ALLOCATED = {"allocation": "fisher"}

ROWS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "ria": {"method": "ria"},
    REFERENCE: {"method": "sparsegpt"},
    "sparsegpt, true sequential": {"method": "sparsegpt", **_SEQUENTIAL},
    "sparsegpt, dense target": {"method": "sparsegpt", **_TARGET},
    "sparsegpt, dense target, allocation": {"method": "sparsegpt", **_TARGET, **_ALLOCATED},
    "sparsegpt, tuning": {"method": "sparsegpt", **_SEQUENTIAL, **_TUNED},
    "admm": {"method": "admm", **_SEQUENTIAL},
    "admm, dense target": {"method": "admm", **_TARGET},
    "admm, dense target, allocation": {"method": "admm", **_TARGET, **_ALLOCATED},
    "admm, dense target, tuning": {"method": "admm", **_TARGET, **_TUNED},
    "admm, dense target, allocation, tuning": {"method": "admm", **_TARGET, **_ALLOCATED, **_TUNED},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model and the texts that it is calibrated and measured on."""

    model: str
    calibration: str
    evaluation: str

    def load(self) -> tuple[Any, Any]:
        folder = locate(self.model)
        return (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder),
        )


def misfits(model: torch.nn.Module, pattern: str) -> tuple[str, ...]:
    """Return the matrices that an N:M pattern does not fit; in all rows they stay dense."""
    m = int(pattern.partition(":")[2] or 1)
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return tuple(f"{name}.weight" for name, module in linear if module.in_features % m)


def has_meaning(options: dict[str, Any], pattern: str) -> bool:
    """N:M leaves nothing to allocate."""
    return "allocation" not in options or ":" not in pattern


def key(row: Row) -> str:
    """Return what a row is measured of, as one text."""
    return json.dumps([row[name] for name in ("model", "evaluation", "windows", "row", "recipe")], sort_keys=True)


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def wanted(subject: Subject, model: torch.nn.Module, asked: argparse.Namespace) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Yield each row that is asked for, without its results, and the options of its run; none for the dense model.

    Raises:
        RecipeError: an option of a row is unknown here.
    """
    of = {"model": Path(subject.model).name, "evaluation": Path(subject.evaluation).name, "windows": asked.windows}
    yield {**of, "row": DENSE, "recipe": {"length": asked.length}}, {}
    for pattern in asked.pattern or PATTERNS:
        for name, options in ROWS.items():
            if not any(fnmatch.fnmatchcase(name, glob) for glob in asked.only) or not has_meaning(options, pattern):
                continue
            for seed in asked.seed or SEEDS:
                drawn = {"calibration": subject.calibration, "samples": asked.samples, "length": asked.length}
                run = {**options, **drawn, "pattern": pattern, "seed": seed, "exclude": misfits(model, pattern)}
                recipe = Recipe.of(run).to_json() | {"calibration": Path(subject.calibration).name}
                yield {**of, "row": name, "recipe": recipe}, run


def measure(subject: Subject, options: dict[str, Any], model: Any, tokenizer: Any, asked: argparse.Namespace) -> Row:
    """Return the results of one run, which changes the model."""
    started, found = time.process_time(), Row()
    if options:
        report = llmprune.prune(model, tokenizer=tokenizer, **options).to_json()
        found = {"sparsity": report["sparsity"]["sites"], "timings": report["timings"]}
    seconds = time.process_time() - started
    evaluation = llmprune.evaluate(
        model, subject.evaluation, tokenizer=tokenizer, length=asked.length, windows=asked.windows
    )
    return {"perplexity": evaluation.perplexity, "tokens": evaluation.tokens, "cpu_s": round(seconds, 2), **found}


def run(asked: argparse.Namespace) -> None:
    subjects = [Subject(*triple) for triple in asked.model]
    loaded = [(subject, *subject.load()) for subject in subjects]
    todo = [(*parts, list(wanted(*parts[:2], asked))) for parts in loaded]  # wrong options are told before any work
    done = {key(row) for row in rows_of(asked.rows)}
    where = {**machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    for subject, model, tokenizer, rows in todo:
        for row, options in rows:
            if key(row) in done:
                continue
            row |= {**measure(subject, options, copy.deepcopy(model), tokenizer, asked), **where}
            with asked.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{row['model']}  {row['row']:40} {title(row):5} {row['perplexity']:.4f}", file=sys.stderr, flush=True
            )


def title(row: Row) -> str:
    return str(row["recipe"].get("pattern", ""))


Means = dict[tuple[str, str], float]  # of a row and a pattern


def means(rows: Sequence[Row]) -> Means:
    """Return the means over the seeds; of two measurements of one seed, with other options, the later one counts."""
    latest = {(row["row"], title(row), row["recipe"].get("seed")): row["perplexity"] for row in rows}
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (name, pattern, _), perplexity in latest.items():
        found[name, pattern].append(perplexity)
    return {cell: mean(values) for cell, values in found.items()}


def removed(found: Means, name: str, pattern: str) -> float:
    """Return the share of SparseGPT's excess log-perplexity over the dense model that a row does not have."""
    dense, reference = math.log(found[DENSE, ""]), math.log(found[REFERENCE, pattern])
    return 1 - (math.log(found[name, pattern]) - dense) / (reference - dense)


def table(model: str, found: Means) -> list[str]:
    """Return the lines of a model's table: perplexity, and the share removed where there is one."""
    patterns = [pattern for pattern in PATTERNS if any(pattern == other for _, other in found)]
    lines = [f"### {model} (dense {found[DENSE, '']:.3f})", "", f"| | {' | '.join(patterns)} |"]
    lines.append("|---" * (len(patterns) + 1) + "|")
    for name in (name for name in ROWS if any((name, pattern) in found for pattern in patterns)):
        cells = []
        for pattern in patterns:
            perplexity = found.get((name, pattern))
            share = "" if perplexity is None or (REFERENCE, pattern) not in found else removed(found, name, pattern)
            shown = f" ({share:.2f})" if share and name != REFERENCE else ""
            cells.append("-" if perplexity is None else f"{perplexity:.3f}{shown}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def broken(found: Means) -> list[str]:
    """Return where a preset is worse than the one before it."""
    return [
        f"{pattern}: {better} {found[better, pattern]:.4f} > {worse} {found[worse, pattern]:.4f}"
        for pattern in PATTERNS
        for better, worse in pairwise(ORDER)
        if (better, pattern) in found and (worse, pattern) in found and found[better, pattern] > found[worse, pattern]
    ]


def show(path: Path) -> bool:
    """Print the tables of all models; say whether all orders hold."""
    by_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows_of(path):
        by_model[row["model"]].append(row)
    good = True
    for model, rows in by_model.items():
        found = means(rows)
        faults = broken(found)
        good = good and not faults
        seeds = {row["recipe"]["seed"] for row in rows if "seed" in row["recipe"]}
        print("\n".join(table(model, found)))
        print(f"\nMeans over {len(seeds)} seeds; in brackets the share of SparseGPT's excess log-perplexity removed.")
        print(f"{' <= '.join(ORDER)}: {'; '.join(faults) or 'holds everywhere'}\n")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="print what the file holds and measure nothing")
    parser.add_argument("--model", nargs=3, action="append", default=[], metavar=("MODEL", "CALIBRATION", "EVALUATION"))
    parser.add_argument("--only", action="append", help="globs on the names of rows; default all")
    parser.add_argument("--pattern", action="append", help=f"default {' '.join(PATTERNS).replace('%', '%%')}")
    parser.add_argument("--seed", action="append", type=int, help=f"default {' '.join(map(str, SEEDS))}")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, help="windows of evaluation text; default all")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.table:
        sys.exit(not show(asked.rows))
    asked.only = asked.only or ["*"]
    torch.set_num_threads(asked.threads)
    run(asked)


if __name__ == "__main__":
    main()
