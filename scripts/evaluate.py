"""Measure a model's perplexity from Python.

python scripts/evaluate.py pruned --data demo
"""

import argparse

import llmprune

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a folder, a Hub id, or demo")
parser.add_argument("--data", help="wikitext2, c4, ptb, a Hub data set, or a file")
parser.add_argument("--length", type=int, help="tokens a window")
args = parser.parse_args()

print(llmprune.evaluate(args.model, args.data, length=args.length))
