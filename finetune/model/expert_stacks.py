"""Experts that a checkpoint packed one by one, as the stacks that transformers' models hold.

transformers merges the experts of a dense checkpoint while it loads: a converter gathers `experts.*.w1.weight` and
`experts.*.w3.weight`, stacks each over the experts (`MergeModulelist`) and joins the two along the outputs
(`Concatenate`). Codes, scales and zero points are stacked and joined in just the same way, because all of them lie by
output; so the converter is given the packed names, and one operation that does with codes what those do with weights.

Written against `transformers.core_model_loading` of 5.17 to 5.23.

Shape suffixes: E experts, O out features, I in features, G groups of a row, P packed bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from finetune.errors import ModelError
from finetune.model.stored_format import StoredFormat
from finetune.quant.affine_ordered import ORDER
from finetune.quant.affine_storage import FACTS, AffineConfig
from finetune.quant.base import QuantConfig
from finetune.quant.facts import pack_json, unpack_json

OUTPUTS = 1
"""The dimension of a stack [E, O, I] that converters join along."""


def merges_experts(converter: Any) -> bool:
    """Whether a converter stacks the weights of experts and, where there are several, joins them along the outputs."""
    if not isinstance(converter, WeightConverter) or not converter.operations:
        return False
    merge, *join = converter.operations
    return (
        isinstance(merge, MergeModulelist)
        and merge.dim == 0
        and (not join or (len(join) == 1 and isinstance(join[0], Concatenate) and join[0].dim == OUTPUTS))
        and len(converter.target_patterns) == 1
        and all(pattern.endswith(".weight") for pattern in converter.source_patterns)
    )


def with_packed_names(converter: Any, form: StoredFormat, operation: ConversionOps) -> Any:
    """A converter for the same stack that gathers its packed parts too, and hands all to one operation."""
    sources = list(converter.source_patterns)
    packed = [source.removesuffix("weight") + companion for source in sources for companion in form.companions]
    widened = WeightConverter([*packed, *sources], list(converter.target_patterns), [operation])
    for scope in ("scope_prefix", "base_model_prefix"):  # not in 5.17
        if hasattr(converter, scope):
            setattr(widened, scope, getattr(converter, scope))
    return widened


def stacked(
    collected: dict[str, list[Tensor]],
    sources: Sequence[str],
    form: StoredFormat,
    name: str,
    quant: QuantConfig,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What `Affine.take_state` of a stack takes.

    Args:
        collected: by pattern, a tensor an expert.
        sources: patterns of the weights, in the order in which they are joined.
        name: of the stack.
        quant: settings of the checkpoint.
        dtype: that the weights stand for.

    Raises:
        ModelError: where a part is missing, or experts differ in what no stack can hold.
    """
    joined = []
    for source in sources:
        path = source.removesuffix("weight")
        parts = {c: collected[path + c] for c in (*form.companions, "weight") if path + c in collected}
        counts = {len(tensors) for tensors in parts.values()}
        if len(counts) != 1:
            raise ModelError(f"{name}: the checkpoint lacks parts of some experts: {path}{{{', '.join(parts)}}}")
        experts = []
        for expert in range(counts.pop()):
            stored = {key: tensors[expert] for key, tensors in parts.items()}
            where = f"{name}: expert {expert}, {path.strip('.*')}.weight"
            settings = form.settings_of(stored, where, quant)
            assert isinstance(settings, AffineConfig)
            experts.append(form.state(stored, where, settings, dtype))
        joined.append(_over(experts, name, torch.stack))
    return _over(joined, name, lambda tensors: torch.cat(list(tensors), dim=OUTPUTS))


def _over(states: Sequence[dict[str, Tensor]], name: str, join: Any) -> dict[str, Tensor]:
    """Several states as one, their tensors joined and their settings compared."""
    facts = [unpack_json(state[FACTS]) for state in states]
    if any(ORDER in state for state in states):
        raise ModelError(f"{name}: experts are packed in act-order, which no stack can hold: expected groups in a row")
    if any(fact[key] != facts[0][key] for fact in facts for key in ("bits", "group_size")):
        raise ModelError(f"{name}: experts are packed in different bits or groups, which no stack can hold")
    keys = ["weight", "weight.scale"]
    if any("weight.zero" in state for state in states):
        keys.append("weight.zero")
        middle = 2 ** (facts[0]["bits"] - 1)
        for state in states:
            state.setdefault("weight.zero", torch.full_like(state["weight.scale"], middle, dtype=torch.uint8))
    tensors = {key: join([state[key] for state in states]) for key in keys}
    zero_point = "integer" if "weight.zero" in tensors else "none"
    *stack, rows, _ = tensors["weight"].shape
    shape = [*stack, rows, facts[0]["shape"][-1]]
    return tensors | {FACTS: pack_json(facts[0] | {"zero_point": zero_point, "shape": shape})}
