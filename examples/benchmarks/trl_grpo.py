"""TRL's ``GRPOTrainer`` on the problems that ``rlvr.py`` made; needs the interpreter of an environment with TRL 1.16.

usage: python trl_grpo.py FOLDER STEPS PROMPTS GROUP LENGTH LR [option=value ...]

One optimiser step per generation, of all answers at once. Options are those of ``GRPOConfig``, over its defaults but
for float32, the loss of the paper, a fixed order and no files.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from itertools import pairwise
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
import transformers
import trl
from rlvr import clock, evenness

folder, lr = sys.argv[1], float(sys.argv[6])
steps, prompts, group, length = map(int, sys.argv[2:6])
options = {k: json.loads(v) for k, v in (o.split("=") for o in sys.argv[7:])}
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
began: list[float] = []
rewards: list[float] = []


class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        began.append(clock())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        began.append(clock())


def reward(completions: list[str], **_: Any) -> list[float]:
    found = [evenness("", answer, None) for answer in completions]
    rewards.append(sum(found) / len(found))
    return found


config = trl.GRPOConfig(
    **{
        "output_dir": os.path.join(folder, "trl"),
        "per_device_train_batch_size": prompts * group,
        "steps_per_generation": 1,
        "num_generations": group,
        "max_completion_length": length,
        "max_steps": steps,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "loss_type": "grpo",
        "bf16": False,
        "use_cpu": True,
        "shuffle_dataset": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        **options,
    }
)
trainer = trl.GRPOTrainer(
    model=transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "policy"), dtype=torch.float32),
    reward_funcs=reward,
    args=config,
    train_dataset=datasets.load_dataset("json", data_files=os.path.join(folder, "problems.jsonl"), split="train"),
    processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(os.path.join(folder, "policy")),
    callbacks=[Clock()],
)
trainer.train()
print(
    json.dumps(
        {
            "seconds": [b - a for a, b in pairwise(began)],
            "rewards": [sum(ten) / len(ten) for ten in (rewards[i : i + 10] for i in range(0, len(rewards), 10))],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        }
    )
)
