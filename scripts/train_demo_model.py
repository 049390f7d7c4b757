"""Train the model that ships as `demo`: a 1.5 M-parameter Llama with its own byte-level BPE tokenizer.

    python scripts/train_demo_model.py --text train.txt.gz --out llmprune/demo

`--text` is plain or gzipped UTF-8, one paragraph a line, documents separated by a blank line. The shipped weights
were trained on the English text listed in `llmprune/demo/README.md` with the defaults below: about an hour on two
CPU cores. Everything is seeded; the same machine, torch version and thread count give the same weights.

The model is small on purpose and trained long on purpose: an under-trained model loses nothing when it is pruned,
so it cannot tell a good pruning method from a bad one.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256  # tokens per training window and the context of the model
VOCABULARY = 2048
SEED = 0


def read_documents(path: Path) -> list[str]:
    """Return the documents of a plain or gzipped text file; blank lines separate them."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [document for document in file.read().split("\n\n") if document.strip()]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that starts every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return all documents, each begun by `<s>`, as one int16 vector."""
    ids = []
    for start in range(0, len(documents), 256):
        for encoding in tokenizer.backend_tokenizer.encode_batch(documents[start : start + 256]):
            ids.append(torch.tensor(encoding.ids, dtype=torch.int16))
    return torch.cat(ids)


def new_model() -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor on the learning rate: linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, batch: int, lr: float) -> None:
    """Train in place on random windows of `tokens`."""
    optimizers = make_optimizers(model, lr)
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.cat(
        [torch.randperm(len(windows), generator=generator) for _ in range(steps * batch // len(windows) + 1)]
    )
    model.train()
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        for optimizer in optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr * schedule(step, steps)
        ids = windows[order[step * batch : (step + 1) * batch]].long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            rate = (step + 1) * ids.numel() / (time.monotonic() - started)
            print(
                json.dumps(
                    {
                        "step": step,
                        "loss": round(running, 4),
                        "perplexity": round(math.exp(running), 2),
                        "tokens_per_s": round(rate),
                    }
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=32, help="windows of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    documents = read_documents(args.text)
    tokenizer = train_tokenizer(documents)
    tokens = tokenize(tokenizer, documents)
    print(json.dumps({"documents": len(documents), "tokens": len(tokens)}), flush=True)
    model = new_model()
    train(model, tokens, args.steps, args.batch, args.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
