#!/usr/bin/env bash
# What each choice of SDPConfig costs, for hf_sdp/CHOOSING.md. About five minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec hf-sdp compare --workers 4 --batch 4 --seq 128 --rounds 6 \
    --engines ddp,fsdp2,fsdp2-no-reshard,sdp \
    --sdp level=block,coverage=0.5 --sdp level=neuron,coverage=0.5 \
    --sdp level=neuron,coverage=0.25 --sdp level=neuron,coverage=0.75 \
    --sdp level=neuron,coverage=0.5,masking=backward --sdp level=neuron,coverage=0.5,reshard_after_forward=true \
    --sdp level=neuron,coverage=0.5,sharding=none \
    --output examples/comparison/choices "$@"
