#!/usr/bin/env bash
# The comparison of this folder. As root (for --throttle), with nothing else running. About 15 minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec hf-sdp compare --workers 4 --batch 4 --seq 128 --rounds 6 --loss-steps 40 --throttle none --throttle 1Gbit \
    --sdp level=neuron,coverage=0.5 --sdp level=block,coverage=0.5 \
    --sdp level=neuron,coverage=0.5,sharding=none --sdp level=block,coverage=0.5,sharding=none \
    --output examples/comparison "$@"
