"""Our attention in the place of torch's in a loaded model, and rotation fused into its attention modules (exchange.py).

The function goes through transformers' attention interface, for all blocks or none. What modules hand to it is recorded
on a few tokens: our attention is held against torch's on exactly that, and a stand-in for a module has to hand on the
same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune.model import attention
from finetune.model.agreement import Exchanged, agree, first_line
from finetune.model.fused_modules import FusedRotaryAttention, Rotary
from finetune.structure.exchangeable import rotary_layers
from finetune.structure.experiments import UNFORESEEN


def exchange_attention(model: Any) -> list[Exchanged]:
    """Our attention for all blocks or none, then rotation fused in each."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return []
    if model.config.is_encoder_decoder:  # what its two halves attend over cannot be tried on one text
        return []
    attention.register()
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:  # it has an attention of its own, and keeps it
        return []
    candidates = {m: n for n, m in model.named_modules() if rotary_layers(m) is not None}
    try:
        calls, arguments = _run(model, list(candidates))
        reason = "" if calls and all(map(_same_as_torch, calls)) else "it differs from torch's"
    except UNFORESEEN as error:
        reason = first_line(error)
    if reason:
        model.set_attn_implementation("sdpa")
        return [Exchanged("model", "attention", reason)]
    done = [Exchanged("model", "attention") for _ in calls]
    for call in calls:
        args, kwargs = arguments.get(call.module, ((), {}))
        if not args and "position_embeddings" in kwargs:
            done.append(_rotary(model, candidates[call.module], call, kwargs))
    return done


def _run(model: Any, modules: list[nn.Module]) -> tuple[list[attention.Call], dict[nn.Module, Any]]:
    """What the modules of a model hand to the attention on two packed sequences, and what they are called with."""
    arguments: dict[nn.Module, Any] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments[module] = (args, kwargs)

    embeddings: Any = model.get_input_embeddings()
    tokens = torch.randint(embeddings.weight.shape[0], (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in modules]
    try:
        with attention.recorded() as calls:
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls, arguments


def _same_as_torch(call: attention.Call) -> bool:
    """Whether our attention gives what torch's does."""
    heads = call.query, call.key, call.value
    ours, _ = attention.attention_forward(call.module, *heads, call.mask, **call.options)
    wanted, _ = sdpa_attention_forward(call.module, *heads, call.mask, **call.options)
    return agree(ours, wanted)


def _rotary(model: nn.Module, name: str, call: attention.Call, kwargs: dict[str, Any]) -> Exchanged:
    """Put the stand-in for an attention module in its place where it hands the same to the attention."""
    layers = rotary_layers(call.module)
    assert layers is not None
    own = {key: value for key, value in call.options.items() if key not in kwargs}
    own.pop("dropout")
    scaling = own.pop("scaling")
    simple = all(value is None or isinstance(value, bool | int | float) for value in own.values())
    reason = "it computes something else than projections, rotation and attention"
    if simple and scaling is not None:
        fused = FusedRotaryAttention.of(call.module, Rotary(layers, scaling, tuple(own.items())))
        try:
            ours = fused.rotated(kwargs["hidden_states"], *kwargs["position_embeddings"])  # type: ignore[operator]
            same = all(map(agree, ours, (call.query, call.key, call.value)))
            same = same and agree(fused(**kwargs)[0], call.module(**kwargs)[0])
        except UNFORESEEN as error:
            return Exchanged(name, "rotary attention", first_line(error))
        if same:
            model.set_submodule(name, fused)
            reason = ""
    return Exchanged(name, "rotary attention", reason)
