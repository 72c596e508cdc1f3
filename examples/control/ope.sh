#!/usr/bin/env bash
# Offline evaluation of six methods × five seeds on pendulum-stitch, against what they score in the simulator.
# Run in an empty folder: bash PATH/examples/control/ope.sh
set -euo pipefail
python -m offpolicy.sweep --methods BC TD3BC IQL PRDC A2PR ODICE --data pendulum-stitch-v0 --seeds 0..4 \
  --folder stitch --report none
runs=stitch/pendulum-stitch-v0
fit=(--data pendulum-stitch-v0 --discount 0.95 --updates 3000 --tau 0.02 --critics 2 --hidden_dims 64 64)
python -m offpolicy.ope $runs/*/seed? "${fit[@]}" --k 1,3,5 --play 20 --out stitch/fqe
python -m offpolicy.ope $runs/IQL*/seed? $runs/ODICE*/seed? "${fit[@]}" --estimators wis,pdis,dr --out stitch/weights
