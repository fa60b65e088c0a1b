"""The merged model in NF4, as stock transformers with bitsandbytes opens it.

Projections inside the blocks are rounded onto NF4 with the error compensated on training inputs
(quant/rounders/gptq.py), to the nearest code where there are none; where the adapter changed nothing, the stored codes
are kept bit for bit. What bitsandbytes has no storage for (embeddings, norms, stacked experts) and the head, unless the
base has it quantized, stay in 16 bits.

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.export.base import ExportSource, Format, Written
from finetune.export.calibration import Calibration
from finetune.export.directory import narrowed
from finetune.export.merge import Stock, frozen_at, merged_weights
from finetune.export.stock import write_config, write_tokenizer, write_weights
from finetune.model.headers import StoredTensor
from finetune.model.stored import quantization_config
from finetune.quant.base import QUANTIZERS, FrozenLinear
from finetune.quant.codebook4 import Codebook4Linear
from finetune.quant.nf4 import NF4Config
from finetune.quant.pruned import said_pruned
from finetune.quant.rounders.base import Rounder, apply
from finetune.quant.rounders.gptq import GPTQ
from finetune.quant.rounders.zeros import ZerosKept
from finetune.structure.inspect import projection_of

MOST_BITS = 5.0
"""Codes and scales at the smallest block (32) without double quantization; the usual 64 with it takes 4.127."""


def write(source: ExportSource, directory: Path) -> Written:
    """Merge in float32, round to NF4 with the base's block size and double quantization, write bitsandbytes' keys."""
    stock = Stock.of(source.model)
    frozen = dict(_linears(source, stock))
    four_bit = {name: module for name, module in frozen.items() if isinstance(module, Codebook4Linear)}
    # A 4-bit base says itself what stays in 16 bits; any other is quantized as it would have been on loading.
    blocks = {name.removesuffix(".weight") for name, p in stock.projections.items() if p.kind != "experts"}
    targets = set(four_bit) or blocks
    settings = next((module.settings() for module in four_bit.values()), NF4Config())
    default = NF4Config(block_size=settings.block_size, double_quant=settings.double_quant)
    calibration = _calibration(source, [name for name in frozen if name in targets and frozen[name] is not None])
    rounder = ZerosKept(GPTQ()) if said_pruned(source.model.config) else GPTQ()
    untied = False

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal untied
        for name, weight in merged_weights(source, stock):
            untied |= name in stock.tied
            module = name.removesuffix(".weight")
            if module not in targets or module == name:
                yield name, narrowed(weight, source.dtype)
                continue
            projection = stock.projections.get(name)
            w_OI = weight.T if projection is not None and projection.transposed else weight
            gram_II = calibration.gram(module) if calibration else None
            quantized = _nf4(four_bit.get(module), w_OI, default, rounder, gram_II)
            state = quantized.state_dict(prefix=f"{module}.")
            yield from ((key, tensor) for key, tensor in state.items() if key.startswith(name))

    write_weights(source, stock, tensors(), directory)
    kept = [name for name in frozen if name not in targets]
    config = quantization_config(default, source.dtype, kept)
    write_config(source, directory, untied=untied, quantization_config=config)
    write_tokenizer(source, directory)
    quantized = {name: stock.model.get_submodule(name).weight.numel() for name in sorted(targets)}
    return Written(weights=stock.parameters(), quantized=quantized)


def check(written: Written, stored: Sequence[StoredTensor]) -> str | None:
    """A complaint unless every module that was to be quantized is in the file in at most `MOST_BITS` a weight."""
    codes = [tensor for tensor in stored if any(other.name == f"{tensor.name}.absmax" for other in stored)]
    if len(codes) != len(written.quantized):
        return f"{len(codes)} modules are packed in the file, {len(written.quantized)} were to be"
    dense = [tensor.name for tensor in codes if tensor.dtype != "U8"]
    if dense:
        return f"{dense[0]} is not packed in bytes"
    packed = {f"{tensor.name}{part}" for tensor in codes for part in ("", ".absmax", ".nested_absmax")}
    parts = [tensor for tensor in stored if tensor.name in packed]
    bits = 8 * sum(tensor.end - tensor.start for tensor in parts) / sum(written.quantized.values())
    return f"its packed modules take {bits:.3g} bits a weight, more than {MOST_BITS:g}" if bits > MOST_BITS else None


def _linears(source: ExportSource, stock: Stock) -> Iterator[tuple[str, FrozenLinear | None]]:
    """Every linear module of the stock model, and the frozen weight that stands for it in the loaded one."""
    for name, module in stock.model.named_modules():
        if projection_of(module, name) is not None:
            frozen = frozen_at(source.model, name)
            yield name, frozen if isinstance(frozen, FrozenLinear) else None


def _calibration(source: ExportSource, modules: list[str]) -> Calibration | None:
    """Inputs of the frozen linears, in the order in which the merge hands them out; None without rows to run."""
    if source.calibration is None or not len(source.calibration) or not modules:
        return None
    return Calibration(source.model, modules, source.calibration, source.pad_id)


def _nf4(
    stored: Codebook4Linear | None, w_OI: Tensor, default: NF4Config, rounder: Rounder, gram_II: Tensor | None
) -> Codebook4Linear:
    """A weight in NF4; in the very codes of `stored` where it is NF4 and nothing changed."""
    if stored is not None and stored.codebook == "nf4":
        if torch.equal(w_OI.float(), stored.dequantize(torch.float32).to(w_OI.device)):
            return stored.requantize(w_OI)
        quantized = stored.like(stored.settings())
    else:
        quantized = QUANTIZERS.build(default, *w_OI.shape, bias=False, dtype=torch.float32, device=w_OI.device)
    if gram_II is None:
        quantized.store(w_OI)
    else:
        apply(rounder, quantized, w_OI, [gram_II])
    return quantized


FORMAT = Format(
    name="bnb-nf4",
    runtime="transformers + bitsandbytes (AutoModelForCausalLM)",
    loader="checkpoint",
    needs_merge=True,
    advice="export 16 bits (safetensors), or keep the adapter beside its base (peft)",
    lossless=False,
    write=write,
    check=check,
)
