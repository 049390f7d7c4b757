"""Prune a tiny model of every causal language model of transformers, check it, and write docs/ARCHITECTURES.md.

python scripts/architectures.py                    # everything
python scripts/architectures.py --resume           # what an earlier, interrupted run left out
python scripts/architectures.py --only mixtral     # again for one, the other rows as they were
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval"), str(ROOT / "tests")]

import transformers  # noqa: E402

import zoo  # noqa: E402
from llmprune.environment import versions  # noqa: E402
from zoo.check import DTYPES, Row  # noqa: E402
from zoo.isolated import Job, run  # noqa: E402

NAMED = 5  # places of matrices left dense that are named for one reason


def read_rows(path: Path) -> dict[Job, Row]:
    """Return the rows of a file by architecture and dtype, the last of each."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.name, row.dtype): row for row in rows}


def page(rows: dict[Job, Row]) -> str:
    """Return the page on all architectures."""
    full = [row for (_, dtype), row in sorted(rows.items()) if dtype == "fp32"]
    built = [row for row in full if row.verdict != "not built"]
    return "\n".join([*_header(rows, len(full), built), "", *_table(rows, built), "", *_unsupported(full)]) + "\n"


def _header(rows: dict[Job, Row], entries: int, built: list[Row]) -> Iterator[str]:
    found = versions()
    yield "# Architectures"
    yield ""
    yield (
        "Written by `python scripts/architectures.py`: a tiny model with random weights of every entry of "
        "`MODEL_FOR_CAUSAL_LM_MAPPING` is saved in shards smaller than a block, streamed, pruned to 50 % with "
        "magnitude and with Wanda, and loaded again with plain transformers."
    )
    yield ""
    yield ", ".join(
        f"{name} {found[name]}" for name in ("transformers", "torch", "llmprune", "python") if name in found
    )
    yield ""
    yield f"Of {entries} entries {len(built)} can be built. " + "; ".join(_totals(rows, built)) + "."
    yield ""
    yield "* **streams**: with one block in memory at a time, the logits equal those of `from_pretrained` bit for bit."
    yield (
        "* **pruned**: every site is exactly at the pattern, nothing else changed, names, shapes and dtypes are the "
        "source's, the reloaded model's logits equal the streamed ones bit for bit, the masks of linear layers are "
        "those of Wanda on the whole model, and the same model pruned in memory has the same weights."
    )
    yield "* **sites**: matrices that were pruned; an expert of a fused parameter is one."
    yield (
        "* **covered**: share of the parameters in the decoder blocks, and of all parameters, that is in sites. The "
        "second is small here because tiny models are mostly embeddings, and for multimodal models towers."
    )
    yield "* **left dense**: matrices of the decoder blocks that are no sites, and why."


def _totals(rows: dict[Job, Row], built: list[Row]) -> Iterator[str]:
    names = {row.name for row in built}
    for dtype in DTYPES:
        verdicts = Counter(row.verdict for row in rows.values() if row.dtype == dtype and row.name in names)
        if verdicts:
            parts = (f"{count} {_WORDS[verdict]}" for verdict, count in sorted(verdicts.items(), key=lambda v: -v[1]))
            yield f"{dtype}: " + ", ".join(parts)


_WORDS = {"pass": "pass", "refused": "refused", "wrong": "wrong", "not built": "that transformers cannot run so"}
_CELLS = {"pass": "yes", "refused": "refused", "wrong": "WRONG", "not built": "-"}


def _table(rows: dict[Job, Row], built: list[Row]) -> Iterator[str]:
    others = [dtype for dtype in DTYPES if any(row.dtype == dtype for row in rows.values())]
    columns = ["architecture", "streams", *(f"pruned, {dtype}" for dtype in others)]
    columns += ["Linear", "Conv1D", "expert slices", "covered: blocks", "all", "left dense"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in built:
        verdicts = [_CELLS[rows[row.name, dtype].verdict] if (row.name, dtype) in rows else "" for dtype in others]
        counts = [str(row.sites.get(kind, 0) or "") for kind in ("Linear", "Conv1D", "expert slice")]
        shares = [f"{row.covered_blocks:.1%}", f"{row.covered:.1%}"] if row.sites else ["", ""]
        cells = [row.name, "yes" if row.streams else "", *verdicts, *counts, *shares, _left_dense(row)]
        yield "| " + " | ".join(cells) + " |"


def _left_dense(row: Row) -> str:
    parts = []
    for reason, places in row.dense.items():
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        parts.append(f"{reason}: " + ", ".join(f"`{place}`" for place in places[:NAMED]) + more)
    return "; ".join(parts)


def _unsupported(full: list[Row]) -> Iterator[str]:
    for verdict, title in (("wrong", "Wrong"), ("refused", "Refused"), ("not built", "Not built by transformers")):
        chosen = [row for row in full if row.verdict == verdict]
        if chosen:
            yield from (f"## {title}", "", "| architecture | cause |", "|---|---|")
            yield from (f"| {row.name} | {_escaped(row.detail)} |" for row in chosen)
            yield ""


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*])", r"\\\1", text)


def _jobs(args: argparse.Namespace, done: Iterable[Job]) -> list[Job]:
    names = args.only or zoo.NAMES
    for name in names:
        if name not in zoo.NAMES:
            raise SystemExit(f"{name} is no causal language model of transformers {transformers.__version__}")
    wanted = [(name, dtype) for dtype in args.dtype for name in names]
    return [job for job in wanted if args.only or job not in set(done)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures, keeping all other rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of the checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--rows", type=Path, default=ROOT / "build/architectures.jsonl", help="one JSON object a row")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/ARCHITECTURES.md")
    args = parser.parse_args()
    rows = read_rows(args.rows) if args.resume or args.only else {}
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    with args.rows.open("a" if rows else "w") as file:
        for row in run(_jobs(args, rows), args.jobs):
            rows[row.name, row.dtype] = row
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(f"{row.name} {row.dtype}: {row.verdict} {row.detail}", flush=True)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(page(rows), "utf-8")
    sys.exit(any(row.verdict == "wrong" for row in rows.values()))


if __name__ == "__main__":
    main()
