"""TRL's ``DPOTrainer`` on the pairs that ``preference.py`` made; needs the interpreter of an environment with TRL 1.16.

usage: python trl_dpo.py FOLDER STEPS BATCH LR [option=value ...]

Options are those of ``DPOConfig``, over its defaults but for float32, a fixed order and no files.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
import transformers
import trl

folder, steps, batch, lr = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
options = {k: json.loads(v) for k, v in (o.split("=") for o in sys.argv[5:])}
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
spent: list[float] = []


class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        spent.append(time.process_time())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        spent.append(time.process_time())


class Trainer(trl.DPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss


losses: list[float] = []
config = trl.DPOConfig(
    **{
        "output_dir": os.path.join(folder, "trl"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": lr,
        "bf16": False,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        **options,
    }
)
trainer = Trainer(
    model=transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "policy"), dtype=torch.float32),
    args=config,
    train_dataset=datasets.load_dataset("json", data_files=os.path.join(folder, "pairs.jsonl"), split="train"),
    processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(os.path.join(folder, "policy")),
    callbacks=[Clock()],
)
trainer.train()
skip = min(2, steps - 1)
print(
    json.dumps(
        {
            "cpu_s_per_step": (spent[-1] - spent[skip]) / (steps - skip),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "losses": losses,
            "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        }
    )
)
