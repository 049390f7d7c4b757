"""Time SparseGPT's solver alone: the plain column loop of the paper's code against both arithmetics of llmprune.

    OMP_NUM_THREADS=1 python scripts/bench_solver.py --shape 4096x4096 --pattern 50% --pattern 2:4 >> eval/results/solver.jsonl

One process, one Gram matrix of correlated inputs, the three forms taking turns. Prints one JSON row per shape and
pattern:

    plain_s, paper_s, fast_s    median wall seconds of one solve, factorisation included
    paper_speedup, fast_speedup medians of the ratios within a turn, plain / llmprune
    *_objective                 tr(D H Dᵀ) of the change D, H the damped Hessian, divided by the plain form's
    *_agreement                 share of equal mask entries
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench_peers import machine
from llmprune import patterns
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.patterns import NM, Pattern
from llmprune.statistics import Gram

TOKENS_PER_INPUT = 2  # with fewer than one the Gram matrix is singular but for its damping, and rounding decides
SEQUENCE = 4096
BLOCK = 128
DAMP = 0.01


def correlated_gram(inputs: int) -> Gram:
    """Inputs driven by a quarter as many factors of decaying strength, with noise and channels of unlike scale."""
    generator = torch.Generator().manual_seed(0)
    factors = inputs // 4
    strength_F = torch.arange(1, factors + 1).pow(-0.5)
    mixing_FI = torch.randn(factors, inputs, generator=generator)
    scale_I = torch.exp(0.5 * torch.randn(inputs, generator=generator))
    gram = Gram(inputs, torch.device("cpu"))
    for start in range(0, TOKENS_PER_INPUT * inputs, SEQUENCE):
        tokens = min(SEQUENCE, TOKENS_PER_INPUT * inputs - start)
        driven_TI = torch.randn(tokens, factors, generator=generator) * strength_F @ mixing_FI
        gram.add((driven_TI + 0.3 * torch.randn(tokens, inputs, generator=generator)) * scale_I, 1)
    return gram


def plain(weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern) -> Tensor:
    """The paper's loop: three factorisations, one column at a time, a full sort for each threshold."""
    weight_OI, hessian_II = weight_OI.clone(), hessian_II.clone()
    hessian_II.diagonal().add_(DAMP * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, weight_OI.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight_OI.shape[1]))
        weight_OI[:, block], error_OB = plain_block(weight_OI[:, block].clone(), upper_II[block, block], pattern)
        weight_OI[:, block.stop :] -= error_OB @ upper_II[block, block.stop :]
    return weight_OI


def plain_block(block_OB: Tensor, upper_BB: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    pruned_OB, error_OB = torch.zeros_like(block_OB), torch.zeros_like(block_OB)
    diagonal_B = upper_BB.diagonal()
    drop_OB = torch.zeros_like(block_OB, dtype=torch.bool)
    if not isinstance(pattern, NM):
        score_OB = block_OB**2 / diagonal_B**2
        drop_OB = score_OB < score_OB.flatten().sort().values[int(score_OB.numel() * pattern.sparsity)]
    for column in range(block_OB.shape[1]):
        if isinstance(pattern, NM) and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            score_OM = block_OB[:, group] ** 2 / diagonal_B[group] ** 2
            drop_OB.scatter_(1, column + score_OM.topk(pattern.m - pattern.n, dim=1, largest=False).indices, True)
        kept_O = block_OB[:, column].masked_fill(drop_OB[:, column], 0)
        error_O = (block_OB[:, column] - kept_O) / diagonal_B[column]
        block_OB[:, column:] -= error_O.unsqueeze(1) @ upper_BB[column, column:].unsqueeze(0)
        pruned_OB[:, column], error_OB[:, column] = kept_O, error_O
    return pruned_OB, error_OB


def own(weight_OI: Tensor, gram: Gram, pattern: Pattern, arithmetic: str) -> Tensor:
    gram.forget_factors()
    return SparseGPT(DAMP, BLOCK, arithmetic).solve(weight_OI, gram, pattern, torch.Generator()).weight_OI


def timed(solve: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    pruned_OI = solve()
    return time.perf_counter() - start, pruned_OI


def measure(outputs: int, gram: Gram, pattern: Pattern, repeat: int) -> dict[str, float]:
    """Return the medians and comparisons of one shape and pattern."""
    weight_OI = 0.02 * torch.randn(outputs, gram.inputs, generator=torch.Generator().manual_seed(1))
    forms: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain(weight_OI, gram.hessian_II, pattern),
        "paper": lambda: own(weight_OI, gram, pattern, "paper"),
        "fast": lambda: own(weight_OI, gram, pattern, "fast"),
    }
    turns = [{name: timed(solve) for name, solve in forms.items()} for _ in range(repeat)]
    row = {f"{name}_s": statistics.median(turn[name][0] for turn in turns) for name in forms}
    damped = Gram.from_matrix(gram.damped_II(DAMP))
    reference_OI = turns[-1]["plain"][1]
    for name in ("paper", "fast"):
        pruned_OI = turns[-1][name][1]
        row[f"{name}_speedup"] = statistics.median(turn["plain"][0] / turn[name][0] for turn in turns)
        row[f"{name}_objective"] = damped.energy(weight_OI - pruned_OI) / damped.energy(weight_OI - reference_OI)
        row[f"{name}_agreement"] = float(((pruned_OI != 0) == (reference_OI != 0)).float().mean())
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="OUTPUTSxINPUTS, repeatable; default 4096x4096 and 4096x11008")
    parser.add_argument("--pattern", action="append", help="repeatable; default 50%% and 2:4")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = {**machine(), "torch": torch.__version__, "threads": arguments.threads, "repeat": arguments.repeat}
    for shape in arguments.shape or ["4096x4096", "4096x11008"]:
        outputs, inputs = map(int, shape.split("x"))
        gram = correlated_gram(inputs)
        for text in arguments.pattern or ["50%", "2:4"]:
            pattern = patterns.in_group(patterns.parse(text), "block")
            print(
                json.dumps(
                    {"shape": shape, "pattern": text, **measure(outputs, gram, pattern, arguments.repeat), **where}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
