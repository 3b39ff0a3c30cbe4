"""What an Accelerator is refused for, before anything is changed."""

from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..model.state import find_state, unwrap
from ..world.agreement import launched_workers

_OTHER_ENGINES = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
    DistributedType.XLA: "XLA",
}
# Set by TrainingArguments and `accelerate launch`, also where Accelerate then passes over them: on CPU.
_FLAGS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}

_NOT_TRAINED = (
    "A model that is not trained: model.requires_grad_(False), or prepare_model(model, evaluation_mode=True)."
)


def refuse_models(accelerator: Accelerator, models: list[nn.Module], sdp_config: SDPConfig | None) -> None:
    """Raises SDPConfigError when ``models``, all of which can learn, cannot be prepared.

    ``sdp_config``: that of the accelerator, for the one that is not patched yet.
    """
    if not models:
        return
    refuse_other_engines(accelerator.distributed_type)
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise SDPConfigError("ParallelismConfig is set, but an SDP model is sharded by hf_sdp. Remove it.")
    launched = launched_workers()
    if launched != accelerator.num_processes:
        raise SDPConfigError(
            f"WORLD_SIZE={launched} workers were launched, but Accelerate runs with {accelerator.num_processes}. "
            "Launch with a file of configs/accelerate/ (on CPU: ACCELERATE_USE_CPU=true)."
        )
    for model in models:
        state = find_state(model)
        if state is not None and sdp_config not in (None, state.config):
            raise SDPConfigError(f"The model was patched with {state.config}, the accelerator has {sdp_config}.")
    unpatched = next((model for model in models if find_state(model) is None), None)
    if unpatched is not None:
        others = {*models, *filter(find_state, accelerator._models)} - {unpatched}
        _refuse_unpatched(unpatched, others, sdp_config, accelerator.num_processes)


def _refuse_unpatched(
    model: nn.Module, others: set[nn.Module], sdp_config: SDPConfig | None, num_processes: int
) -> None:
    name = type(model).__name__
    if sdp_config is None:
        raise SDPConfigError(
            f"{name} is not patched. Call patch_model(model, SDPConfig(...)) before prepare, or use "
            f"SDPAccelerator(sdp_config=SDPConfig(...)). {_NOT_TRAINED}"
        )
    if others:
        names = ", ".join(sorted(unwrap(other)._get_name() for other in others))
        raise SDPConfigError(
            f"{name} is not patched, and sdp_config is for one model that learns: there is also {names}. "
            f"{_NOT_TRAINED} Where SDP trains several models, call patch_model on each."
        )
    if num_processes == 1 and not sdp_config.simulate:
        raise SDPConfigError("SDP needs at least 2 workers, this world has 1. Use a file of configs/accelerate/.")


def refuse_other_engines(distributed_type: DistributedType) -> None:
    """Raises SDPConfigError when FSDP, DeepSpeed or another engine is configured."""
    flag = next((name for flag, name in _FLAGS.items() if parse_flag_from_env(flag)), None)
    other = _OTHER_ENGINES.get(distributed_type) or flag
    if other is not None:
        raise SDPConfigError(
            f"{other} is configured, but an SDP model is sharded by hf_sdp. Remove it from the accelerate config (or "
            "TrainingArguments); SDPConfig(sharding='full') is FSDP2 among the holders."
        )
