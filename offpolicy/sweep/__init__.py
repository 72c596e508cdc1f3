"""Many runs by one plan: seeds by tasks by methods by settings, on this machine, on Ray or under SLURM."""
