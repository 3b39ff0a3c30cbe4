"""The weights of a standard folder whose tensors are not the model's: transformers converts them while loading."""

import os

import torch

from ..errors import SDPConfigError
from ..plan.region import Region


class ConvertedWeights:
    """As ``Weights``, of a model that is loaded in full, in the memory of the host.

    Raises: SDPConfigError that names the folder when transformers cannot load ``model_class`` from it, or something is
        missing.
    """

    def __init__(self, folder: str | os.PathLike, model_class: type):
        try:
            model, report = model_class.from_pretrained(  # type: ignore[attr-defined]
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # whatever the class says
            raise SDPConfigError(f"{folder} cannot be loaded by {model_class.__name__}: {error}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise SDPConfigError(f"{folder}: {missing[0]} is missing. These are the weights of another model.")
        self.tensors: dict[str, torch.Tensor] = model.state_dict()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""
        return tuple(self.tensors[name].shape) if name in self.tensors else None

    def read(self, region: Region, into: torch.Tensor) -> None:
        """Fill ``into``, of the region's shape, with the region of a tensor."""
        into.copy_(region.of(self.tensors[region.name]))
