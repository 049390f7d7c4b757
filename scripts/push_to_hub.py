"""Publish a pruned model on the Hugging Face Hub, with a model card; the token is that of `hf auth login` or HF_TOKEN.

python scripts/push_to_hub.py pruned organisation/name --private
"""

import argparse

import llmprune

parser = argparse.ArgumentParser()
parser.add_argument("out", help="the folder that llmprune has written")
parser.add_argument("repo", help="organisation/name")
parser.add_argument("--private", action="store_true")
args = parser.parse_args()

print(llmprune.push(args.out, args.repo, private=args.private))
