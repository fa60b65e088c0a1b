"""Where a model takes its tokens in: its stacks of blocks and the modules that feed them, found by signature."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from finetune.structure.base import Stack


def find_stacks(model: nn.Module, lists: Sequence[Sequence[str]]) -> tuple[Stack, ...]:
    """The stack that each list of blocks belongs to.

    Args:
        model: of transformers.
        lists: names of blocks; for a model with an encoder and a decoder one list each, in that order.
    """
    return tuple(
        Stack(_feeder(model, blocks[0]), tuple(blocks), _is_causal(model, blocks, last=blocks is lists[-1]), number > 0)
        for number, blocks in enumerate(lists)
        if blocks
    )


def block_owners(model: nn.Module) -> list[str]:
    """Names of the modules that hold the encoder and the decoder of a model that has both; else of the whole, empty."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return [""]
    names = {id(module): name for name, module in model.named_modules()}
    halves = [getattr(model, f"get_{half}")() for half in ("encoder", "decoder")]
    return [names[id(half)] for half in halves]


def task_head(model: nn.Module, stacks: Sequence[Stack], head: str | None) -> tuple[str, ...]:
    """Modules with weights beside the base of a model that has no head over tokens."""
    prefix = getattr(model, "base_model_prefix", "")
    if head is not None or not prefix or not any(_within(stack.name, prefix) for stack in stacks):
        return ()
    return tuple(
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    )


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _feeder(model: nn.Module, block: str) -> str:
    """The nearest module around a block that can be given embeddings in place of tokens."""
    name = block
    while name:
        name = name.rpartition(".")[0]
        if "inputs_embeds" in inspect.signature(model.get_submodule(name).forward).parameters:
            return name
    return ""


def _is_causal(model: nn.Module, blocks: Sequence[str], last: bool) -> bool:
    """What its attention says of itself; where it says nothing, only the first of two stacks looks ahead."""
    said = [m.is_causal for m in model.get_submodule(blocks[0]).modules() if hasattr(m, "is_causal")]
    return any(said) if said else last
