"""Compare one process with several ranks of one thread each, pruning the same random Llama.

    python scripts/bench_ranks.py --methods wanda sparsegpt --ranks 1 2

Writes a randomly initialised Llama of about 100 M parameters, prunes it with each number of ranks in turn, and prints one
JSON row for each method and number:

    seconds    that pruning takes by the run's own clock (loading Python and its libraries is not among them), and by phase
    speedup    over one rank, of the same round
    peak       memory of the rank that needed the most
    same       whether the weights are those of one process, byte for byte

Ranks share the caches and the memory of one machine: give it as many idle cores as ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from bench_memory import INDEX, Llama, write_model
from bench_peers import Row, in_child, machine, own_environment, run_measured, say, write_random_tokens
from llmprune.presets import PRESETS

MODEL = Llama(hidden=640, intermediate=1728, heads=10, blocks=14)


def launcher(ranks: int) -> list[str]:
    """Return what starts a module with so many ranks on this machine."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    return [sys.executable, "-m", *(torchrun if ranks > 1 else [])]


def prune(model: Path, out: Path, options: list[str], ranks: int, work: Path) -> Row:
    """Prune with so many ranks and return what the run says of itself."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*launcher(ranks), "llmprune", "prune", str(model), str(out), *options, "--json"]
    answer: Row = run_measured(command, work / f"ranks-{ranks}.log").answer
    return answer


def weights(folder: Path) -> list[bytes]:
    """Return the bytes of all shards."""
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def bench(model: Path, method: list[str], arguments: argparse.Namespace, work: Path) -> None:
    """Print the rows of one method."""
    tokens = work / "tokens.jsonl"
    in_child(write_random_tokens, tokens, arguments.sequences, arguments.length)
    amount = ["--samples", str(arguments.sequences), "--length", str(arguments.length)]
    options = [*method, "--dtype", arguments.dtype, "--calibration", str(tokens), *amount]
    options += ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
    for round_ in range(arguments.rounds):
        alone = 0.0
        for ranks in arguments.ranks:
            say(f"{' '.join(method)}: {ranks} ranks, round {round_ + 1}")
            report = prune(model, work / f"out-{ranks}", options, ranks, work)
            seconds = sum(report["timings"].values())
            alone = seconds if ranks == 1 else alone
            row: Row = {"method": " ".join(method), "ranks": ranks, "dtype": arguments.dtype, "round": round_ + 1}
            row |= {"parameters": report["parameters"]["all"], "sequences": arguments.sequences}
            row |= {"length": arguments.length, "seconds": round(seconds, 2), "phases": report["timings"]}
            row |= {"speedup": round(alone / seconds, 3) if alone else None}
            row |= {"peak": report["peak_memory_bytes"]["host"]}
            if 1 in arguments.ranks:
                row["same"] = weights(work / f"out-{ranks}") == weights(work / "out-1")
            print(json.dumps(row), flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare one process with several ranks.")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="1 first, to compare with")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt"], help="names of methods, or of presets")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, help="sequences a forward; ranks share a step of tuning by batches")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep everything here (default: a temporary folder)")
    return parser.parse_args()


def main() -> None:
    """Print one row for each method, number of ranks and round, and one on the machine."""
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = work / "model"
        if not (model / INDEX).exists():
            in_child(write_model, model, MODEL)
        for name in arguments.methods:
            bench(model, ["--preset" if name in PRESETS else "--method", name], arguments, work)
    print(json.dumps({**in_child(own_environment), "machine": machine()}))


if __name__ == "__main__":
    main()
