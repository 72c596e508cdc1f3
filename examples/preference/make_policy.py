"""A small causal language model with random weights and a tokenizer of its own: a policy to try things with offline.

usage: python examples/preference/make_policy.py OUT [--width 64] [--layers 2] [--vocabulary 1024] [--seed 0]

The tokenizer (byte-level BPE) is learned from the GSM8K solutions in data/. The folder opens with
``transformers.AutoModelForCausalLM.from_pretrained`` and serves as ``--model.policy``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"


def make_policy(out: Path, *, width: int = 64, layers: int = 2, vocabulary: int = 1024, seed: int = 0) -> None:
    """Write a Llama of this width and depth, with tied embeddings and a context of 1,024 tokens."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with gzip.open(DATA / "gsm8k_train.jsonl.gz", "rt") as file:
        texts = ["\n".join(json.loads(line).values()) for line in file]
    pieces = ByteLevelBPETokenizer()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    pieces.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=list(special.values()), show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special).save_pretrained(out)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {vocabulary:,} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    make_policy(arguments.pop("out"), **arguments)
