"""Models that are never whole: read and initialized slice by slice; and one subnetwork as a model of its own."""

import warnings

import pytest
import torch
import torch.distributed as dist
from models import batch, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from workers import run_workers

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, consolidate, verify
from hf_sdp.checkpoint.weights import Weights
from hf_sdp.engine.placement import local_box, numel
from hf_sdp.model.state import get_state

EVERYTHING = dict(
    num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
)


def load(folder, config):
    """Weights, logits in eval mode, a training step, and how many elements were read."""
    read = []
    original = Weights.read

    def counted(self, name, box):
        read.append(numel(box))
        return original(self, name, box)

    Weights.read = counted
    accelerator = SDPAccelerator()
    try:
        model = hf_sdp.from_pretrained(folder, SDPConfig(**config))
    finally:
        Weights.read = original
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    state = get_state(model)
    stored = sum(numel(local_box(state, held)) for held in state.held.values())
    assert sum(read) == stored
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    logits = model(**batch(0)).logits.detach()
    weights = consolidate(model)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    loss = model(**batch(dist.get_rank())).loss
    accelerator.backward(loss)
    optimizer.step()
    verify(model)
    return weights, logits, loss.item(), stored


@pytest.mark.parametrize(
    "config",
    [dict(coverage=0.75), dict(level="block"), dict(masking="backward"), dict(sharding="none")],
    ids=str,
)
def test_every_worker_reads_only_what_it_stores(tmp_path, config):
    full = tiny_model(seed=3, **EVERYTHING).eval()
    full.save_pretrained(tmp_path, max_shard_size="30KB")
    results = run_workers(load, tmp_path, config)
    weights = results[0][0]
    assert all(torch.equal(weights[n], t) for n, t in full.state_dict().items())
    expected = full(**batch(0)).logits
    for rank, (_, logits, loss, stored) in enumerate(results):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        patched = hf_sdp.patch_model(tiny_model(seed=3, **EVERYTHING), SDPConfig(**config), rank=rank, world_size=4)
        assert patched(**batch(rank)).loss.item() == pytest.approx(loss, abs=1e-5)
        if config.get("sharding") != "none":
            assert stored <= full.num_parameters() / 4 * 1.2


def test_without_a_process_group_a_worker_gets_the_slices_that_patching_gives(tmp_path):
    full = tiny_model(seed=3, **EVERYTHING)
    full.save_pretrained(tmp_path)
    for config in (SDPConfig(coverage=0.75), SDPConfig(level="block"), SDPConfig(masking="backward")):
        loaded = hf_sdp.from_pretrained(tmp_path, config, rank=1, world_size=4)
        patched = hf_sdp.patch_model(tiny_model(seed=3, **EVERYTHING), config, rank=1, world_size=4)
        expected = dict(patched.named_parameters())
        assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters())
        assert torch.equal(loaded.train()(**batch(0)).logits, patched(**batch(0)).logits)  # rotary frequencies, too


def test_bfloat16_is_of_parameters_rotary_frequencies_stay_as_they_are(tmp_path):
    tiny_model(seed=3, max_position_embeddings=4096).bfloat16().save_pretrained(tmp_path)
    full = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = SDPConfig(coverage=1.0)
    made = hf_sdp.from_config(full.config, config, dtype=torch.bfloat16, rank=0, world_size=4)
    for model in (hf_sdp.from_pretrained(tmp_path, config, rank=0, world_size=4), made):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        expected = dict(full.named_buffers())
        assert all(b.dtype == expected[n].dtype and torch.equal(b, expected[n]) for n, b in model.named_buffers())


def save_in_shards(folder):
    model = SDPAccelerator().prepare(hf_sdp.patch_model(tiny_model(seed=3, **EVERYTHING), SDPConfig(coverage=0.75)))
    hf_sdp.save_pretrained(model, folder, max_shard_size="9KB")
    written = {}
    consolidate(model, written.__setitem__)
    return written


def test_large_models_are_saved_in_shards_with_an_index(tmp_path):
    written = run_workers(save_in_shards, tmp_path)
    assert (
        len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
        and (tmp_path / "model.safetensors.index.json").exists()
    )
    full, loaded = tiny_model(seed=3, **EVERYTHING), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, full.get_parameter(n)) for n, p in loaded.named_parameters())
    assert written[0].keys() == dict(full.named_parameters()).keys() and not any(written[1:])


def load_other_names(folder, model_class=AutoModelForCausalLM):
    SDPAccelerator()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = hf_sdp.from_pretrained(folder, SDPConfig(), auto_class=model_class)
    told = [str(w.message) for w in caught if "loads" in str(w.message) and "in full" in str(w.message)]
    model = SDPAccelerator().prepare(model)
    return told, consolidate(model)


def test_names_that_are_converted_while_loading_are_loaded_in_full_with_a_warning(tmp_path):
    full = tiny_model(seed=3)
    full.save_pretrained(tmp_path)
    # A checkpoint of the base model: transformers adds the prefix, a slice reader would not find the names.
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {n.removeprefix("model."): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    results = run_workers(load_other_names, tmp_path)
    assert all(len(told) == 1 and "model.embed_tokens.weight" in told[0] for told, _ in results)
    state = full.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in results[0][1].items() if n.startswith("model."))


def initialize(config, seed, options):
    SDPAccelerator()
    model = hf_sdp.from_config(tiny_config(**options), SDPConfig(**config), seed=seed)
    assert model.training and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    verify(model)
    loss = model(**batch(0)).loss.item()
    return consolidate(model), loss


def test_initial_weights_do_not_depend_on_world_or_plan_and_are_distributed_as_the_familys(tmp_path):
    options = dict(EVERYTHING, hidden_size=64, intermediate_size=256)
    reference = run_workers(initialize, dict(coverage=0.75), 0, options)[0][0]
    for config, world_size in ((dict(level="block"), 4), (dict(masking="backward"), 4), (dict(), 2)):
        other = run_workers(initialize, config, 0, options, world_size=world_size)[0][0]
        assert other.keys() == reference.keys() and all(torch.equal(other[n], t) for n, t in reference.items())
    simulated = hf_sdp.from_config(tiny_config(**options), SDPConfig(simulate=4)).state_dict()
    assert all(torch.equal(simulated[n], t) for n, t in reference.items())
    another = hf_sdp.from_config(tiny_config(**options), SDPConfig(simulate=4), seed=1).state_dict()
    full = LlamaForCausalLM(tiny_config(**options)).state_dict()
    for name, t in reference.items():
        assert t.shape == full[name].shape and t.dtype == full[name].dtype
        if full[name].std() == 0 or name.endswith("bias"):
            assert torch.equal(t, full[name])  # norms and biases
        else:
            assert not torch.equal(t, another[name])
            assert t.std().item() == pytest.approx(full[name].std().item(), rel=0.1)
            assert abs(t.mean().item()) < 4 * 0.02 / t.numel() ** 0.5
    assert len({t.flatten()[:4].sum().item() for n, t in reference.items() if t.dim() > 1}) == sum(
        t.dim() > 1 for n, t in reference.items() if n != "lm_head.weight"
    )


def export(folder, config, options):
    accelerator = SDPAccelerator()
    model = accelerator.prepare(hf_sdp.patch_model(tiny_model(seed=5, **options), SDPConfig(**config)))
    for subnetwork in range(4):
        hf_sdp.export_subnetwork(model, f"{folder}/{subnetwork}", subnetwork)
    return model(**batch(0)).logits.detach()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (dict(coverage=0.5), EVERYTHING),
        (dict(coverage=0.75, sharding="none"), dict(EVERYTHING, hidden_size=48, tie_word_embeddings=False)),
        (dict(level="block", block_granularity="layer"), EVERYTHING),
    ],
    ids=str,
)
def test_an_exported_subnetwork_computes_what_its_worker_computes(tmp_path, config, options):
    results = run_workers(export, tmp_path, config, options)
    for subnetwork, logits in enumerate(results):
        small = AutoModelForCausalLM.from_pretrained(tmp_path / str(subnetwork)).eval()
        torch.testing.assert_close(small(**batch(0)).logits, logits, rtol=0, atol=1e-5)
        assert small.num_parameters() < tiny_model(**options).num_parameters()


def refuse_export(folder, config):
    accelerator = SDPAccelerator()
    model = accelerator.prepare(hf_sdp.patch_model(tiny_model(), SDPConfig(**config)))
    with pytest.raises(SDPConfigError) as raised:
        hf_sdp.export_subnetwork(model, folder / "out")
    return str(raised.value)


def test_what_no_config_can_say_is_not_exported(tmp_path):
    for config, message in (
        (dict(level="block"), "no config says"),
        (dict(masking="backward"), "computes with the full model"),
        (dict(coverage=0.75), "not a multiple of the number of attention heads (3)"),
    ):
        assert all(message in e for e in run_workers(refuse_export, tmp_path, config))
    assert not (tmp_path / "out").exists()
