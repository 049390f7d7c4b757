"""Perplexity of a model pruned with each way to share out the sparsity, and what that takes.

python scripts/bench_allocation.py MODEL --text TEXT.txt --patterns 50%,60%,70% --json rows.jsonl

The first half of the text is for calibration, the second for the perplexity: windows of the calibration's length, evenly
spaced. Rows hold processor seconds of the run, allocation and all.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.recipe import ALLOCATIONS


@torch.no_grad()
def perplexity(model: Any, windows_NL: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each window."""
    total = 0.0
    for batch in windows_NL.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / windows_NL[:, 1:].numel())


def main() -> None:
    """Print one JSON line for each pattern and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--patterns", default="50%,60%,70%")
    parser.add_argument("--ways", default=",".join(ALLOCATIONS))
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=117)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    text = asked.text.read_text("utf-8")
    ids = torch.tensor(tokenizer(text[len(text) // 2 :], add_special_tokens=False).input_ids)
    windows_NL = ids[: len(ids) // asked.length * asked.length].view(-1, asked.length)
    windows_NL = windows_NL[torch.linspace(0, len(windows_NL) - 1, asked.windows).long()]
    calibration = tokenizer(text[: len(text) // 2], add_special_tokens=False, return_tensors="pt").input_ids[0]
    starts = torch.randint(
        len(calibration) - asked.length, (asked.samples,), generator=torch.Generator().manual_seed(0)
    )
    rows_NL = torch.stack([calibration[start : start + asked.length] for start in starts])
    for pattern in asked.patterns.split(","):
        for way in asked.ways.split(","):
            model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
            started = time.process_time()
            report = llmprune.prune(model, preset=asked.preset, pattern=pattern, allocation=way, calibration=rows_NL)
            row = {
                "pattern": pattern,
                "allocation": way,
                "seconds": round(time.process_time() - started, 2),
                "perplexity": round(perplexity(model, windows_NL), 4),
                "sparsity": report.zeros / report.site_parameters,
            }
            print(json.dumps(row), flush=True)
            if asked.json:
                with asked.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
