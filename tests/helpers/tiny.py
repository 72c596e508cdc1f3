"""A tiny policy, its tokenizer and a few pairs, made on the spot, for tests and for the scripts they start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from offpolicy.data.replay import Replay
from offpolicy.data.texts.module import TextData
from offpolicy.language.module import LanguageModule
from offpolicy.registry import find_method
from offpolicy.training.checkpoint_io import AtomicCheckpointIO
from offpolicy.training.run_folder import RunFolder

os.environ["HF_HUB_OFFLINE"] = "1"
VOCABULARY = 64


def make_policy(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Llama of two layers with random weights, saved; its tokenizer knows single characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "max_position_embeddings": 128,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | config)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-=.?"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def write_pairs(path: Path, rows: int = 40, seed: int = 0) -> Path:
    """Sums with a right and a wrong answer, as JSON lines."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        a, b = rng.integers(1, 50, 2)
        wrong = a + b + rng.integers(1, 9)
        lines.append(json.dumps({"prompt": f"{a} + {b} = ", "chosen": f"{a + b}", "rejected": f"it is {wrong}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def toy_pairs(rows: int = 13, seed: int = 0, **facts: np.ndarray) -> Replay:
    """Random pairs of different lengths; the table counts as tokenised for any model of 64 tokens."""
    rng = np.random.default_rng(seed)
    texts: list[np.ndarray] = []
    table = []
    for _ in range(rows):
        first = len(texts)
        for longest in (9, 7, 7):
            texts.append(rng.integers(3, VOCABULARY, rng.integers(2, longest + 1)))
        table.append([first, first + 1, first, first + 2])
    length = np.array([len(text) for text in texts])
    tables = {"pairs": np.array(table), "pairs/row": np.arange(rows), **{f"pairs/{k}": v for k, v in facts.items()}}
    steps = {"token": np.concatenate(texts).astype(np.uint8)}
    meta = {"name": "toy-pairs", "source": "text"}
    return Replay(steps, start=np.cumsum(length) - length, length=length, tables=tables, meta=meta)


def toy_lists(rows: int = 13, seed: int = 0, objectives: int = 0) -> Replay:
    """Random prompts with two or three scored answers each; with ``objectives`` every score is as many numbers."""
    rng = np.random.default_rng(seed)
    texts: list[np.ndarray] = []
    table, group = [], []
    for row in range(rows):
        prompt = len(texts)
        texts += [rng.integers(3, VOCABULARY, rng.integers(2, 8)) for _ in range(1 + rng.integers(2, 4))]
        table += [[prompt, answer] for answer in range(prompt + 1, len(texts))]
        group += [row] * (len(texts) - prompt - 1)
    length = np.array([len(text) for text in texts])
    score = rng.normal(size=(len(table), objectives) if objectives else len(table)).astype(np.float32)
    tables = {"singles": np.array(table), "singles/group": np.array(group), "singles/score": score}
    steps = {"token": np.concatenate(texts).astype(np.uint8)}
    meta = {"name": "toy-lists", "source": "text"}
    return Replay(steps, start=np.cumsum(length) - length, length=length, tables=tables, meta=meta)


def toy_prompt_pairs(rows: int = 13, seed: int = 0) -> Replay:
    """Toy pairs of which a third are one answer to two prompts, and a third two answers under two prompts."""
    replay = toy_pairs(rows, seed)
    table, other = replay.tables["pairs"].copy(), np.roll(replay.tables["pairs"][:, 0], 1)
    table[1::3, 3] = table[1::3, 1]
    for first in (1, 2):
        table[first::3, 2] = other[first::3]
    tables = replay.tables | {"pairs": table}
    return Replay(replay.steps, start=replay.start, length=replay.length, tables=tables, meta=replay.meta)


def toy_texts(name: str, rows: int = 13, seed: int = 0) -> Replay:
    """Toy data of the kind that the method of this name learns from."""
    makers: dict[str, Any] = {"CoPG": toy_lists, "DPA": partial(toy_lists, objectives=2), "MAPL": toy_prompt_pairs}
    return makers.get(name, toy_pairs)(rows, seed)


def method(name: str, policy: Path, **options: Any) -> Any:
    """A small method, with seed 0, rows every 2 steps and an evaluation every 3."""
    settings = {"policy": str(policy), "lr": 1e-2, "batch_size": 4, "ref_cache": str(policy.parent / "references")}
    module = find_method(name)(**settings | options)
    module.seed, module.run.threads, module.run.matmul = 0, None, "mkl"
    module.run.log_every, module.run.eval_every = 2, 3
    return module


def fit(
    module: LanguageModule,
    replay: Replay | None = None,
    max_steps: int = 6,
    folder: Path | None = None,
    ckpt_path: Path | None = None,
    callbacks: Sequence[Callback] = (),
    held_out: bool = True,
    **options: Any,
) -> LanguageModule:
    """Train to ``max_steps``, in a run folder when one is given."""
    from toy import quiet

    name = type(module).__name__
    data = TextData.of(replay or toy_texts(name), toy_texts(name, 5, 1) if held_out else None)
    if folder:
        options |= {"default_root_dir": str(folder), "enable_checkpointing": True}
        callbacks = [*callbacks, RunFolder(folder)]
    quiet(max_steps, callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


__all__ = ["AtomicCheckpointIO", "RunFolder", "fit", "make_policy", "method", "toy_pairs", "write_pairs"]
