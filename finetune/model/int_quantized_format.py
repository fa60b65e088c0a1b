"""compressed-tensors' `int-quantized` layout: linear layers in integers, their inputs too, for vLLM and transformers.

Each layer keeps its codes as `weight` (int8 [O, I]), beside it `weight_scale` ([O, 1] by channel, [O, G] by group, [1]
by tensor) and, where inputs have a static scale, `input_scale` ([1]) (compressed-tensors 0.20,
compressors/naive_quantized). Which inputs share a scale stands in config.json alone. These are the keys that our
modules save themselves under, so nothing is renamed.

Static scales give the same codes there as here. Dynamic ones are max / 127 here, as in SmoothQuant and vLLM's kernels,
and max / 127.5 in compressed-tensors' emulation, through which transformers runs: it rounds inputs a bit differently.
"""

from __future__ import annotations

from typing import Any

from torch import int8

from finetune.errors import ConfigError, ModelError
from finetune.model.compressed_format import METHOD, all_linears, one_scheme
from finetune.model.headers import StoredTensor
from finetune.model.integer_state import number
from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.w8a8_storage import BITS, IntegerConfig

READ = (
    "int, symmetric, weights and inputs of 8 and 8, 6 and 6, or 4 and 8 bits, weights by channel, group or tensor,"
    " inputs by token or tensor"
)


class IntQuantized(StoredFormat):
    """w8a8, w6a6 and w4a8."""

    mark = "weight_scale"
    methods = (METHOD, "finetune")
    companions = ("weight_scale", "input_scale")
    conv1ds = False

    def marks(self, held: Held) -> list[str]:
        """Scales beside a weight of int8 codes: packed layouts have scales of that name too, and no such weight."""
        named = [name for name in held if name.endswith(f".{self.mark}")]
        return [name for name in named if (codes := held.get(self.weight_of(name))) and codes[1].dtype == "I8"]

    def disguise(self, weight: StoredTensor) -> Any:
        return int8

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        if "quant" in told:  # our own method
            return _own(told["quant"], where)
        return one_scheme(told, lambda one: _config(one.get("weights"), one.get("input_activations"), where), where)

    def writes(self, quant: QuantConfig) -> bool:
        return isinstance(quant, IntegerConfig)

    def stock_config(self, quant: QuantConfig, dtype: Any, kept: list[str]) -> dict[str, Any]:
        assert isinstance(quant, IntegerConfig)
        integers = {"type": "int", "symmetric": True}
        grouped = quant.group_size > 0
        by = {"strategy": "group", "group_size": quant.group_size} if grouped else {"strategy": quant.weights}
        weights = integers | {"num_bits": quant.bits, "dynamic": False} | by
        inputs = integers | {"num_bits": quant.input_bits, "strategy": quant.activations, "dynamic": not quant.static}
        return all_linears("int-quantized", {"weights": weights, "input_activations": inputs}, kept)


def _config(weights: dict[str, Any] | None, inputs: dict[str, Any] | None, where: str) -> QuantConfig:
    """The schemes of weights and inputs as one of our configurations."""
    if not weights or not inputs:
        raise ModelError(f"{where} has int8 weights and no scheme for inputs, which is not read here: expected {READ}")
    bits = (weights.get("num_bits"), inputs.get("num_bits"))
    name = next((name for name, counts in BITS.items() if counts == bits), None)
    plain = all(one.get("type") == "int" and one.get("symmetric", True) for one in (weights, inputs))
    if name is None or not plain:
        what = [f"{one.get('num_bits')} bits {one.get('type')}" for one in (weights, inputs)]
        raise ModelError(f"{where} has weights of {what[0]}, inputs of {what[1]}, not read here: expected {READ}")
    dynamic = inputs.get("dynamic", False)
    by, size = weights.get("strategy"), -1
    if by == "group":
        by, size = "channel", number(weights, "group_size", where)
    return _built(name, where, weights=by, group_size=size, activations=inputs.get("strategy"), static=dynamic is False)


def _own(told: dict[str, Any], where: str) -> QuantConfig:
    """Settings as we write them under our own method."""
    if told.get("name") not in BITS:
        raise ModelError(f"{where}: config.json says quant={told.get('name')}, but the shards hold {', '.join(BITS)}")
    known = {key: told[key] for key in ("weights", "activations", "static") if key in told}
    return _built(told["name"], where, **known, group_size=told.get("group_size", -1))


def _built(name: str, where: str, **settings: Any) -> QuantConfig:
    """One of our configurations."""
    kind: Any = QUANTIZERS.type_of(name)
    try:
        return kind(**settings)
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error
