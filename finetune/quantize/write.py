"""The checkpoint that is written: in a public layout wherever one can hold what is in memory, else in ours.

- NF4, FP4 and int8 of linear layers: bitsandbytes' own keys.
- 4 and 8 bit integers of linear layers, in whole groups, symmetric or with integer zero points: compressed-tensors.
- Dense, where the model was pruned: a plain checkpoint.
- Whatever else (2 and 3 bits, real zero points, short last groups, Conv1Ds in integers, stacks of experts): our keys,
  which stock transformers refuses by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.export.base import ExportSource
from finetune.export.directory import narrowed
from finetune.export.merge import Stock, frozen_at, stored_weight
from finetune.export.stock import write_config, write_tokenizer, write_weights
from finetune.model import compressed_format
from finetune.model.stored import quantization_config
from finetune.quant.affine import AffineLinear
from finetune.quant.base import QuantConfig
from finetune.quant.int8_storage import COLUMNS
from finetune.quant.packed import PackedExperts, PackedLinear, PackedWeight
from finetune.quant.w8a8_storage import IntegerConfig
from finetune.structure.base import Structure
from finetune.structure.inspect import projection_of


def compressed(quant: QuantConfig, structure: Structure) -> bool:
    """Whether compressed-tensors can hold every projection of a model that is to be quantized."""
    todo = [p for p in structure.projections if not p.dense]
    return compressed_format.holds(quant) and all(
        p.kind == "linear" and compressed_format.fits(quant, p.in_features) for p in todo
    )


Stored = Mapping[str, Iterable[tuple[str, Tensor]]]
"""What is on disk already: by the name of a weight in the stock model, under which keys it is stored."""


def write(
    source: ExportSource, quant: QuantConfig, in_public: bool, directory: Path, stored: Stored | None = None
) -> str:
    """Write a quantized model, its tokenizer and configuration; returns who reads it, in words.

    Args:
        source: the model, no adapter attached.
        quant: what its projections are stored in.
        in_public: as `compressed` said before they were.
        stored: weights that are no longer in the model.
    """
    model = source.model
    stock = Stock.of(model)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    stacks = [name for name, module in packed.items() if isinstance(module, PackedExperts)]
    linears = [name for name, module in stock.model.named_modules() if projection_of(module, name) is not None]
    kept = [name for name in linears if name not in packed]
    kinds = {type(stock.model.get_submodule(name)) for name in linears if name in packed}
    in_public = in_public and all(isinstance(module, AffineLinear) for module in packed.values())
    if in_public:
        told: dict[str, Any] | None = compressed_format.stock_config(quant, kept)
    else:
        conv1ds = any(isinstance(module, PackedLinear) and module.transposed for module in packed.values())
        derived = any(issubclass(kind, nn.Linear) and kind is not nn.Linear for kind in kinds)
        told = quantization_config(quant, source.dtype, kept, stacks=bool(stacks), conv1ds=conv1ds, derived=derived)
    _let_stacks_pass(stock.model, stacks)
    tensors = (
        each
        for name in stock.names
        for each in (stored or {}).get(name) or stock_tensors(model, stock, name, source.dtype, in_public)
    )
    columns: list[int] = []
    write_weights(source, stock, _counted(tensors, columns), directory)
    write_config(source, directory, untied=False, quantization_config=told)
    write_tokenizer(source, directory)
    if not packed:
        return "transformers, and finetune"
    method = (told or {}).get("quant_method")
    vllm = getattr(quant, "bits", 8) in compressed_format.PACKED_BITS  # it has no kernels for other integers
    if isinstance(quant, IntegerConfig):
        vllm = (quant.bits, quant.group_size) == (8, -1)
    less = f" (less what is kept of {sum(columns)} columns)" if columns else ""
    return {
        "bitsandbytes": f"transformers + bitsandbytes{less}, and finetune",
        compressed_format.METHOD: f"transformers{' or vLLM' if vllm else ''} with compressed-tensors, and finetune",
    }.get(str(method), "finetune alone: no public layout holds this storage")


def _counted(tensors: Iterable[tuple[str, Tensor]], columns: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; of each layer in int8 that keeps columns, how many go into the list."""
    for key, tensor in tensors:
        if key.endswith(f".{COLUMNS}"):
            columns.append(len(tensor))
        yield key, tensor


def stock_tensors(
    model: nn.Module, stock: Stock, name: str, dtype: torch.dtype, in_public: bool
) -> Iterator[tuple[str, Tensor]]:
    """What the checkpoint holds of a weight of the stock model, by key: itself, or its codes and scales.

    Args:
        name: of the weight in the stock model.
        dtype: of what is not quantized.
        in_public: as `write`.
    """
    path, _, leaf = name.rpartition(".")
    stack = frozen_at(model, name)
    if isinstance(stack, PackedExperts):
        yield from ((f"{name}.{key}", tensor) for key, tensor in stack.packed_state().items())
        return
    linear = frozen_at(model, path) if path and leaf == "weight" else None
    if isinstance(linear, PackedLinear):
        if in_public and isinstance(linear, AffineLinear):
            state = compressed_format.compressed_state(linear, dtype)
        else:
            state = linear.packed_state()
        yield from ((f"{path}.{key}", tensor) for key, tensor in state.items())
        return
    weight = stored_weight(model, name, stock.projections.get(name))
    yield name, weight if weight.dtype == torch.float32 and _dense_in_fp32(model, path) else narrowed(weight, dtype)


def _dense_in_fp32(model: nn.Module, path: str) -> bool:
    """Whether the model keeps what lies at a path in float32 whatever its own dtype."""
    wanted = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not set(wanted).isdisjoint(path.split("."))


def _let_stacks_pass(stock: Any, stacks: list[str]) -> None:
    """Leave out the renamings that would cut packed stacks of experts apart on their way to disk."""
    if not stacks:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    from finetune.model.quantizer import packs

    conversions = get_model_conversion_mapping(stock, add_legacy=False) or []
    stock._weight_conversions = [c for c in conversions if not packs(c, stacks)]
