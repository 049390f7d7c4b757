"""Measure models from Python: perplexity, and how far the predictions of the pruned ones are from the first's.

python scripts/evaluate.py demo pruned --data demo
"""

import argparse

import llmprune

parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="+", help="folders, Hub ids, or demo; the dense one first")
parser.add_argument("--data", nargs="+", default=[None], help="wikitext2, c4, ptb, a Hub data set, or a file")
parser.add_argument("--length", type=int, help="tokens a window")
parser.add_argument("--save", action="store_true", help="keep the figures for the model card")
args = parser.parse_args()

print(llmprune.compare(args.models, args.data, length=args.length, save=args.save))
