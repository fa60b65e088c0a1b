"""Heads that a checkpoint lacks: which weights may be new, which may be left over, and where new ones start.

A classifier opened from a language model or from a plain encoder lacks its head, and the checkpoint has the head of
another task. Both are whole modules outside the blocks, and only whole modules may be new or left over: one tensor that
is missing inside a module, or one too many inside a block, is a damaged checkpoint whatever the task is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn

from finetune.data.labels import listed
from finetune.errors import ModelError
from finetune.model.task import Task, own_classes
from finetune.structure import inspect
from finetune.structure.inspect import projection_of

KINDS = ("missing_keys", "unexpected_keys")
LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
"""transformers' classes of models whose head over tokens may share its weight with the embeddings."""


def settle(model: nn.Module, report: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """What a load's report complains of beside the modules that a task makes new and those that it leaves out.

    Args:
        model: as transformers loaded it.
        report: its loading info; keys may be tuples that start with a name.

    Returns:
        The report without them; names of the new modules; names of what was left out.
    """
    missing, unexpected = (_names(report.get(kind) or ()) for kind in KINDS)
    new = [name for name in _candidates(model) if _lacks_whole(model, name, missing)]
    rest = [key for key in missing if not any(key.startswith(f"{name}.") for name in new)]
    strangers = {key: _stranger(model, key) for key in unexpected}
    left = list(dict.fromkeys(name for name in strangers.values() if name))
    others = [key for key, name in strangers.items() if not name]
    return {**report, "missing_keys": rest, "unexpected_keys": others}, new, left


def check_head(
    model: nn.Module, task: Task, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str
) -> None:
    """Refuse a checkpoint whose head is for other classes than the rows have.

    Args:
        model: of the task, built for the rows' classes; may be on the meta device.
        shapes: of the checkpoint's tensors, by name.
        config: the checkpoint's config.json.
        where: what the checkpoint is called.

    Raises:
        ModelError: naming both.
    """
    for module in inspect(model).task_head:
        for leaf, parameter in model.get_submodule(module).named_parameters():
            stored = shapes.get(f"{module}.{leaf}")
            if stored is not None and stored != tuple(parameter.shape):
                raise ModelError(_other_head(task, stored[0], config, where))
            told = own_classes(config)
            if stored is not None and task.labels and told and told != task.labels:
                raise ModelError(_other_head(task, len(told), config, where))


def _other_head(task: Task, outputs: int, config: Mapping[str, Any], where: str) -> str:
    """Words for a head that is not the task's."""
    names = own_classes(config)
    theirs = f"{where} has a head of {outputs} outputs" + (f" ({listed(names)})" if names else "")
    mine = f"{len(task.labels)} classes ({listed(task.labels)})" if task.labels else "one number a row"
    return f"{theirs}, but data.train has {mine}: use rows with its labels, or a base without a head"


def refuse_bidirectional(model: nn.Module, where: str) -> None:
    """Refuse a language model whose positions see what follows them: it would learn to copy the next token.

    Raises:
        ModelError: saying what it can be trained for.
    """
    stacks = inspect(model).stacks
    if stacks and not stacks[-1].causal:
        raise ModelError(
            f"{where} is an encoder, whose positions see what follows them, and no causal language model:"
            " objective=classification or objective=regression trains it"
        )


def reads_segments(model: Any) -> bool:
    """Whether a model tells the texts of a pair apart by `token_type_ids`, for which it has embeddings."""
    takes = "token_type_ids" in signature(model.forward).parameters
    return takes and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1


def shared_elsewhere(config: Any, stored: Collection[str]) -> dict[str, str]:
    """Renamings for weights that a checkpoint holds only under the name of a head they are tied to.

    A language model with tied embeddings may be stored with `lm_head.weight` alone; opened without that head it would
    have no embeddings.

    Args:
        config: of the checkpoint.
        stored: names of its tensors.

    Returns:
        Regular expressions of stored names -> names in the model, as transformers' `key_mapping` takes them.
    """
    import transformers

    for name in LANGUAGE_MODELS:
        native = getattr(transformers, name)._model_mapping.get(type(config), None)
        if native is None:
            continue
        with torch.device("meta"):
            tied = native(copy.deepcopy(config)).all_tied_weights_keys
        found = {source: target for source, target in tied.items() if source in stored and target not in stored}
        if found:
            return {f"^{re.escape(source)}$": target for source, target in found.items()}
    return {}


@torch.no_grad()
def start(model: Any, names: Sequence[str]) -> None:
    """Give new modules the initial values of their family (`_init_weights`), and note them for `structure`.

    Drawn on the CPU in float32 from torch's global generator, so that a seed decides them, the same on every device.
    """
    for name in names:
        module = model.get_submodule(name)
        fresh = copy.deepcopy(module).to("cpu", torch.float32)
        for part in fresh.modules():
            model._init_weights(part)
        for target, source in zip(module.parameters(), fresh.parameters(), strict=True):
            target.copy_(source)
    model.made_new = tuple(names)


def _names(keys: Iterable[Any]) -> list[str]:
    return sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)


def _base(model: nn.Module) -> str:
    """Name of the base inside a model with a head; empty where the model is its own base."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _candidates(model: nn.Module) -> list[str]:
    """Modules that may be new: the head beside the base, and a pooler, which is a projection behind the base's blocks.

    A norm behind the blocks, or a projection before them, belongs to what was pretrained.
    """
    structure, prefix = inspect(model), _base(model)
    children = [name for name, _ in model.named_children() if name != prefix]
    behind = False
    for name, child in model.get_submodule(prefix).named_children() if prefix else ():
        full = f"{prefix}.{name}"
        behind |= any(block.startswith(f"{full}.") for block in structure.blocks)
        if behind and any(projection_of(module, full) is not None for module in child.modules()):
            children.append(full)
    kept = [name for name in (*structure.blocks, structure.embeddings) if name]
    return [name for name in children if not any(f"{inner}.".startswith(f"{name}.") for inner in kept)]


def _lacks_whole(model: nn.Module, name: str, missing: Sequence[str]) -> bool:
    """Whether every weight of a module is missing."""
    own = [f"{name}.{leaf}" for leaf, _ in model.get_submodule(name).named_parameters()]
    return bool(own) and set(own) <= set(missing)


def _stranger(model: nn.Module, key: str) -> str:
    """The module of a key that neither the model nor its base has at all; empty where the key lies inside one."""
    prefix = _base(model)
    first, _, rest = key.partition(".")
    if prefix and first == prefix:
        first, owner = rest.partition(".")[0], model.get_submodule(prefix)
        shown = f"{prefix}.{first}"
    else:
        owner, shown = model, first
        if prefix and getattr(model.get_submodule(prefix), first, None) is not None:
            return ""
    return shown if getattr(owner, first, None) is None else ""
