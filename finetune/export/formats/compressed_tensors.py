"""The integers that were trained, as stock transformers and vLLM open them: compressed-tensors' `pack-quantized`.

For adapters that compute with integers (`adapter=qat`, `qat_scales`): codes and scales are written as they are in
training, nothing is rounded. Codes of 2 and 3 bits are held in 4, the narrowest that the layout has in every version of
the package: the same values at the same scales. Whatever is not in integers stays in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapters.base import Adapter
from finetune.adapters.integers import IntegerAdapter
from finetune.errors import UserError
from finetune.export.base import ExportSource, Format, Written
from finetune.export.directory import narrowed
from finetune.export.merge import Stock, frozen_at, merged_weights
from finetune.export.stock import write_config, write_tokenizer, write_weights
from finetune.kernels import affine
from finetune.model.compressed_format import PACKED_BITS, compressed_state, fits, holds, stock_config
from finetune.model.headers import StoredTensor
from finetune.quant.affine import AffineLinear
from finetune.quant.affine_ordered import OrderedAffineLinear
from finetune.quant.affine_storage import BITS, AffineConfig, Stored
from finetune.quant.base import QUANTIZERS, FrozenWeight
from finetune.structure.inspect import projection_of


def fault(adapter: Adapter) -> str:
    """Why an adapter cannot be written so, in words; empty where it can."""
    if not isinstance(adapter, IntegerAdapter):
        return "its merged weights are no integers, as those of adapter=qat and qat_scales are"
    stored = adapter.merged_settings()
    for p in adapter.projections:
        settings = stored[p.name]
        if p.kind != "linear":
            return f"the layout has no place for {p.name}, which is no linear layer"
        if not holds(widened(settings)):
            return f"the layout has no place for the real zero points of {p.name}"
        if not fits(settings, p.in_features):
            return f"groups of {settings.group_size} do not divide the {p.in_features} inputs of {p.name}"
    first = widened(next(iter(stored.values())))
    other = next((name for name, settings in stored.items() if widened(settings) != first), None)
    return f"{other} is stored otherwise than the rest" if other else ""


def widened(settings: AffineConfig) -> AffineConfig:
    """The settings with the narrowest codes of the layout that hold them."""
    bits = next(bits for bits in PACKED_BITS if bits >= settings.bits)
    kind: Any = QUANTIZERS.type_of(next(name for name, each in BITS.items() if each == bits))
    return kind(group_size=settings.group_size, symmetric=settings.symmetric, zero_point=settings.zero_point)


def in_layout(linear: AffineLinear) -> AffineLinear:
    """A module with the same weights in codes of a width that the layout has."""
    settings = widened(linear.settings())
    if settings.bits == linear.bits:
        return linear
    codes_OI = affine.unpack(linear.weight, linear.bits, linear.in_features)
    if settings.symmetric:  # the code of zero is the middle one
        codes_OI = codes_OI + (2 ** (settings.bits - 1) - 2 ** (linear.bits - 1))
    wide = linear.like(settings)
    wide.hold(Stored(affine.pack(codes_OI, settings.bits), linear.scale, linear.zero))
    return wide


def write(source: ExportSource, directory: Path) -> Written:
    """Write what was trained in integers as it is, and the rest merged in `source.dtype`.

    Raises:
        UserError: where the adapter cannot be written so, or a scale is no number of the dtype of the export.
    """
    adapter = source.adapter
    if adapter is None or (reason := fault(adapter)):
        why = reason if adapter is not None else "there is no adapter that trained integers"
        raise UserError(f"compressed-tensors cannot be written: {why}")
    assert isinstance(adapter, IntegerAdapter)
    stock, stored = Stock.of(source.model), adapter.merged_settings()
    settings = widened(next(iter(stored.values())))
    packed: dict[str, int] = {}
    untied = False

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal untied
        for name, weight in merged_weights(source, stock):
            untied |= name in stock.tied
            path = name.removesuffix(".weight")
            linear = adapter.in_codes(path) if path in stored else _kept(source, path, settings)
            if linear is None:
                yield name, narrowed(weight, source.dtype)
                continue
            packed[path] = weight.numel()
            state = compressed_state(_checked(linear, weight, source.dtype, name), source.dtype)
            yield from ((f"{path}.{key}", tensor) for key, tensor in state.items())

    write_weights(source, stock, tensors(), directory)
    linears = [name for name, module in stock.model.named_modules() if projection_of(module, name) is not None]
    told = stock_config(settings, [name for name in linears if name not in packed])
    write_config(source, directory, untied=untied, quantization_config=told)
    write_tokenizer(source, directory)
    return Written(weights=stock.parameters(), quantized=packed)


def _kept(source: ExportSource, path: str, settings: AffineConfig) -> AffineLinear | None:
    """What the base stores at a path, where the adapter left it alone and the layout holds it as it is."""
    linear = frozen_at(source.model, path)
    if not isinstance(linear, AffineLinear) or isinstance(linear, OrderedAffineLinear):
        return None
    return linear if widened(linear.settings()) == settings and _survives(linear, source.dtype) else None


def _survives(linear: AffineLinear, dtype: torch.dtype) -> bool:
    return torch.equal(linear.scale.to(dtype).float(), linear.scale.float())


def _checked(linear: FrozenWeight, weight: Tensor, dtype: torch.dtype, name: str) -> AffineLinear:
    """The integers in a width that the layout has, once it is sure that they are the weight.

    Raises:
        UserError: where a scale is too small for float16.
    """
    assert isinstance(linear, AffineLinear)
    if not _survives(linear, dtype):
        raise UserError(f"{name} has scales that {dtype} does not hold: set train.dtype=bf16")
    wide = in_layout(linear)
    if not torch.equal(wide.dequantize(torch.float32).to(weight.device), weight.float()):
        raise RuntimeError(f"the integers of {name} do not decode to its merged weight")
    return wide


def check(written: Written, stored: Sequence[StoredTensor]) -> str | None:
    """A complaint unless every module that was trained in integers is packed in the file."""
    packed = [tensor for tensor in stored if tensor.name.endswith(".weight_packed")]
    if len(packed) != len(written.quantized):
        return f"{len(packed)} modules are packed in the file, {len(written.quantized)} were to be"
    wide = [tensor.name for tensor in packed if tensor.dtype != "I32"]
    return f"{wide[0]} is not packed in words of 32 bits" if wide else None


FORMAT = Format(
    name="compressed-tensors",
    runtime="transformers with compressed-tensors (AutoModelForCausalLM)",
    loader="checkpoint",
    needs_merge=True,
    advice="the integers are those that were trained: see whether safetensors passes",
    lossless=True,
    write=write,
    check=check,
    fault=fault,
    package="compressed_tensors",
)
