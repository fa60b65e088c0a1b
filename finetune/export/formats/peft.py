"""The adapter alone, in PEFT's layout, with the name of the base it belongs on.

The proof puts it on that base as PEFT's users do: quantized by stock bitsandbytes on loading where the base was
quantized in a way that stock transformers can repeat; else on the decoded weights that it was trained on, written out
for the proof alone.
"""

from __future__ import annotations

from pathlib import Path

from finetune.adapters.peft_format import read_config
from finetune.errors import UserError
from finetune.export.adapter import write_adapter
from finetune.export.base import ExportSource, Format, Written
from finetune.quant.base import FrozenExperts, FrozenWeight

STOCK_METHOD = "bitsandbytes"
STOCK_BLOCK_SIZE = 64
"""What transformers' BitsAndBytesConfig quantizes with; it has no key for another."""


def write(source: ExportSource, directory: Path) -> Written:
    """Write the adapter, or refuse where PEFT has no such method."""
    adapter = source.adapter
    if adapter is None:
        raise UserError("there is no adapter to export: export.formats=[peft] needs one")
    write_adapter(adapter, source, directory)
    config = read_config(directory)
    if not config.get("peft_type"):
        raise UserError(f"PEFT has no method for adapter={adapter.config.name}: export the merged model instead")
    return Written(
        weights=sum(parameter.numel() for parameter in adapter.trainable().values()),
        base=source.base_path,
        base_quantization=source.quantization_config,
        decode_base=not _stock_repeats(source) or (bool(config.get("use_dora")) and _repacks(source)),
    )


def _stock_repeats(source: ExportSource) -> bool:
    """Whether stock transformers, loading the base, stores it exactly as it was trained on."""
    told = source.quantization_config
    if told is None:
        return not any(_is_packed(module) for module in source.model.modules())
    if told["quant_method"] != STOCK_METHOD:
        return False
    frozen = [module for module in source.model.modules() if _is_packed(module)]
    return all(
        not isinstance(module, FrozenExperts)
        and getattr(module, "block_size", STOCK_BLOCK_SIZE) == STOCK_BLOCK_SIZE
        and getattr(module, "threshold", True)  # at 0 bitsandbytes rounds all inputs to int8, we none
        for module in frozen
    )


def _repacks(source: ExportSource) -> bool:
    """Whether bitsandbytes repacks its weights in the first forward pass, from which PEFT's DoRA then takes norms.

    It does so on CPUs, and decodes what it has repacked as if it had not.
    """
    return next(source.model.parameters()).device.type == "cpu"


def _is_packed(module: object) -> bool:
    """Whether a module stores its weight in anything but floating point."""
    weight = getattr(module, "weight", None) if isinstance(module, FrozenWeight) else None
    return weight is not None and not weight.is_floating_point()


FORMAT = Format(
    name="peft",
    runtime="PEFT on transformers (PeftModel)",
    loader="peft",
    needs_merge=False,
    advice="the base is not what it was trained on: compare the digests in finetune.json, or export safetensors",
    lossless=True,
    write=write,
)
