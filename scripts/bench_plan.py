"""Compare what `llmprune plan` foretells with what `llmprune prune` then takes, on models of several sizes.

    python scripts/bench_plan.py --methods wanda sparsegpt --sequences 16 --length 256

Writes randomly initialised Llamas (and one mixture of experts) in bfloat16, plans and prunes each in a process of its
own, and prints one JSON row for each model and method:

    peak_rss_bytes   foretold, measured by the run itself, the ratio of the two, and the largest resident set of the
                     whole process: ending an interpreter that has loaded torch takes some 120 MB of its own
    beside_base      the same without what the process takes before it has done anything
    seconds          per phase, foretold and measured; `forward` holds the time of the statistics too
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from bench_memory import INDEX, Llama, Mixture, Model, write_model
from bench_peers import Row, in_child, machine, own_environment, run_measured, say, write_random_tokens
from bench_ranks import launcher
from llmprune.presets import PRESETS

SIZES: dict[str, Model] = {
    "small": Llama(hidden=512, intermediate=1408, heads=8, blocks=8),
    "middle": Llama(hidden=768, intermediate=2048, heads=12, blocks=12),
    "large": Llama(hidden=1536, intermediate=4096, heads=12, blocks=12),
    "wide": Llama(hidden=2560, intermediate=6912, heads=20, blocks=3),
    "mixture": Mixture(hidden=1024, intermediate=512, heads=8, blocks=3, experts=64),
}


def compare(plan: Row, report: Row, process: int) -> Row:
    """Return the row of one model and method."""
    foretold = plan["memory"]["peak_bytes"]["host"]
    base = plan["memory"]["parts"][0]["bytes"]
    took, peak = report["timings"], report["peak_memory_bytes"]["host"]
    expected = {part["name"]: part["seconds"] for part in plan["time"]["parts"]}
    forward = expected.get("forward", 0.0) + expected.get("statistics", 0.0)
    measured = took.get("forward", 0.0) + took.get("statistics", 0.0)
    others = took["solve"] + took.get("allocation", 0.0) + took.get("tune", 0.0)
    return {
        "peak_rss_bytes": {
            "foretold": foretold,
            "measured": peak,
            "ratio": round(foretold / peak, 3),
            "process": process,
        },
        "beside_base": {"foretold": foretold - base, "measured": peak - base},
        "seconds": {
            "forward": {"foretold": round(forward, 2), "measured": round(measured, 2)},
            "solve": {"foretold": round(expected["solve"], 2), "measured": round(took["solve"], 2)},
            "ratio": round(plan["time"]["seconds"] / (measured + others), 3),
        },
        "parts": {part["name"]: part["bytes"] for part in plan["memory"]["parts"]},
    }


def bench(size: str, method: str, arguments: argparse.Namespace, work: Path) -> Row:
    """Plan and prune one model."""
    model, out, tokens = work / size, work / "pruned", work / "tokens.jsonl"
    if not (model / INDEX).exists():
        in_child(write_model, model, SIZES[size])
    in_child(write_random_tokens, tokens, arguments.sequences, arguments.length)
    shutil.rmtree(out, ignore_errors=True)
    count = ["--samples", str(arguments.sequences), "--length", str(arguments.length)]
    asked = "--preset" if method in PRESETS else "--method"
    task = [asked, method, "--dtype", arguments.dtype, "--calibration", str(tokens), *count, "--json"]
    program = [sys.executable, "-m", "llmprune"]
    ranks = ["--ranks", str(arguments.ranks)]
    plan = run_measured([*program, "plan", str(model), *task, *ranks], work / "plan.log").answer
    started = [*launcher(arguments.ranks), "llmprune", "prune", str(model), str(out), *task]
    run = run_measured(started, work / "prune.log")
    row = {"model": size, "method": method, "dtype": arguments.dtype, "parameters": plan["parameters"]["all"]}
    row["ranks"] = arguments.ranks
    work_done = {"sequences": arguments.sequences, "length": arguments.length}
    return row | work_done | compare(plan, run.answer, run.peak_rss_bytes)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare llmprune's plans with its runs.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "middle", "large"])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"], help="methods, or presets")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=1, help="the peak is that of the rank that needs the most")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep everything here (default: a temporary folder)")
    return parser.parse_args()


def main() -> None:
    """Print one row for each model and method, and one on the machine."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for size in arguments.sizes:
            for method in arguments.methods:
                say(f"{size}, {method}")
                print(json.dumps(bench(size, method, arguments, work)), flush=True)
    print(json.dumps({**in_child(own_environment), "machine": machine()}))


if __name__ == "__main__":
    main()
