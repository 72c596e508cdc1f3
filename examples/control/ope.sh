#!/usr/bin/env bash
# Fitted Q evaluation of six short runs on pendulum-stitch against what they score in the simulator.
# Run in an empty folder: bash PATH/examples/control/ope.sh
set -euo pipefail
fit() { # method, updates
  python -m offpolicy.fit --model "$1" --data pendulum-stitch-v0 --trainer.max_steps "$2" --run.eval_every 0 \
    --run.eval_episodes 20 --model.hidden_dims '[64,64]' --folder "ope/$1-$2"
}
for updates in 100 500 2000; do
  fit BC "$updates"
  fit TD3BC "$updates"
done
python -m offpolicy.ope ope/* --data pendulum-stitch-v0 --discount 0.95 --updates 12000 --critics 2 --hidden_dims 64 64
