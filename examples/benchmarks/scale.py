"""What a worker of a large world does besides its model: start-up, groups, the roll call, exchange.

    OMP_NUM_THREADS=1 python examples/benchmarks/scale.py --output examples/benchmarks/scale.json

One worker of 256 and of 1,024 on torch's fake process group, where nothing is sent; CPU time, each row in a process of
its own. The roll call is one of all workers, as threads of one process with a real TCPStore; time on the clock.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

CONFIGS = {
    "neuron": dict(level="neuron"),
    "neuron, sharding none": dict(level="neuron", sharding="none"),
    "neuron, 8 subnetworks": dict(level="neuron", num_subnetworks=8),
    "neuron, 8 subnetworks, sharding none": dict(level="neuron", num_subnetworks=8, sharding="none"),
}


def prepare(num_workers: int, options: dict) -> dict:
    """Worker 0 prepares two models one after the other, and evaluates."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaForCausalLM

    from hf_sdp import SDPConfig, patch_model, weights_changed
    from hf_sdp.bench.fake_world import fake_world
    from hf_sdp.bench.small_llama import small_llama
    from hf_sdp.engine.shard import shard

    def model():
        return LlamaForCausalLM(
            small_llama(num_hidden_layers=12, hidden_size=256, intermediate_size=1024, num_attention_heads=16)
        )

    config = SDPConfig(coverage=0.5, **options)
    ids = torch.zeros(1, 8, dtype=torch.long)
    times = {}

    def timed(what: str, call, *args, **kwargs):
        began = time.process_time()
        result = call(*args, **kwargs)
        times[what] = time.process_time() - began
        return result

    num_groups = []
    with fake_world(num_workers):
        made = dist.distributed_c10d._world.pg_map  # torch's own record of groups
        for number in ("first", "second"):
            patched = timed(f"{number}_patch_s", patch_model, model(), config)
            prepared = timed(f"{number}_shard_s", shard, patched, torch.device("cpu"))
            num_groups.append(len(made))
        num_ranks = sum(dist.get_world_size(group) for group in made)
        prepared.eval()
        with torch.no_grad():
            timed("first_evaluation_s", prepared, input_ids=ids)
            weights_changed(prepared)
            timed("next_evaluation_s", prepared, input_ids=ids)
            timed("same_weights_s", prepared, input_ids=ids)
    return {**times, "groups": num_groups[0], "groups_of_two_models": num_groups[1], "members": num_ranks}


def call_the_roll(num_workers: int, rounds: int = 5) -> dict:
    """Seconds for one roll call after the other, of all workers."""
    import torch.distributed as dist

    from hf_sdp.world import roll_call

    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    stores += [dist.TCPStore("127.0.0.1", stores[0].port, wait_for_workers=False) for _ in range(num_workers - 1)]
    calls = []
    for rank, store in enumerate(stores):
        roll_call._numbers = iter([0])  # all of one model
        calls.append(roll_call.RollCall(store, rank, num_workers, 600))
    starts, times = threading.Barrier(num_workers), []

    def work(call) -> None:
        for _ in range(rounds):
            starts.wait()
            began = time.perf_counter()
            call.wait("a forward in eval mode")
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"roll_call_s": sorted(times)[len(times) // 2], "slowest_s": max(times)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, num_workers = options.one[0], int(options.one[1])
        print(json.dumps(call_the_roll(num_workers) if what == "roll" else prepare(num_workers, CONFIGS[what])))
        return

    def one(what: str, num_workers: int) -> dict:
        command = [sys.executable, __file__, "--one", what, str(num_workers)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(answer.splitlines()[-1])

    rows, roll_calls = [], []
    print(
        "| workers | config | patch, s | shard, s | second model: shard, s | groups: one model, two | members |", end=""
    )
    print(" evaluation: first, s | after a step, s | same weights, s |")
    print("| --- " * 10 + "|")
    for num_workers in options.workers:
        for what in CONFIGS:
            rows.append(row := {"workers": num_workers, "config": what, **one(what, num_workers)})
            print(
                f"| {num_workers} | {what} | {row['first_patch_s']:.2f} | {row['first_shard_s']:.2f} | "
                f"{row['second_shard_s']:.2f} | {row['groups']}, {row['groups_of_two_models']} | {row['members']} | "
                f"{row['first_evaluation_s']:.2f} | {row['next_evaluation_s']:.2f} | {row['same_weights_s']:.2f} |",
                flush=True,
            )
    print("\n| workers | roll call, median of workers, s | slowest, s |\n" + "| --- " * 3 + "|")
    for num_workers in (64, *options.workers):
        roll_calls.append(row := {"workers": num_workers, **one("roll", num_workers)})
        print(f"| {num_workers} | {row['roll_call_s']:.3f} | {row['slowest_s']:.3f} |", flush=True)
    if options.output:
        import torch

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        content = {"versions": versions, "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
        content |= {"prepare": rows, "roll_call": roll_calls}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
