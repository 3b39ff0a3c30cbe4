#!/usr/bin/env bash
# DDP, FSDP2 and SDP side by side on this machine's CPU, from nothing but Python (3.11 or newer) and a package index:
#
#     bash examples/quickstart.sh [--level neuron|block] [--masking forward|backward] [--coverage 0.5]
#                                 [--sharding full|none] [--workers 4] [--steps 80] [--help]
#
# Installs into .venv (once), trains for about five minutes on two cores, and prints a table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/install.sh bench  # the corpus needs datasets and tokenizers
# The corpus and the model are made here: nothing is looked up on a hub. The profiler that measures memory is kept quiet.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false KINETO_LOG_LEVEL=99 TORCH_CPP_LOG_LEVEL=ERROR
exec python examples/quickstart.py "$@"
