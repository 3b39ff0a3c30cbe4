"""Scripts that know nothing of SDP: the model that they hand to a Trainer or an Accelerator is patched there.

What is replaced is put back by :func:`disable`. Source: transformers/trainer.py (``__init__``, ``call_model_init``) and
accelerate/accelerator.py.
"""

import functools
import inspect
import logging
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import accelerate
import torch
import transformers.trainer as host
from torch import nn

from ..config import SDPConfig
from ..engine.presence import make_roll_call
from ..errors import SDPConfigError
from ..model.state import find_state, unwrap
from ..patch import patch_model
from ..world.roll_call import RollCall
from .accelerator import SDPAccelerator
from .environment import ONLY, options_in_environment
from .replaced import put_back, replace
from .trainer import SDPCallback, install

logger = logging.getLogger(__name__)


@dataclass
class Adoption:
    """What is done with models of scripts.

    Attributes:
        config: that of every model that is patched.
        only: pattern of the names of classes; other models stay dense.
        before: called with a model, and the arguments of its Trainer if it has one. It says whether to patch it.
        told: what was said of models that stay dense.
        seen: models that came.
        _adopted: whether a model was patched, or was already, here or in a process that was forked (by
            ``notebook_launcher``): they share this byte.
        roll_call: until a model is patched, and has its own: to the first one all workers must come.
    """

    config: SDPConfig
    only: str | None = None
    before: Callable[[nn.Module, Any], bool] | None = None
    told: set[str] = field(default_factory=set)
    seen: WeakSet = field(default_factory=WeakSet)
    roll_call: RollCall | None = None
    _adopted: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1))

    @property
    def has_adopted(self) -> bool:
        return self._adopted[0] != 0

    def wants(self, model: nn.Module) -> bool:
        """Whether a model is to be trained with SDP; says so when it is not."""
        if find_state(model) is not None:
            self._adopted[0] = 1
            return False
        if self.only is not None and not re.search(self.only, _name(model)):
            return self._leave_dense(model, f"its name does not match only={self.only!r}")
        if not any(p.requires_grad for p in model.parameters()):
            return self._leave_dense(model, "none of its parameters learns")
        return True

    def _leave_dense(self, model: nn.Module, why: str) -> bool:
        """Says so, once."""
        message = f"{_name(model)} stays dense: {why}."
        if message not in self.told:
            self.told.add(message)
            logger.warning(message)
        return False

    def adopt(self, model: nn.Module, arguments: Any = None) -> nn.Module:
        """Patch a model that is wanted. It may come again: Accelerator.prepare calls prepare_model."""
        if model in self.seen:
            return model
        self.seen.add(model)
        self._adopted[0] = 1
        if self.before is not None and not self.before(model, arguments):
            return model
        return patch_model(model, self.config)


def _name(model: nn.Module) -> str:
    return unwrap(model)._get_name()


class AdoptingAccelerator(SDPAccelerator):
    """What ``Accelerator(...)`` makes meanwhile, and classes of scripts that are made of it: of the models that are
    prepared it patches the one that learns, or those that are named."""

    adoption: Adoption

    def _become_sdp(self, sdp_config: SDPConfig | None) -> None:
        super()._become_sdp(sdp_config)
        self._dense: list[nn.Module] = []
        if self.adoption.roll_call is None and not self.adoption.config.simulate:
            self.adoption.roll_call = make_roll_call(self.adoption.config.evaluation_timeout_s)

    def prepare(self, *args, device_placement=None):
        self._adopt([a for a in args if isinstance(a, nn.Module)])
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model, device_placement=None, evaluation_mode=False):
        if not evaluation_mode:
            self._adopt([model])
        if _stays_dense(model):
            return super(SDPAccelerator, self).prepare_model(model, device_placement, evaluation_mode)
        return super().prepare_model(model, device_placement, evaluation_mode)

    def _adopt(self, models: list[nn.Module]) -> None:
        wanted = [model for model in models if self.adoption.wants(model)]
        others = [model for model in self._models if find_state(model) is not None and model not in models]
        if self.adoption.only is None and (len(wanted) > 1 or (wanted and others)):
            names = sorted(_name(model) for model in (*wanted, *others))
            raise SDPConfigError(
                f"{' and '.join(names)} can learn. Say which of them SDP is for: --only, {ONLY} or enable(only=...) "
                "with a pattern of classes, or patch_model in the script."
            )
        for model in wanted:
            if self.adoption.roll_call is not None:
                self.adoption.roll_call.wait(f"{_name(model)}, which all workers prepare,")
            self.adoption.adopt(model)
        self._dense += [model for model in models if _stays_dense(model)]

    def _trains(self, model: nn.Module) -> bool:
        return find_state(model) is not None

    def _is_left_dense(self, optimizer: torch.optim.Optimizer) -> bool:
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(p) in given for model in self._dense for p in model.parameters())

    def _announce(self, what: str) -> None:
        if self.adoption.roll_call is not None and not any(map(find_state, self._models)):
            self.adoption.roll_call.announce(what)
        super()._announce(what)


def _stays_dense(model: nn.Module) -> bool:
    return find_state(model) is None and any(p.requires_grad for p in model.parameters())


_adoption: Adoption | None = None


def enable(
    config: SDPConfig | None = None,
    *,
    only: str | None = None,
    before: Callable[[nn.Module, Any], bool] | None = None,
) -> Adoption | None:
    """Let Trainers and Accelerators of this process handle patched models, and patch those that scripts hand to them.

    Without ``config`` its options are those of the environment (``HF_SDP_LEVEL=block``, ``HF_SDP_COVERAGE=0.5``, ...);
    without any, models are left as they are: the script calls ``patch_model`` itself. A model that is patched already
    and a Trainer with an ``SDPCallback`` keep the config that they have.

    Args:
        only: pattern of class names (``re.search``), where a script trains several models; default: ``HF_SDP_ONLY``.
        before: called with each model before it is patched, and with the arguments of its Trainer (None of others).
            It says whether to patch the model.
    Returns: what is done with models of scripts, None where nothing is.
    Raises: SDPConfigError for an unknown ``HF_SDP_`` variable; SDPStateError when the installed transformers has other
        Trainer methods than this version knows.
    """
    global _adoption
    install()
    if config is None:
        given = options_in_environment()
        config = SDPConfig(**given) if given else None  # type: ignore[arg-type]
    if config is None:
        return None
    if _adoption is not None:
        raise SDPConfigError(f"hf_sdp.enable was called before, with {_adoption.config}. Call hf_sdp.disable() first.")
    adoption = _adoption = Adoption(config, only if only is not None else os.environ.get(ONLY), before)
    # Not the name of the class: a script may have imported that already.
    replace(accelerate.Accelerator, "__init__", _becoming_init(accelerate.Accelerator.__init__, adoption))
    replace(host.Trainer, "__init__", _adopting_init(host.Trainer.__init__, adoption))
    replace(host.Trainer, "call_model_init", _adopting_model_init(host.Trainer.call_model_init, adoption))
    return adoption


def disable() -> None:
    """Take back everything that :func:`enable` and ``SDPCallback()`` have replaced in transformers and accelerate.

    For processes that go on without SDP. Models that are patched stay patched, and cannot be trained any more.
    """
    global _adoption
    _adoption = None
    put_back()


def _becoming_init(original: Callable, adoption: Adoption) -> Callable:
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if not isinstance(self, SDPAccelerator):  # that of a Trainer, or the script's own
            cls = type(self)
            self.__class__ = type(cls.__name__, (AdoptingAccelerator, cls), {"adoption": adoption})
            self._become_sdp(None)

    return __init__


def _adopting_init(original: Callable, adoption: Adoption) -> Callable:
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("callbacks") or ()
        original(self, *args, **kwargs)
        has_own = any(isinstance(callback, SDPCallback) or callback is SDPCallback for callback in given)
        if self.model is None or has_own:
            return
        if adoption.wants(self.model):
            adoption.adopt(self.model, self.args)
        if find_state(self.model) is not None:
            callback = SDPCallback()
            callback.on_init_end(self.args, self.state, self.control, model=self.model)
            self.add_callback(callback)

    return __init__


def _adopting_model_init(original: Callable, adoption: Adoption) -> Callable:
    @functools.wraps(original)
    def call_model_init(self, *args, **kwargs):
        model = original(self, *args, **kwargs)
        return adoption.adopt(model) if adoption.wants(model) else model

    return call_model_init
