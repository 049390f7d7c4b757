"""Prune a model from Python.

python scripts/prune_model.py demo pruned --method sparsegpt --pattern 2:4
"""

import argparse

import llmprune

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a folder, a Hub id, or demo")
parser.add_argument("out", help="the folder to write")
parser.add_argument("--method", default="sparsegpt")
parser.add_argument("--pattern", default="50%", help="50%%, or N:M with N kept of every M")
parser.add_argument("--calibration", help="c4, wikitext2, a Hub data set, or a file")
args = parser.parse_args()

report = llmprune.prune(
    args.model, args.out, method=args.method, pattern=args.pattern, calibration=args.calibration, seed=0
)
print(report)
