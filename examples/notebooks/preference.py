"""Preference tuning from Python, cell by cell, on sums: a small model with random weights stands for yours."""

# %% Pairs: a prompt, a right answer and a wrong one. A list of dicts in a file is all it takes.
import json
import sys
from pathlib import Path

rows = [
    {"prompt": f"What is {a} + {b}?", "chosen": f" {a + b}", "rejected": f" {a + b + 1}"}
    for a in range(1, 9)
    for b in range(1, 9)
]
with open("pairs.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)

# %% The policy: any folder or hub id of a causal language model. Here one is made.
import offpolicy as op  # noqa: E402

sys.path.append(str(Path(op.__file__).parents[1] / "examples" / "preference"))
from make_policy import make_policy  # noqa: E402

make_policy(Path("tiny"))

# %% Train. What the model will see is printed first.
data = op.TextData("pairs.jsonl")
run = op.fit(op.DPO(policy="tiny", lr=1e-3, batch_size=8), data, max_steps=6, threads=1)
print(run.folder)

# %% What was measured on held-out pairs.
import csv  # noqa: E402

with open(Path(run.folder) / "evals.csv") as file:
    last = list(csv.DictReader(file))[-1]
print({name: last[f"eval/{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")})

# %% Another method is another name. SimPO needs no reference.
other = op.fit(op.SimPO(policy="tiny", lr=1e-3, batch_size=8), op.TextData("pairs.jsonl"), max_steps=4, threads=1)
print(other.folder)

# %% The tuned model is an ordinary folder for transformers.
from transformers import AutoModelForCausalLM  # noqa: E402

print(AutoModelForCausalLM.from_pretrained(Path(run.folder) / "hf").num_parameters())
