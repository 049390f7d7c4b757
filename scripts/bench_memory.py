"""Measure the peak memory of pruning a model that is much larger than one block.

    python scripts/bench_memory.py --work bench_work                    # a Llama of 2.38 B parameters
    python scripts/bench_memory.py --work bench_work --model mixture    # a mixture of experts of 1.95 B parameters

Writes the randomly initialised model in bfloat16 (4 to 5 GB in shards of about 1 GB, one shard in memory at a time),
prunes it in a child process with `python -m llmprune prune`, and checks what came out. `--work` keeps the checkpoint
for the next run; without it everything goes to a temporary folder.

Prints one JSON row:

    wall_s, cpu_s, peak_rss_bytes   of the whole pruning process
    timings        the phases that the process reported itself
    checks         pattern: the Linear weights of every block have exactly the zeros asked for
                   kept_equal: what they keep is what the source held (for methods that only mask)
                   rest_equal: every other tensor is the source's, byte for byte
                   logits_equal: the streamed forward gives the logits of the plain one, bit for bit

and ends with status 1 when a check failed. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench_peers import VOCABULARY, Row, in_child, machine, own_environment, run_measured, say, write_random_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

INIT_STD = 0.02
SEED = 0
SHARD_BYTES = 1_000_000_000
MASK_ONLY = ("magnitude", "random", "wanda")
TOTAL_TOLERANCE = 1e-3  # methods that pool their scores over rows promise the total only
INDEX = "model.safetensors.index.json"


Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Llama:
    """Dense decoder blocks of 79 M parameters."""

    hidden: int = 2560
    intermediate: int = 6912
    heads: int = 20
    blocks: int = 28

    def config(self) -> PretrainedConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            intermediate_size=self.intermediate, architectures=["LlamaForCausalLM"], **common_fields(self)
        )

    def feed_forward_shapes(self) -> Shapes:
        yield from projection_shapes("", self.hidden, self.intermediate)


@dataclass(frozen=True)
class Mixture:
    """Qwen3-MoE blocks of 105 M parameters, 96 % of them in 64 experts, of which 8 see each token."""

    hidden: int = 1024
    intermediate: int = 512
    heads: int = 8
    blocks: int = 18
    experts: int = 64

    def config(self) -> PretrainedConfig:
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            intermediate_size=2048,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=8,
            architectures=["Qwen3MoeForCausalLM"],
            **common_fields(self),
        )

    def feed_forward_shapes(self) -> Shapes:
        yield "gate.weight", (self.experts, self.hidden)
        for expert in range(self.experts):
            yield from projection_shapes(f"experts.{expert}.", self.hidden, self.intermediate)


Model = Llama | Mixture
MODELS: dict[str, type[Llama] | type[Mixture]] = {"llama": Llama, "mixture": Mixture}


def common_fields(model: Model) -> Row:
    """Return the configuration fields that both models share."""
    import torch

    return {
        "head_dim": model.hidden // model.heads,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": torch.bfloat16,
    }


def projection_shapes(prefix: str, hidden: int, intermediate: int) -> Shapes:
    """Yield the three matrices of a gated feed-forward layer."""
    yield f"{prefix}gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}up_proj.weight", (intermediate, hidden)
    yield f"{prefix}down_proj.weight", (hidden, intermediate)


def block_shapes(model: Model, block: int) -> Shapes:
    """Yield the tensors of one decoder block."""
    prefix, hidden = f"model.layers.{block}", model.hidden
    for projection in "qkvo":
        yield f"{prefix}.self_attn.{projection}_proj.weight", (hidden, hidden)
    if isinstance(model, Mixture):
        for projection in "qk":
            yield f"{prefix}.self_attn.{projection}_norm.weight", (hidden // model.heads,)
    for name, shape in model.feed_forward_shapes():
        yield f"{prefix}.mlp.{name}", shape
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def model_shapes(model: Model) -> Shapes:
    """Yield every tensor of the model in checkpoint order."""
    yield "model.embed_tokens.weight", (VOCABULARY, model.hidden)
    for block in range(model.blocks):
        yield from block_shapes(model, block)
    yield "model.norm.weight", (model.hidden,)
    yield "lm_head.weight", (VOCABULARY, model.hidden)


def random_tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a seeded bfloat16 weight, or the ones of a norm."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * INIT_STD).to(torch.bfloat16)


def shards(model: Model) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of the model in shards of about `SHARD_BYTES`."""
    shard: dict[str, torch.Tensor] = {}
    for offset, (name, shape) in enumerate(model_shapes(model)):
        shard[name] = random_tensor(shape, SEED + offset)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_model(folder: Path, model: Model) -> None:
    """Write the checkpoint; the index comes last, so a folder that has one is whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.config().save_pretrained(folder)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards(model), start=1):
        file_name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
        total += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # the loop variable would keep this shard alive while the next one is made
        say(f"wrote {file_name}")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def source_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a sharded checkpoint one at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is not iterable
                yield name, file.get_tensor(name)


def has_zeros(weight: torch.Tensor, method: str, pattern: str) -> bool:
    """Return whether a weight has the zeros that the method promises for the pattern."""
    zero = weight == 0
    if ":" in pattern:
        keep, group = (int(part) for part in pattern.split(":"))
        return bool((zero.view(-1, group).sum(1) == group - keep).all())
    asked = float(pattern.rstrip("%")) / 100
    if method == "wanda":
        return bool((zero.sum(1) == int(weight.shape[1] * asked)).all())
    return abs(zero.double().mean().item() - asked) <= TOTAL_TOLERANCE


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bytes; `==` alone would take -0.0 for 0.0."""
    import torch

    return left.dtype == right.dtype and torch.equal(left.view(torch.int16), right.view(torch.int16))


def check_weights(out: Path, source: Path, method: str, pattern: str) -> dict[str, bool]:
    """Compare the files of the output with the source's, one tensor at a time."""
    checks = {"pattern": True, "rest_equal": True}
    if method in MASK_ONLY:
        checks["kept_equal"] = True
    for (name, pruned), (original_name, original) in zip(source_tensors(out), source_tensors(source), strict=True):
        checks["rest_equal"] &= name == original_name
        if ".layers." not in name or original.dim() != 2 or name.endswith(".gate.weight"):
            checks["rest_equal"] &= same_bytes(pruned, original)
            continue
        checks["pattern"] &= has_zeros(pruned, method, pattern)
        if method in MASK_ONLY:
            keep = pruned != 0
            checks["kept_equal"] &= same_bytes(pruned[keep], original[keep])
    return checks


def streamed(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the block-by-block forward."""
    from llmprune.model import streamed_logits

    return streamed_logits(folder, ids)


def check_output(out: Path, source: Path, method: str, pattern: str) -> dict[str, bool]:
    """Load the output whole and check its weights and its logits."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.randint(VOCABULARY, (1, 128), generator=torch.Generator().manual_seed(SEED))
    checks = check_weights(out, source, method, pattern)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = model(ids).logits
    del model
    return checks | {"logits_equal": torch.equal(plain, streamed(out, ids))}


def bench(arguments: argparse.Namespace, work: Path) -> Row:
    """Make the model when it is not there yet, prune it, and return the row."""
    shape = MODELS[arguments.model]()
    model, out, tokens = work / arguments.model, work / "pruned", work / "tokens.jsonl"
    if not (model / INDEX).exists():
        in_child(write_model, model, shape)
    in_child(write_random_tokens, tokens, arguments.sequences, arguments.length)
    shutil.rmtree(out, ignore_errors=True)
    say(f"pruning {model}")
    task = ["--method", arguments.method, "--pattern", arguments.pattern, "--calibration", str(tokens), "--json"]
    command = [sys.executable, "-m", "llmprune", "prune", str(model), str(out), *task]
    run = run_measured(command, work / "prune.log")
    say(f"{run.wall_s:.1f} s, {run.peak_rss_bytes:,} bytes; checking the output")
    size = json.loads((model / INDEX).read_text())["metadata"]["total_size"]
    return {
        "model": arguments.model,
        "parameters": size // 2,
        "checkpoint_bytes": size,
        "blocks": shape.blocks,
        "method": arguments.method,
        "pattern": arguments.pattern,
        "sequences": arguments.sequences,
        "length": arguments.length,
        "wall_s": round(run.wall_s, 3),
        "cpu_s": round(run.cpu_s, 3),
        "peak_rss_bytes": run.peak_rss_bytes,
        "timings": run.answer["timings"],
        "checks": in_child(check_output, out, model, arguments.method, arguments.pattern),
        **in_child(own_environment),
        "machine": machine(),
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure the peak memory of pruning a model of 2 B parameters.")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--pattern", default="50%")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep everything here (default: a temporary folder)")
    return parser.parse_args()


def main() -> int:
    """Print the row and return the exit status."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        row = bench(arguments, work)
    print(json.dumps(row), flush=True)
    return 0 if all(row["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
