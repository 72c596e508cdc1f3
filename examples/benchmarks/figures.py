"""What benchmarks share: a figure from a process of its own, what it was measured on, a tokenizer of whole words."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def figure(command: list[str], threads: int) -> dict[str, Any]:
    """The JSON object that a command prints last, with so many threads and without the network."""
    count = str(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def about(**settings: Any) -> dict[str, Any]:
    """Machine, versions and settings, for beside the figures."""
    import torch

    from offpolicy.compute.matmul import choose_matmul

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul": choose_matmul("auto"),
        **settings,
    }


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer that knows the words w1, w2, … and its end token, number 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
