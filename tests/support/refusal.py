"""Bad input of ``patch_model`` and ``make_plan``: refused clearly before anything changed, or right."""

import hashlib
import re
from collections.abc import Callable

import torch
from torch import nn

from hf_sdp import SDPConfigError


def checksum(model: object) -> str:
    """Of a model's modules, parameters and buffers: classes, names, shapes, values, and who shares what."""
    if not isinstance(model, nn.Module):
        return repr(model)
    found = hashlib.sha256()
    for name, module in model.named_modules(remove_duplicate=False):
        found.update(f"{name}: {type(module)} {sorted(vars(module))} {id(module)}".encode())
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        found.update(f"{name}: {type(tensor)} {tensor.dtype} {tuple(tensor.shape)} {id(tensor)}".encode())
        found.update(f"{tensor.requires_grad} {tensor.is_meta or tensor.detach().double().sum().item()}".encode())
    return found.hexdigest()


def assert_refused(message: str, call: Callable, *models: object) -> None:
    """``call`` raises SDPConfigError that says ``message`` and leaves all ``models`` as they are."""
    before, rng = [checksum(model) for model in models], torch.get_rng_state()
    try:
        call()
    except SDPConfigError as error:
        assert re.search(message, str(error), re.DOTALL), f"unclear: {error}"
        assert "\n" not in str(error).strip()
    except Exception as error:
        raise AssertionError(f"wrong: {type(error).__name__}: {error}") from error
    else:
        raise AssertionError("wrong: nothing was refused")
    assert [checksum(model) for model in models] == before, "refused after something had changed"
    assert torch.equal(torch.get_rng_state(), rng), "refused after random numbers had been drawn"
