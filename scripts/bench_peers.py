"""Time llmprune and llm-compressor on the same model and the same tokens, on the CPU.

    python scripts/bench_peers.py --make-peer-env peer_env          # first time: builds the peer's environment
    python scripts/bench_peers.py --peer-python peer_env/bin/python --tasks wanda sparsegpt --patterns 50% 2:4

A task is a method, in the order of the papers' scripts (two forwards a block, fp32), or one of llmprune's faster ways to
the same end: `wanda-fast` and `sparsegpt-fast` run each block once and multiply in bfloat16, `fast` and `balanced` are the
presets. All tasks of a method are compared with the same runs of llm-compressor.

The model is a randomly initialised 110 M-parameter Llama in float32 and the calibration set is random tokens, both
seeded. Every run is a process of its own, llmprune's in the interpreter that runs this script, the peer's in its own
environment; the tools take turns, `--repeat` times each. llm-compressor gets one sequence a forward pass, its default:
eight took it longer, and more memory. `--peer-dtype bfloat16` loads its model in bfloat16.

Prints JSON rows. One for each tool, task and pattern:

    wall_s          seconds of the whole process, one for each run, and `wall_median_s`
    work_s          the same without interpreter start and imports, from the tool's own clock, and `work_median_s`
    cpu_s           processor seconds of the whole process; far below wall_s when something else had the processor
    peak_rss_bytes  the largest resident set of any of the runs
    sparsity        share of zeros over the Linear weights of the decoder blocks
    same_mask       share of those weights on which the two tools agree whether to keep them
    relative_difference   Frobenius distance between the two tools' weights, over the norm of llmprune's

and one last row with the ratios of the medians, llm-compressor over llmprune. Progress goes to stderr.
"""

# The parent imports only the standard library: a child's peak memory as the kernel reports it starts from the
# memory of the process that spawned it, so a parent that had loaded a model would hide the child's own peak.
from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")
Row = dict[str, Any]

PEER_REQUIREMENTS = ("llmcompressor==0.14.0.1", "torch==2.13.0")
PEER_COMMAND = "run-llmcompressor"
PEER = "llm-compressor"
ONE_FORWARD = ("--true-sequential", "--autocast")
# What llmprune is asked for, and the peer's method that it is compared with.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wanda": ("wanda", ("--method", "wanda")),
    "wanda-fast": ("wanda", ("--method", "wanda", *ONE_FORWARD)),
    "sparsegpt": ("sparsegpt", ("--method", "sparsegpt")),
    "sparsegpt-fast": (
        "sparsegpt",
        ("--method", "sparsegpt", "--method-option", "arithmetic=fast", *ONE_FORWARD),
    ),
    "fast": ("sparsegpt", ("--preset", "fast")),
    "balanced": ("sparsegpt", ("--preset", "balanced")),
}
VOCABULARY = 32000
SEED = 0
SPARSITY_TOLERANCE = 1e-3  # SparseGPT as published prunes up to a threshold, so a tie or two more than asked


@dataclass(frozen=True)
class Run:
    """What one child process took and printed."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    answer: Row


@dataclass
class Series:
    """All runs of one tool on one task, and what the folder it wrote holds."""

    tool: str
    task: str
    pattern: str
    out: Path
    runs: list[Run] = field(default_factory=list)

    def wall_median(self) -> float:
        return statistics.median(run.wall_s for run in self.runs)

    def work_median(self) -> float:
        return statistics.median(work_seconds(run.answer["timings"]) for run in self.runs)

    def peak_rss(self) -> int:
        return max(run.peak_rss_bytes for run in self.runs)


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def in_child(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a fresh process, so that its imports and memory stay out of this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def run_measured(command: list[str], log: Path) -> Run:
    """Run a command that prints one JSON object; its stderr goes to `log`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    printed = log.with_suffix(".json")
    with log.open("w") as errors, printed.open("w") as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, usage.ru_maxrss * unit, json.loads(printed.read_text()))


def work_seconds(timings: dict[str, float]) -> float:
    """Return the seconds a tool spent after its imports, from the phases it reports."""
    return timings["total"] if "total" in timings else sum(timings.values())


def machine() -> Row:
    """Describe the processor."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count()}


def write_random_tokens(path: Path, sequences: int, length: int) -> None:
    """Write rows of `{"input_ids": [...]}` with seeded random tokens."""
    import torch

    ids = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(SEED))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))


def write_model(folder: Path) -> int:
    """Write the float32 Llama and a tokenizer that peers can load; return the number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def installed_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe_environment() -> Row:
    """Return what can change a timing: versions and threads."""
    import torch

    versions = {name: installed_version(name) for name in ("torch", "transformers")}
    return {**versions, "threads": torch.get_num_threads()}


def own_environment() -> Row:
    """Return the environment that llmprune runs in."""
    return {"version": installed_version("llmprune"), **describe_environment()}


def peer_modifier(method: str, pattern: str) -> Any:
    """Return llm-compressor's recipe for a method and pattern."""
    pruning = importlib.import_module("llmcompressor.modifiers.pruning")
    modifier = {"wanda": pruning.WandaPruningModifier, "sparsegpt": pruning.SparseGPTModifier}[method]
    structured = ":" in pattern
    return modifier(
        sparsity=0.5 if structured else float(pattern.rstrip("%")) / 100,
        mask_structure=pattern if structured else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )


def run_peer(arguments: argparse.Namespace) -> Row:
    """Prune with llm-compressor, in its own environment, and return the seconds of each phase."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datasets = importlib.import_module("datasets")
    llmcompressor = importlib.import_module("llmcompressor")
    recipe = peer_modifier(arguments.method, arguments.pattern)
    marks = [time.perf_counter()]
    with open(arguments.tokens) as file:
        rows = [json.loads(line) for line in file]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    marks.append(time.perf_counter())
    llmcompressor.oneshot(
        model=model,
        processor=tokenizer,
        dataset=datasets.Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]["input_ids"]),
        shuffle_calibration_samples=False,
        batch_size=arguments.batch_size,
    )
    marks.append(time.perf_counter())
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    marks.append(time.perf_counter())
    seconds = (after - before for before, after in itertools.pairwise(marks))
    phases = dict(zip(("load", "oneshot", "save"), seconds, strict=True))
    environment = {"version": installed_version("llmcompressor"), **describe_environment()}
    return {"timings": phases | {"total": marks[-1] - marks[0]}, "environment": environment}


def peer_main(words: list[str]) -> None:
    """Read the words the parent sent, prune, and leave nothing on stdout but the answer."""
    parser = argparse.ArgumentParser()
    for name in ("model", "out", "tokens", "method", "pattern"):
        parser.add_argument(name)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("dtype")
    arguments = parser.parse_args(words)
    # The peer logs to stdout, below Python too: keep the real one aside and point descriptor 1 at stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(run_peer(arguments)), file=answers, flush=True)


def make_peer_environment(folder: Path) -> Path:
    """Create a virtual environment with llm-compressor and return its interpreter."""
    say(f"installing {' '.join(PEER_REQUIREMENTS)} into {folder}")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", *PEER_REQUIREMENTS], check=True, stdout=sys.stderr)
    return python


def decoder_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Linear weights of the decoder blocks of a checkpoint, by name."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is not iterable
                if ".layers." in name and len(file.get_slice(name).get_shape()) == 2:
                    yield name, file.get_tensor(name)


def follows(weight: torch.Tensor, pattern: str) -> bool:
    """Return whether a weight has the zeros that an N:M pattern asks for."""
    keep, group = (int(part) for part in pattern.split(":"))
    return bool(((weight != 0).view(-1, group).sum(1) <= keep).all())


def compare_outputs(own: Path, peer: Path, pattern: str) -> Row:
    """Check both outputs against the pattern and measure how far they agree."""
    zeros = {"llmprune": 0, "llm-compressor": 0}
    same = total = 0
    distance = norm = 0.0
    peer_weights = dict(decoder_weights(peer))
    for name, mine in decoder_weights(own):
        theirs = peer_weights.pop(name)
        for tool, weight in (("llmprune", mine), (PEER, theirs)):
            if ":" in pattern and not follows(weight, pattern):
                raise ValueError(f"{tool}: {name} does not follow {pattern}")
            zeros[tool] += int((weight == 0).sum())
        same += int(((mine == 0) == (theirs == 0)).sum())
        total += mine.numel()
        distance += float((mine - theirs).double().square().sum())
        norm += float(mine.double().square().sum())
    for tool, count in zeros.items():  # over all weights: they may be shared out unevenly
        if ":" not in pattern and abs(count / total - float(pattern.rstrip("%")) / 100) > SPARSITY_TOLERANCE:
            raise ValueError(f"{tool}: {count} of {total} weights are zero, which is not {pattern}")
    if peer_weights or not total:
        raise ValueError(f"the outputs hold different weights: {sorted(peer_weights)[:5]}")
    return {
        "sparsity": {tool: count / total for tool, count in zeros.items()},
        "same_mask": same / total,
        "relative_difference": (distance / norm) ** 0.5,
    }


def command_of(series: Series, arguments: argparse.Namespace, work: Path) -> list[str]:
    """Return the command line of one run."""
    model, tokens, out = str(work / "model"), str(work / "tokens.jsonl"), str(series.out)
    if series.tool == PEER:
        script = str(Path(__file__).resolve())
        how = [str(arguments.peer_batch_size), arguments.peer_dtype]
        task = [model, out, tokens, series.task, series.pattern, *how]
        return [str(arguments.peer_python), script, PEER_COMMAND, *task]
    task = [*TASKS[series.task][1], "--pattern", series.pattern, "--calibration", tokens, "--dtype", "float32"]
    return [sys.executable, "-m", "llmprune", "prune", model, out, *task, "--json"]


def run_in_turns(all_series: list[Series], arguments: argparse.Namespace, work: Path) -> None:
    """Run llmprune's tasks and the peer in turn, as often as asked."""
    for number in range(arguments.repeat):
        for series in all_series:
            shutil.rmtree(series.out, ignore_errors=True)
            log = work / f"{series.out.name}-{number}.log"
            series.runs.append(run_measured(command_of(series, arguments, work), log))
            run = series.runs[-1]
            say(f"{series.out.name} {number + 1}/{arguments.repeat}: {run.wall_s:.1f} s, {run.peak_rss_bytes:,} bytes")


def row_of(series: Series, environment: Row, comparison: Row) -> Row:
    """Return the printed row of one tool on one task."""
    return {
        "tool": series.tool,
        "task": series.task,
        "pattern": series.pattern,
        "wall_s": [round(run.wall_s, 3) for run in series.runs],
        "wall_median_s": round(series.wall_median(), 3),
        "work_s": [round(work_seconds(run.answer["timings"]), 3) for run in series.runs],
        "work_median_s": round(series.work_median(), 3),
        "timings": [run.answer["timings"] for run in series.runs],
        "cpu_s": [round(run.cpu_s, 3) for run in series.runs],
        "peak_rss_bytes": series.peak_rss(),
        **environment,
        "machine": machine(),
        **comparison,
        "sparsity": comparison["sparsity"][series.tool],
    }


def ratios_of(own: Series, peer: Series) -> Row:
    """Return by how much the peer takes more than llmprune."""
    return {
        "task": own.task,
        "pattern": own.pattern,
        "wall": round(peer.wall_median() / own.wall_median(), 3),
        "work": round(peer.work_median() / own.work_median(), 3),
        "peak_rss": round(peer.peak_rss() / own.peak_rss(), 3),
    }


def by_method(tasks: list[str]) -> dict[str, list[str]]:
    """Sort tasks by the peer's method that they are compared with."""
    methods = {TASKS[task][0] for task in tasks}
    return {method: [task for task in tasks if TASKS[task][0] == method] for method in sorted(methods, reverse=True)}


def compare(arguments: argparse.Namespace, work: Path) -> None:
    """Run every asked task with both tools and print the rows."""
    parameters = in_child(write_model, work / "model")
    in_child(write_random_tokens, work / "tokens.jsonl", arguments.sequences, arguments.length)
    say(f"model: {parameters:,} parameters; calibration: {arguments.sequences} x {arguments.length} tokens")
    environment = in_child(own_environment)
    shape = {"parameters": parameters, "sequences": arguments.sequences, "length": arguments.length}
    ratios = []
    for pattern, (method, tasks) in itertools.product(arguments.patterns, by_method(arguments.tasks).items()):
        stem = pattern.replace("%", "pct").replace(":", "of")
        peer = Series(PEER, method, pattern, work / f"{PEER}-{method}-{stem}")
        ours = [Series("llmprune", task, pattern, work / f"llmprune-{task}-{stem}") for task in tasks]
        run_in_turns([*ours, peer], arguments, work)
        comparisons = [in_child(compare_outputs, own.out, peer.out, pattern) | shape for own in ours]
        how = {"batch_size": arguments.peer_batch_size, "dtype": arguments.peer_dtype}
        peer_environment = peer.runs[-1].answer["environment"] | how
        for own, comparison in zip(ours, comparisons, strict=True):
            print(json.dumps(row_of(own, environment, comparison)), flush=True)
            ratios.append(ratios_of(own, peer))
        print(json.dumps(row_of(peer, peer_environment, comparisons[0])), flush=True)
    print(json.dumps({"ratios": ratios, "of": "llm-compressor / llmprune"}), flush=True)


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time llmprune and llm-compressor on the same model and tokens.")
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--peer-python", type=Path, help="interpreter of an environment that has llm-compressor")
    peer.add_argument("--make-peer-env", type=Path, metavar="DIR", help="create that environment here first")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="sequences a forward pass in llm-compressor")
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="float32", help="of its model")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--patterns", nargs="+", choices=("50%", "2:4"), default=["50%"])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each tool on each task")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models and logs here (default: a temporary one)")
    return parser.parse_args(words)


def main() -> None:
    """Compare, or be the peer's half of a comparison."""
    if sys.argv[1:2] == [PEER_COMMAND]:
        peer_main(sys.argv[2:])
        return
    arguments = parse(sys.argv[1:])
    if arguments.make_peer_env:
        arguments.peer_python = make_peer_environment(arguments.make_peer_env)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        compare(arguments, work)


if __name__ == "__main__":
    main()
