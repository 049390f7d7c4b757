"""Prune the demo model by four methods at 50 % and 2:4, and print what each does to its perplexity.

python scripts/demo.py [--out FOLDER] [--json]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import llmprune

METHODS = ("random", "magnitude", "wanda", "sparsegpt")
PATTERNS = ("50%", "2:4")


def perplexities(folder: Path) -> list[dict[str, str | float]]:
    """Return one row per pruned model, the dense one first; the pruned models lie in `folder`."""
    dense = llmprune.evaluate("demo")
    rows: list[dict[str, str | float]] = [{"method": "dense", "pattern": "-", "perplexity": dense.perplexity}]
    for method in METHODS:
        for pattern in PATTERNS:
            out = folder / f"{method}-{pattern.replace(':', 'of')}"
            report = llmprune.prune("demo", out, method=method, pattern=pattern, overwrite=True)
            found = llmprune.evaluate(out, data="demo").perplexity
            zeros = report.zeros / report.site_parameters
            rows.append({"method": method, "pattern": pattern, "perplexity": found, "zeros": zeros})
    return rows


def table(rows: list[dict[str, str | float]]) -> str:
    """Return the rows as a Markdown table, one line a method."""
    found = {(row["method"], row["pattern"]): row["perplexity"] for row in rows}
    lines = ["| method | " + " | ".join(PATTERNS) + " |", "|---|" + "---|" * len(PATTERNS)]
    for method in ("dense", *METHODS):
        cells = [found.get((method, pattern), found.get((method, "-"), 0.0)) for pattern in PATTERNS]
        lines.append(f"| {method} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the pruned models here")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = perplexities(args.out or Path(temporary))
    if args.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print("Perplexity of the demo model on the WikiText-2 excerpt, by method and pattern (lower is better):\n")
        print(table(rows))
        print("\nNext: .venv/bin/llmprune prune MODEL OUT --method sparsegpt --pattern 2:4", file=sys.stderr)


if __name__ == "__main__":
    main()
