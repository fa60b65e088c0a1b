"""PEFT's own LoRA in our loop, at our LoRA's rank and PEFT's defaults: what our preset must not be worse than.

On the dense base alone: stock PEFT knows no base of ours that is quantized.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from finetune.adapters.base import AdapterConfig, Learner
from finetune.adapters.lora import LoRAConfig


class PeftLoRA(Learner):
    """A model with PEFT's LoRA in it."""

    def __init__(self, model: nn.Module, config: AdapterConfig) -> None:
        from peft import LoraConfig, get_peft_model

        self.model, self.config = model, config
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        settings = LoraConfig(r=LoRAConfig().rank, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, settings)  # changes the model in place

    def trainable(self) -> dict[str, nn.Parameter]:
        """What PEFT lets train."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def take_place(runner: Any) -> None:
    """Let PEFT's LoRA on the stock model stand for what a runner has loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.device import torch_dtype

    torch.manual_seed(runner.config.seed)
    model = AutoModelForCausalLM.from_pretrained(runner.loaded.base_path, dtype=torch_dtype(runner.dtype))
    runner.adapter = PeftLoRA(model, runner.config.adapter)
    runner.loaded = replace(runner.loaded, model=model)
