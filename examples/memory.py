"""What memory training a language model takes: by setting for three sizes, and the estimate beside what runs take.

usage: python examples/memory.py [--measure] [--only NAME ...]

Without options, prints the estimate that the first screen shows for Qwen2.5-0.5B, Qwen2.5-1.5B and Llama-3.1-8B on one
GPU, by setting. Configurations are written here; nothing is loaded and no GPU is needed, so nothing is measured.

``--measure`` trains a Llama of 17 million random parameters by DPO for two steps on the CPU, each setting in a process
of its own, and prints the peak of its memory beside the estimate. The peak is that of memory in use in the second step,
less that of a run of a model of almost no size, which is what Python, its objects and libraries take.

Prints a Markdown table, and one JSON object at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from offpolicy.compute.memory import M_MMAP_THRESHOLD
from offpolicy.data.texts.module import TextData
from offpolicy.language import room

LENGTH, ROWS = 1024, 8  # tokens of a pair, or of a prompt with its answer; rows of a micro-batch by default
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        **{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864},
        **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "Qwen2.5-1.5B": {
        **{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960},
        **{"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "Llama-3.1-8B": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    },
}
BASE: dict[str, Any] = {"adapter": LORA, "dtype": "bfloat16"}
SETTINGS: dict[str, dict[str, Any]] = {
    "all weights, float32, AdamW": {},
    "all weights, float32, `adamw_8bit`": {"optimizer": "adamw_8bit"},
    "all weights, bfloat16, `offload_optimizer`": {"dtype": "bfloat16", "offload": True},
    "LoRA": BASE,
    "LoRA, `gradient_checkpointing`": {**BASE, "checkpointing": True},
    "LoRA, `quantize 4bit`, `gradient_checkpointing`": {**BASE, "checkpointing": True, "quantize": "4bit"},
    "LoRA, GRPO": {**BASE, "own_mask": False, "cached_rows": 256, "cached_length": LENGTH},
}
SMALL = {
    **{"vocab_size": 8000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 1024},
}
TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
RUNS: dict[str, dict[str, Any]] = {
    "float32, AdamW": {},
    "`gradient_checkpointing`": {"gradient_checkpointing": True},
    "LoRA": {"lora_rank": 8},
    "LoRA, `gradient_checkpointing`": {"lora_rank": 8, "gradient_checkpointing": True},
    "LoRA, bfloat16": {"lora_rank": 8, "dtype": "bfloat16"},
    "LoRA, `quantize 4bit`": {"lora_rank": 8, "quantize": "4bit"},
    "`reference live`": {"reference": "live"},
    "`adafactor`": {"optimizer": "adafactor"},
    "`adamw_8bit`": {"optimizer": "adamw_8bit"},
    "bfloat16, `offload_optimizer`": {"dtype": "bfloat16", "offload_optimizer": True},
}


# -- by setting, for three sizes ---------------------------------------------------------------------------------------


def estimates() -> dict[str, dict[str, dict[str, Any]]]:
    """Setting → model → parts in bytes on a GPU, and bytes on the host."""
    from transformers import AutoConfig

    from offpolicy.language.memory import Workload, estimate_memory

    usual = Workload(rows=ROWS, length=LENGTH, own_mask=True, device="cuda")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, fields in SETTINGS.items():
        for model, shape in SHAPES.items():
            estimate = estimate_memory(AutoConfig.for_model(**shape), replace(usual, **fields))
            parts = {"parts": estimate.parts, "total": estimate.total, "host": estimate.host}
            found.setdefault(name, {})[model] = parts
    return found


def print_estimates(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(f"| setting | {' | '.join(SHAPES)} |\n|---|{'---:|' * len(SHAPES)}")
    for name, row in found.items():
        cells = [
            f"{one['total'] / 1e9:.1f}" + f" + {one['host'] / 1e9:.1f}" * bool(one["host"]) for one in row.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


# -- the estimate beside what runs take --------------------------------------------------------------------------------


def made_policy(folder: Path, **sizes: Any) -> None:
    """A Llama with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789 +-=.?abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def write_pairs(file: Path) -> Path:
    """Four pairs of a prompt of 64 characters and two answers of 96."""
    import random

    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=count))

    rows = [{"prompt": text(64), "chosen": text(95), "rejected": text(95)} for _ in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def mapped_weights() -> int:
    """Bytes of weights that are read where their file is mapped into memory."""
    count, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counts = line.endswith(".safetensors")
        elif counts and line.startswith("Rss:"):
            count += int(line.split()[1]) << 10
        elif counts and line.startswith("Anonymous:"):  # changed since, and no longer of the file
            count -= int(line.split()[1]) << 10
    return count


def trained(folder: Path, watch: Any, sizes: dict[str, Any], **options: Any) -> Any:
    """DPO of two steps, each of two micro-batches of two pairs."""
    import offpolicy as op

    in_copy(partial(made_policy, folder / "policy", **sizes))  # of which nothing stays in this process
    how = {"batch_size": 4, "micro_batch_size": 2, "ref_cache": str(folder), "export": "none", "check_memory": False}
    method = op.DPO(policy=str(folder / "policy"), lr=1e-5, **how, **options)
    data = TextData(str(write_pairs(folder / "pairs.jsonl")), eval_fraction=0.0, show=0)
    given = {"folder": folder / "run", "verbose": False, "eval_episodes": 0, "threads": 1, "callbacks": watch}
    op.fit(method, data, max_steps=2, final="weights_only", **given)
    return method


class Watch(Callback):
    """Reads the peak of the memory in the second step."""

    peak = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1 and module.micro.current == 0:
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 1 << 18)  # what is freed is given back: what is in use is measured
            library.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def on_train_batch_end(self, *_: Any) -> None:
        self.peak = resident("VmHWM") - resident("RssFile") - resident("RssShmem") + mapped_weights()


def peak_of(sizes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The peak of one run in this process, and its estimate, in bytes."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        estimate = trained(Path(place), [watch], sizes, **options)._room.estimate
    return {"measured": watch.peak, "estimate": estimate.total, "parts": estimate.parts}


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """Each setting in copies of this process, which has done all of it with a tiny model before."""
    room.SMALL = 0  # models that fit everywhere are estimated too
    with tempfile.TemporaryDirectory() as place:
        trained(Path(place), [], TINY, lora_rank=2, gradient_checkpointing=True)
    tiny = in_copy(partial(peak_of, TINY, {}))
    found = {}
    print("| setting | measured, MB | estimate, MB | estimate / measured |\n|---|---:|---:|---:|", flush=True)
    for name in names:
        small = in_copy(partial(peak_of, SMALL, RUNS[name]))
        one = {key: small[key] - tiny[key] for key in ("measured", "estimate")}
        found[name] = one | {"parts": small["parts"]}
        ratio = one["estimate"] / one["measured"]
        print(f"| {name} | {one['measured'] / 1e6:,.0f} | {one['estimate'] / 1e6:,.0f} | {ratio:.2f} |", flush=True)
    return found


def in_copy(call: Callable[[], Any]) -> Any:
    """What a function gives in a copy of this process."""
    read, write = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            os.write(write, json.dumps(call()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    if os.waitstatus_to_exitcode(os.wait()[1]):
        raise RuntimeError("the copy of this process has failed")
    return json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--only", nargs="*", help="settings of --measure")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.only or list(RUNS))))
    else:
        found = estimates()
        print_estimates(found)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
