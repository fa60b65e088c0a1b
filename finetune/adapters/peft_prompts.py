"""What PEFT's adapter_config.json says about the methods that insert virtual tokens: prompt tuning and P-tuning.

Sources: peft 0.21 `config.PromptLearningConfig`, `tuners/prompt_tuning`, `tuners/p_tuning`, `peft_model.py`. Settings
that we do not honour are refused by name, also those that a later PEFT will invent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters import peft_format
from finetune.adapters.full_copy import USUAL_HEADS
from finetune.errors import ModelError
from finetune.structure import Structure

SEQ_TO_SEQ = "SEQ_2_SEQ_LM"

UNDERSTOOD = frozenset({
    "peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules", "modules_to_save",
})  # fmt: skip
"""Keys that decide what the virtual tokens are, and that we read."""
HARMLESS = frozenset({
    "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "runtime_config",
    "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "prefix_projection", "init_weights",
})  # fmt: skip
"""Keys that say how the virtual tokens came about, or where the base is from."""


@dataclass(frozen=True)
class SavedPrompt:
    """The part of adapter_config.json that decides what was saved."""

    prefix_length: int
    width: int
    modules_to_save: tuple[str, ...]


def read_saved(directory: Path, method: str) -> SavedPrompt:
    """Read the adapter_config.json of a method by its `peft_type`.

    Raises:
        ModelError: when it is missing or broken, of another method, or asks for something we do not compute.
    """
    config = peft_format.read_config(directory)
    path = directory / peft_format.CONFIG
    peft_format.check_plain(config, path, method, UNDERSTOOD | HARMLESS)
    for key in ("num_virtual_tokens", "token_dim"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path}: {key} is {value!r}: expected a number from 1")
    copies = config.get("num_transformer_submodules")
    # For a pair of encoder and decoder PEFT keeps a second set for the decoder, which these two methods never use.
    if copies not in (None, 1) and (copies, config.get("task_type")) != (2, SEQ_TO_SEQ):
        raise ModelError(f"{path}: num_transformer_submodules is {copies!r}: expected 1, or 2 for {SEQ_TO_SEQ}")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) and name for name in whole):
        raise ModelError(f"{path}: modules_to_save is {whole!r}: expected a list of names")
    return SavedPrompt(config["num_virtual_tokens"], config["token_dim"], tuple(whole))


def present(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Of the modules that PEFT names, those that the model has; it names heads of every family it knows."""
    leaves = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2])}
    return [name for name in names if name in leaves or name not in USUAL_HEADS]


def written(
    method: str, model: nn.Module, structure: Structure, length: int, width: int, whole: Sequence[str], **more: Any
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        method: PEFT's name.
        length, width: of the virtual tokens.
        whole: names of the modules that train whole.
        more: further keys of the method.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known: Mapping[str, Any] = {
        key: getattr(text, name, None)
        for key, name in (("num_layers", "num_hidden_layers"), ("num_attention_heads", "num_attention_heads"))
    }
    return {
        "peft_type": method,
        "task_type": peft_format.task_type(structure),
        "inference_mode": True,
        "base_model_name_or_path": peft_format.base_of(model),
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "modules_to_save": list(whole) or None,
        **known,
        **more,
    }
