"""Checkpoints: moved between worlds and plans, against DDP's in seconds and bytes, and the memory of loading.

    OMP_NUM_THREADS=1 python examples/benchmarks/checkpoints.py --output examples/benchmarks/checkpoints.json

Three tables (``--only moves``, ``cost`` or ``memory`` for one of them):

* moves: train 10 steps in one world, save, load in another, and compare every element of parameters and optimizer state
  with what was saved; then 20 more steps, and the evaluation loss of the full model beside that of the run that went on
  where it was. 16 sequences a step in every world.
* cost: seconds (of the slowest worker, median over rounds) and bytes to save and to load, SDP and DDP in turn.
* memory: what ``hf_sdp.from_pretrained`` and loading in full take per process, for a checkpoint of 325 MB.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaForCausalLM, set_seed

from hf_sdp.bench.loading_memory import load_and_watch, make_checkpoint
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch

SEQUENCES, BEFORE, AFTER = 16, 10, 20
NEURON, BLOCK = dict(level="neuron", coverage=0.5), dict(level="block", coverage=0.5)
MOVES = [  # (world, SDPConfig or None for DDP) that writes -> that reads
    ((4, NEURON), (4, NEURON)),
    ((4, BLOCK), (4, BLOCK)),
    ((4, NEURON), (2, NEURON)),
    ((4, NEURON), (8, NEURON)),
    ((8, dict(level="neuron", coverage=0.25)), (4, dict(level="neuron", coverage=0.25))),
    ((4, NEURON), (4, dict(level="neuron", coverage=0.25))),
    ((4, NEURON), (4, dict(coverage=1.0))),
    ((4, NEURON), (4, BLOCK)),
    ((4, BLOCK), (8, dict(level="neuron", coverage=0.5, masking="backward"))),
    ((4, dict(coverage=1.0)), (2, dict(coverage=0.5, sharding="none"))),
    ((4, NEURON), (1, None)),
    ((4, BLOCK), (4, None)),
    ((1, None), (4, NEURON)),
    ((4, None), (8, BLOCK)),
]


def make_model(seed: int = 0) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(small_llama(vocab_size=256, hidden_size=64, intermediate_size=128))


def prepared(model, sdp: dict | None, **options):
    """Accelerator, model and optimizer of this worker."""
    from accelerate import Accelerator

    from hf_sdp import SDPAccelerator, SDPConfig, patch_model

    if sdp is None:
        accelerator = Accelerator(cpu=True, **options)
    else:
        accelerator = SDPAccelerator(cpu=True, **options)
        model = patch_model(model, SDPConfig(**sdp))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return accelerator, *accelerator.prepare(model, optimizer)


def learn(accelerator, model, optimizer, steps: range) -> None:
    """Every step sees the same sequences in every world: a line of text over and over, with noise."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model.train()
    for step in steps:
        ids = _sequences(step)[rank::world_size]
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _sequences(step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    start = torch.randint(0, 256, (SEQUENCES, 1), generator=g)
    noise = torch.randint(0, 4, (SEQUENCES, 32), generator=g)
    return (start + 7 * torch.arange(32) + noise) % 256


@torch.no_grad()
def evaluate(model) -> float:
    ids = _sequences(-1)
    return model.eval()(input_ids=ids, labels=ids).loss.item()


def write_and_go_on(folder: str, sdp: dict | None) -> float:
    accelerator, model, optimizer = prepared(make_model(), sdp)
    learn(accelerator, model, optimizer, range(BEFORE))
    accelerator.save_state(folder)
    learn(accelerator, model, optimizer, range(BEFORE, BEFORE + AFTER))
    return evaluate(model)


def read_and_go_on(folder: str, copy: str, sdp: dict | None) -> float:
    from hf_sdp.checkpoint.load import open_optimizer_state
    from hf_sdp.checkpoint.optimizer_state import load_optimizer

    if sdp is None:  # plain training reads SDP's optimizer state through hf_sdp, and nothing else
        model = AutoModelForCausalLM.from_pretrained(folder)
        accelerator, model, optimizer = prepared(model, None)
        load_optimizer(optimizer, model, open_optimizer_state(optimizer, model, folder))
    else:
        accelerator, model, optimizer = prepared(make_model(seed=1), sdp)
        accelerator.load_state(folder)
    accelerator.save_state(copy)
    learn(accelerator, model, optimizer, range(BEFORE, BEFORE + AFTER))
    return evaluate(model)


def read_full(folder: Path) -> tuple[dict, dict]:
    """All parameters and all optimizer state of a folder that SDP or plain Accelerate wrote."""
    from safetensors.torch import load_file

    from hf_sdp.checkpoint import tensors as boxes
    from hf_sdp.plan.region import Region

    weights, state = load_file(folder / "model.safetensors"), {}
    if (folder / "optimizer.bin").is_file():
        names = [name for name, _ in make_model().named_parameters()]
        for number, values in torch.load(folder / "optimizer.bin", weights_only=True)["state"].items():
            state.update({f"{names[number]}/{key}": value for key, value in values.items() if value.dim()})
        return weights, state
    tensors = folder / "sdp_optimizer" / "tensors"
    wanted = {}
    for name, (shape, dtype) in boxes.stored(tensors).items():
        state[name], wanted[name] = torch.empty(shape, dtype=dtype), boxes.Boxes(shape, dtype)
        wanted[name].add(Region.whole(name, shape), state[name])
    boxes.read(tensors, wanted, None)
    return weights, state


def difference(a: dict, b: dict) -> float:
    if a.keys() != b.keys() or not a:
        raise AssertionError(f"other tensors: {sorted(a.keys() ^ b.keys())}")
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def moves() -> list[dict]:
    rows, written = [], {}
    with tempfile.TemporaryDirectory() as parent:
        for number, ((world, sdp), (new_world, new_sdp)) in enumerate(MOVES):
            key = json.dumps([world, sdp])
            if key not in written:
                folder = Path(parent, f"written-{len(written)}")
                written[key] = folder, launch(write_and_go_on, world, str(folder), sdp)[0]
            folder, stayed = written[key]
            copy = Path(parent, f"read-{number}")
            if sdp is None and not (folder / "config.json").is_file():
                make_model().config.save_pretrained(folder)
            moved = launch(read_and_go_on, new_world, str(folder), str(copy), new_sdp)[0]
            (weights, state), (new_weights, new_state) = read_full(folder), read_full(copy)
            rows.append(
                {
                    "written": f"{world}: {describe(sdp)}",
                    "read": f"{new_world}: {describe(new_sdp)}",
                    "parameters": difference(weights, new_weights),
                    "optimizer": difference(state, new_state),
                    "loss_stayed": stayed,
                    "loss_moved": moved,
                }  # fmt: skip
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def describe(sdp: dict | None) -> str:
    if sdp is None:
        return "DDP"
    words = [sdp.get("level", "neuron"), f"C={sdp['coverage']:g}"]
    return " ".join(words + [sdp[k] for k in ("masking", "sharding") if k in sdp])


def time_rounds(folder: str, rounds: int) -> dict[str, dict]:
    """DDP and SDP in the same processes, in turn."""
    engines = {"DDP": None, "SDP neuron C=0.5": NEURON, "SDP block C=0.5": BLOCK}
    ready = {}
    for name, sdp in engines.items():
        set_seed(0)
        config = small_llama(
            vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8
        )
        accelerator, model, optimizer = ready[name] = prepared(LlamaForCausalLM(config), sdp)
        ids = torch.zeros(1, 16, dtype=torch.long)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
        if name == "DDP":
            num_parameters = sum(p.numel() for p in model.parameters())
    result = {name: {"save_s": [], "load_s": []} for name in engines}
    for number in range(rounds):
        for name, (accelerator, model, _) in ready.items():
            target = f"{folder}/{name.replace(' ', '-')}-{number}"
            model.eval()  # nothing of the last step is gathered
            for what, call in (("save_s", accelerator.save_state), ("load_s", accelerator.load_state)):
                dist.barrier()
                began = time.perf_counter()
                call(target)
                dist.barrier()
                result[name][what].append(time.perf_counter() - began)
            if dist.get_rank() == 0:
                files = [p for p in Path(target).rglob("*") if p.is_file()]
                result[name]["bytes"] = sum(p.stat().st_size for p in files)
                shutil.rmtree(target)
    return {"num_parameters": num_parameters, **result}


def cost(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result = launch(time_rounds, 4, folder, rounds)[0]
    for name, values in result.items():
        if name != "num_parameters":
            medians = {k: round(statistics.median(v), 3) for k, v in values.items() if k.endswith("_s")}
            print(name, medians, values["bytes"], flush=True)
    return result


def memory() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        largest = make_checkpoint(Path(folder))
        size = os.path.getsize(f"{folder}/model.safetensors")
        for sdp in (NEURON, BLOCK, dict(coverage=0.5, masking="backward"), dict(coverage=0.5, sharding="none")):
            for sliced in (False, True):
                workers = launch(load_and_watch, 4, folder, sdp, sliced)
                rows.append(
                    {
                        "config": describe(sdp),
                        "sliced": sliced,
                        "checkpoint": size,
                        "largest_tensor": largest,
                        **{name: max(worker[name] for worker in workers) for name in workers[0]},
                    }  # fmt: skip
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def tables(result: dict) -> str:
    """The three parts as Markdown."""
    lines = ["| written by | read by | parameters | optimizer state | loss, moved | loss, stayed |", "|" + " --- |" * 6]
    for row in result["moves"]:
        lines.append(
            f"| {row['written']} | {row['read']} | {row['parameters']:g} | {row['optimizer']:g} | "
            f"{row['loss_moved']:.4f} | {row['loss_stayed']:.4f} |"
        )
    lines += ["", "| engine | save, s | load, s | MB | save / DDP | load / DDP |", "|" + " --- |" * 6]
    engines = {name: values for name, values in result["cost"].items() if name != "num_parameters"}
    middle = {n: [statistics.median(v[what]) for what in ("save_s", "load_s")] for n, v in engines.items()}
    for name, values in engines.items():
        save, load = middle[name]
        ranges = [f"({min(values[what]):.2f}-{max(values[what]):.2f})" for what in ("save_s", "load_s")]
        lines.append(
            f"| {name} | {save:.2f} {ranges[0]} | {load:.2f} {ranges[1]} | {values['bytes'] / 1e6:.1f} | "
            f"{save / middle['DDP'][0]:.2f} | {load / middle['DDP'][1]:.2f} |"
        )
    lines += ["", "| config | how | stored, MB | peak, MB | not mapped from files, MB |", "|" + " --- |" * 5]
    for row in result["memory"]:
        how = "from_pretrained of hf_sdp" if row["sliced"] else "in full, then patched"
        sizes = " | ".join(f"{row[what] / 1e6:.0f}" for what in ("stored", "resident", "anonymous"))
        lines.append(f"| {row['config']} | {how} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["moves", "cost", "memory"])
    parser.add_argument("--rounds", type=int, default=7, help="of saving and loading")
    parser.add_argument("--output", type=Path, help="JSON; parts that are not run stay as they are")
    parser.add_argument("--tables", action="store_true", help="print what --output has, instead of measuring")
    options = parser.parse_args()
    if options.tables:
        print(tables(json.loads(options.output.read_text())))
        return
    parts = {"moves": moves, "cost": lambda: cost(options.rounds), "memory": memory}
    result = {name: part() for name, part in parts.items() if options.only in (None, name)}
    if options.output:
        kept = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps({**kept, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
