"""Reinforcement tuning from Python, cell by cell: a reward of one's own on a small model with random weights."""

# %% A reward: the number for one answer, from prompt, answer and reference. It lies in a file, so that a resumed run
# finds it again.
import sys
from pathlib import Path

Path("notebook_rewards.py").write_text("def short(prompt, answer, reference):\n    return 1.0 - len(answer) / 100\n")
sys.path.insert(0, ".")

# %% The policy: any folder or hub id of a causal language model. Here one is made.
import offpolicy as op  # noqa: E402

sys.path.append(str(Path(op.__file__).parents[1] / "examples" / "preference"))
from make_policy import make_policy  # noqa: E402

make_policy(Path("tiny"))

# %% Problems and training: two rounds of answers, four to a problem.
method = op.GRPO(
    policy="tiny",
    rewards=["notebook_rewards.short", {"name": "exact", "weight": 0.5}],
    group_size=4,
    batch_size=16,
    max_new_tokens=4,
    iterations=2,
    eval_rows=8,
)
run = op.fit(method, "addition", threads=1)
print(run.folder)

# %% Rewards by iteration.
import csv  # noqa: E402

with (Path(run.folder) / "metrics.csv").open() as file:
    for row in csv.DictReader(file):
        print(row["step"], row.get("train/reward/own"), row.get("train/groups/zero_signal"))

# %% A published variant of the objective, by name.
variant = op.GRPO(
    policy="tiny", variant="dr_grpo", group_size=4, batch_size=16, max_new_tokens=4, iterations=1, eval_rows=8
)
print(op.fit(variant, "addition", threads=1).folder)
