"""PEFT's own LoRA in our loop, at our LoRA's rank and PEFT's defaults: what our preset must not be worse than.

On the dense base alone: stock PEFT knows no base of ours that is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.adapters.base import Adapter, AdapterConfig
from finetune.adapters.lora import LoRAConfig


class PeftLoRA(Adapter):
    """As much of an adapter as the loop needs."""

    def __init__(self, model: nn.Module, config: AdapterConfig) -> None:
        from peft import LoraConfig, get_peft_model

        self.model, self.config = model, config
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        settings = LoraConfig(r=LoRAConfig().rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.wrapper = get_peft_model(model, settings)  # changes the model in place

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def mergeable(self) -> bool:
        return False

    def disabled(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def mount(self) -> None:
        raise NotImplementedError

    def unmount(self) -> None:
        raise NotImplementedError

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        raise NotImplementedError

    def load(self, directory: Path) -> None:
        raise NotImplementedError


def take_place(runner: Any) -> None:
    """Let PEFT's LoRA on the stock model stand for what a runner has loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.device import torch_dtype

    torch.manual_seed(runner.config.seed)
    model = AutoModelForCausalLM.from_pretrained(runner.loaded.base_path, dtype=torch_dtype(runner.dtype))
    runner.adapter = PeftLoRA(model, runner.config.adapter)
    runner.loaded = replace(runner.loaded, model=model)
