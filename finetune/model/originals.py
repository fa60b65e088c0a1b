"""The weights of a base once more, as they were before they were quantized, one at a time.

A quantized base has forgotten them, and some methods start from them (PiSSA, LoftQ). They are read again through
transformers' own loader, so that renamed, joined and stacked tensors come out as they did the first time; an operation
shows each to whoever asked and lets go of it, so nothing is held but the weight at hand.

Written against transformers 5.17 to 5.23, as model/quantizer.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune.errors import ModelError
from finetune.model.streaming import PageRelease, fixed_thresholds

METHOD = "finetune_originals"

Visit = Callable[[str, Tensor], None]


def read_originals(model: nn.Module, directory: Path, dtype: torch.dtype, visit: Visit) -> None:
    """Show every weight of a dense checkpoint, in the order in which it lies there.

    Args:
        model: what was loaded from it; its class and configuration say how the tensors are to be read.
        dtype: that the weights had when they were quantized.
        visit: gets the name in the dense model, and the weight in the layout of that parameter, on the device of the
            model. What it raises comes through.

    Raises:
        ModelError: where the checkpoint cannot be read again.
    """
    from finetune.model.pretrained import quiet

    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    asked = _Asked(visit)
    device = next(model.parameters()).device
    with fixed_thresholds(), quiet(), torch.random.fork_rng(devices=[]):
        try:
            type(model).from_pretrained(  # type: ignore[attr-defined]
                directory,
                config=config,
                dtype=dtype,
                device_map={"": device},
                experts_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                quantization_config=asked,
            )
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            if asked.failure is not None:
                raise asked.failure from None
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"{directory} cannot be read again for its original weights: {first}") from error


@register_quantization_config(METHOD)
class _Asked(QuantizationConfigMixin):
    """What transformers passes around while it reads."""

    def __init__(self, visit: Visit, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.visit, self.pages = visit, PageRelease()
        self.failure: Exception | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Asked:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nothing that would be saved."""
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class _Visitor(HfQuantizer):
    """Has every tensor pass by `_Show`; the model that transformers builds for it stays without weights."""

    quantization_config: _Asked

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """The model stays as it is."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return True

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Nothing stays, so that a CUDA warm-up reserves nothing."""
        return 0.0

    def get_quantize_ops(self) -> ConversionOps:
        return _Show(self.quantization_config)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Show(ConversionOps):
    """Operation on arriving weights. transformers copies an operation for every tensor; the copies are one."""

    def __init__(self, asked: _Asked) -> None:
        self.asked = asked

    def __deepcopy__(self, memo: dict[int, Any]) -> _Show:
        return self

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Show each tensor; hand none back."""
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            try:
                self.asked.visit(name, weight)
            except Exception as error:
                self.asked.failure = self.asked.failure or error
                raise
            self.asked.pages.consumed(weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}
