"""A sweep as one array job of SLURM: the script is written and not submitted."""

from __future__ import annotations

import shlex
from pathlib import Path

from offpolicy.sweep.plan import SweepPlan
from offpolicy.sweep.pool import threads_of

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=offpolicy-sweep
#SBATCH --array=0-{last}%{workers}
#SBATCH --cpus-per-task={threads}
#SBATCH --output={folder}/logs/slurm-%A_%a.out
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# Add what your cluster asks for: --partition, --account, --time, --gres=gpu:1. Submit with: sbatch {script}
# Submitting it again goes on with what is unfinished and repeats nothing.
set -euo pipefail
cd {here}
export OMP_NUM_THREADS={threads}
{python} -m offpolicy.sweep {plan} --cell "$SLURM_ARRAY_TASK_ID" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"
"""


def array_script(plan: SweepPlan, processes: int, plan_file: Path, script: Path, python: str) -> str:
    """The script of an array with a task for each process of a plan."""
    return SCRIPT.format(
        last=processes - 1,
        workers=plan.workers,
        threads=threads_of(plan),
        folder=shlex.quote(str(plan.folder)),
        here=shlex.quote(str(Path.cwd())),
        python=shlex.quote(python),
        plan=shlex.quote(str(plan_file)),
        script=shlex.quote(str(script)),
    )
