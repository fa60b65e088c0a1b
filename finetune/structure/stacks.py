"""Where a model takes its tokens in: its stacks of blocks and the modules that feed them, found by signature."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from finetune.structure.base import Stack
from finetune.structure.ties import accessor


def find_stacks(model: nn.Module, lists: Sequence[Sequence[str]]) -> tuple[Stack, ...]:
    """The stack that each list of blocks belongs to.

    Args:
        model: of transformers.
        lists: names of blocks; for a model with an encoder and a decoder one list each, in that order.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for number, blocks in enumerate(lists):
        if not blocks:
            continue
        feeder = _feeder(model, blocks[0])
        module = model.get_submodule(feeder)
        causal = _is_causal(model, blocks, module, last=blocks is lists[-1])
        embeddings = names.get(id(accessor(module, "get_input_embeddings")))
        found.append(Stack(feeder, tuple(blocks), causal, reads=number > 0, embeddings=embeddings))
    return tuple(found)


def block_owners(model: nn.Module) -> list[str]:
    """Names of the modules that hold the encoder and the decoder of a model that has both; else of the whole, empty."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return [""]
    names = {id(module): name for name, module in model.named_modules()}
    halves = [getattr(model, f"get_{half}")() for half in ("encoder", "decoder")]
    return [names[id(half)] for half in halves]


def task_head(model: nn.Module, stacks: Sequence[Stack], head: str | None) -> tuple[str, ...]:
    """Modules with weights beside the base of a model that has no head over tokens, and what else was made new in it.

    A pooler that the checkpoint lacks (`made_new` names it, see model/task_head.py) says nothing until it is trained.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if head is not None or not prefix or not any(_within(stack.name, prefix) for stack in stacks):
        return ()
    beside = [n for n, child in model.named_children() if n != prefix and any(True for _ in child.parameters())]
    return tuple(dict.fromkeys([*beside, *getattr(model, "made_new", ())]))


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


def _is_causal(model: nn.Module, blocks: Sequence[str], feeder: nn.Module, *, last: bool) -> bool:
    """What its attention says of itself; where it says nothing, whether it is the last stack and can take a cache."""
    said = [m.is_causal for m in model.get_submodule(blocks[0]).modules() if hasattr(m, "is_causal")]
    return any(said) if said else last and "past_key_values" in inspect.signature(feeder.forward).parameters
