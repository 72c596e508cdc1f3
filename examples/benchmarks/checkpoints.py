"""Seconds that checkpoints cost a run: written while it waits, and while it goes on.

usage: python examples/benchmarks/checkpoints.py [--layers 12] [--width 768] [--steps 12] [--every 4]

SFT of a random Qwen2-shaped model (by default 138 million parameters, so checkpoints of 1.65 GB) on random texts,
float32, one thread. The run is made without checkpoints but the last, with one every few updates that it waits for, and
with the same written beside training. Seconds are those from the first update to the last, the end of the run (which
waits for its last checkpoint) by itself. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # also where it is imported from a test
from figures import save_tokenizer  # noqa: E402

VOCABULARY, LENGTH, ROWS = 32_000, 64, 2


def prepare(folder: Path, layers: int, width: int) -> int:
    """Save the policy and its tokenizer; returns its number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY)
    return sum(p.numel() for p in model.parameters())


def texts(rows: int) -> Any:
    """Random answers to random prompts, as tokens."""
    import numpy as np

    from offpolicy.data.replay import Replay

    tokens = np.random.default_rng(0).integers(10, VOCABULARY, 3 * rows * LENGTH)
    length = np.full(3 * rows, LENGTH)
    prompt, chosen, rejected = np.arange(3 * rows).reshape(3, rows)  # SFT takes the chosen answers
    tables = {"pairs": np.stack([prompt, chosen, prompt, rejected], 1), "pairs/row": np.arange(rows)}
    return Replay(
        {"token": tokens.astype(np.uint16)},
        start=np.cumsum(length) - length,
        length=length,
        tables=tables,
        meta={"name": "random texts", "source": "text"},
    )


def run(folder: Path, policy: Path, steps: int, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of the updates with their checkpoints, and of the end of the run."""
    from lightning.pytorch import Callback

    import offpolicy
    from offpolicy.data.texts.module import TextData

    marks: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    method = offpolicy.SFT(policy=str(policy), lr=1e-5, batch_size=ROWS, export="none")
    settings = {"eval_every": 0, "eval_episodes": 0, "accelerator": "cpu", "verbose": False, "threads": 1}
    offpolicy.fit(
        method,
        TextData.of(texts(ROWS * steps)),
        max_steps=steps,
        folder=folder / "run",
        callbacks=[Clock()],
        **settings,
        **options,
    )
    ended = time.perf_counter()
    return {"updates": marks[-1] - marks[1], "end": ended - marks[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 768), ("steps", 12), ("every", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    kinds: dict[str, dict[str, Any]] = {
        "none": {"save_every": 0},
        "waits": {"save_every": args.every, "async_save": False, "keep": "last"},
        "beside": {"save_every": args.every, "async_save": True, "keep": "last"},
    }
    with tempfile.TemporaryDirectory() as place:
        policy = Path(place) / "policy"
        found: dict[str, Any] = {"parameters": prepare(policy, args.layers, args.width)}
        for name, options in kinds.items():
            folder = Path(place) / name
            folder.mkdir()
            found[name] = {k: round(v, 2) for k, v in run(folder, policy, args.steps, options).items()}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
