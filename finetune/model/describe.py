"""Where the weights of a base went: how each is stored, and why where one stayed in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from finetune.quant.base import FrozenWeight
from finetune.quant.dense import DenseConfig
from finetune.structure import Structure, inspect


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a model.

    Attributes:
        name: of the module, or of the parameter that no frozen module holds.
        storage: name of the format ("nf4"), or the dtype of a dense weight ("bfloat16").
        weights: how many numbers it stands for.
        bytes: that they take, scales included, bias excluded.
        reason: why it is dense; empty where it is quantized.
        block: whether it lies in the repeated blocks.
    """

    name: str
    storage: str
    weights: int
    bytes: int
    reason: str
    block: bool

    @property
    def dense(self) -> bool:
        """Whether it stayed as it was."""
        return bool(self.reason)


def storage_table(model: nn.Module) -> list[StoredWeight]:
    """Every weight of two or more dimensions, and every other parameter by the way, with its storage."""
    structure = inspect(model)
    rows: list[StoredWeight] = []
    held: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            held.update(id(parameter) for parameter in module.parameters())
            rows.append(_frozen_row(name, module, structure))
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            size = parameter.numel() * parameter.element_size()
            reason = _reason(name, parameter.dim(), structure)
            rows.append(
                StoredWeight(name, _dtype(parameter), parameter.numel(), size, reason, _in_block(name, structure))
            )
    return rows


def storage_text(model: nn.Module) -> str:
    """The table summed up: a line a storage and reason, largest first, and the totals."""
    sums: dict[tuple[str, str], list[int]] = {}
    rows = storage_table(model)
    for row in rows:
        entry = sums.setdefault((row.storage, row.reason), [0, 0, 0])
        for index, value in enumerate((1, row.weights, row.bytes)):
            entry[index] += value
    lines = [f"{'storage':<10} {'tensors':>7} {'weights':>15} {'MiB':>9} {'bits':>6}  why not quantized"]
    for (storage, reason), (count, weights, size) in sorted(sums.items(), key=lambda item: -item[1][2]):
        bits = 8 * size / max(weights, 1)
        lines.append(f"{storage:<10} {count:>7} {weights:>15,} {size / 2**20:>9.1f} {bits:>6.2f}  {reason}".rstrip())
    weights, size = sum(row.weights for row in rows), sum(row.bytes for row in rows)
    lines.append(f"{'all':<10} {len(rows):>7} {weights:>15,} {size / 2**20:>9.1f} {8 * size / max(weights, 1):>6.2f}")
    return "\n".join(lines)


def storage_notes(model: nn.Module, most: float) -> list[str]:
    """A note where more than that share of the block weights stayed dense under a quantizing configuration."""
    rows = [row for row in storage_table(model) if row.block]
    dense, weights = sum(row.weights for row in rows if row.dense), sum(row.weights for row in rows)
    if not weights or dense / weights <= most:
        return []
    worst = max((row for row in rows if row.dense), key=lambda row: row.weights)
    share = f"{dense / weights:.0%} of the block weights are not quantized"
    return [f"{share} ({worst.reason}; e.g. {worst.name}): memory is nearer to the dense model's than quant suggests"]


def _frozen_row(name: str, module: FrozenWeight, structure: Structure) -> StoredWeight:
    """A row for a frozen module."""
    weights = prod((getattr(module, "num_experts", 1), module.out_features, module.in_features))
    bias = getattr(module, "bias", None)
    size = module.bytes() - (bias.numel() * bias.element_size() if bias is not None else 0)
    parameters = dict(module.named_parameters(recurse=False))
    dense = parameters["weight"].numel() == weights and parameters["weight"].is_floating_point()
    storage = _dtype(parameters["weight"]) if dense else str(getattr(module, "storage", type(module).__name__))
    reason = ""
    if any(p.name == name and p.dense for p in structure.projections):
        reason = "the model's code wants it in floating point"
    elif dense:
        reason = f"quant={DenseConfig().name}, or as the checkpoint stores it"
    return StoredWeight(name, storage, weights, size, reason, _in_block(name, structure))


def _reason(name: str, dimensions: int, structure: Structure) -> str:
    """Why a parameter that no frozen module holds stayed dense."""
    module = name.rpartition(".")[0]
    if module == structure.embeddings:
        return "embeddings, shared with the head" if structure.tied else "embeddings"
    if module == structure.head:
        return "head (quant.head is false)"
    if dimensions < 2:
        return "norm, bias or other vector"
    if not _in_block(name, structure):
        return "outside the blocks"
    if dimensions == 3:
        return "experts that are not read one at a time, or a convolution"
    return "router or other matrix that is not a projection"


def _in_block(name: str, structure: Structure) -> bool:
    """Whether a name lies in the repeated blocks."""
    return name.startswith(tuple(f"{block}." for block in structure.blocks))


def _dtype(parameter: nn.Parameter) -> str:
    """A dtype by its short name."""
    return str(parameter.dtype).removeprefix("torch.")
