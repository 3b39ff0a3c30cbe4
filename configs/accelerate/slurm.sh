#!/usr/bin/env bash
# SDP on the nodes of a SLURM job, one worker for each GPU. From the root of this repository, with hf_sdp installed in
# the environment that is active:
#
#     sbatch configs/accelerate/slurm.sh examples/pretrain_llama.py --sdp_level block --max_steps 20000
#     sbatch --nodes 4 configs/accelerate/slurm.sh -m hf_sdp.run --level block --coverage 0.5 script.py --its --own
#
# What follows the name of this file is what follows the options of `accelerate launch`. Options of the job are given to
# sbatch, before it. CONFIG is the file for accelerate launch: gpu_2x8.yaml, of which nodes and workers are replaced.
#SBATCH --job-name=sdp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one launcher on each node, which starts the workers of that node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64       # of the launcher, and so of all workers of the node together
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# For runs that are stopped and go on: with TrainingArguments(enable_jit_checkpoint=True) a script ends with a checkpoint
# when it gets this signal, 120 s before the time is over. It goes on from hf_sdp.last_checkpoint(output_dir) when the
# job runs again.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

workers_of_node="${SLURM_GPUS_ON_NODE:-8}"
# The first node is machine 0, to which all others connect. The port differs between jobs that share a node.
read -r MAIN_ADDRESS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
export NUM_WORKERS=$((SLURM_NNODES * workers_of_node))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-$workers_of_node} / workers_of_node))}"
export CONFIG="${CONFIG:-configs/accelerate/gpu_2x8.yaml}"

# SLURM_NODEID is this node's rank: known only where srun has started the launcher, hence the single quotes. exec: the
# signal goes to the launcher, which hands it on. When one node fails, the others end, too.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$NUM_WORKERS" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" "$@"' launch "$@"
