"""The adapted model as plain weights, under the names of the stock transformers model, one tensor at a time.

The adapter is merged in float32 onto the base it was trained on, decoded from what is stored: for a quantized base that
is dequantize(codes), never the original 16-bit weights, from which the adapter would be off by the quantization error,
and never a weight that a kernel has repacked (bitsandbytes on CPU does so at the first forward pass).

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.export.base import ExportSource
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight
from finetune.structure import inspect
from finetune.structure.base import Projection


@dataclass(frozen=True)
class Stock:
    """The unadapted, unquantized model that an export is written as.

    Attributes:
        model: it, on the meta device.
        names: of its weights as it would save them, tied duplicates left out.
        tied: tied duplicate -> the weight it shares.
        projections: by the name of their weight, those inside the blocks.
    """

    model: Any
    names: tuple[str, ...]
    tied: dict[str, str]
    projections: dict[str, Projection]

    @classmethod
    def of(cls, model: Any) -> Stock:
        """Build the stock model of a loaded one from its class and its configuration; costs no memory."""
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            stock = type(model)(config)
        tied = dict(stock.all_tied_weights_keys)
        ignored = set(stock._keys_to_ignore_on_save or ())
        names = tuple(name for name in stock.state_dict() if name not in tied and name not in ignored)
        found = inspect(stock).projections
        weights = {p.name if p.kind == "experts" else f"{p.name}.weight": p for p in found}
        return cls(stock, names, tied, weights)

    def parameters(self) -> int:
        """Weights of the model, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def frozen_at(model: nn.Module, path: str) -> FrozenWeight | None:
    """The frozen weight that stands at a module or parameter path of the stock model, under an adapter or not."""
    owner: Any = model
    for part in path.split("."):
        owner = getattr(owner, part, None)
    if not isinstance(owner, nn.Module):
        return None
    return next((module for module in owner.modules() if isinstance(module, FrozenWeight)), None)


def stored_weight(model: nn.Module, name: str, projection: Projection | None) -> Tensor:
    """The weight that the unadapted model calls `name`, decoded to float32 where it is frozen, else as it is.

    Args:
        projection: what the stock model says of a block projection; a transposed linear is turned to the stock layout.

    Raises:
        KeyError: when the model holds nothing of that name.
    """
    experts = frozen_at(model, name)
    if isinstance(experts, FrozenExperts):
        return experts.dequantize(torch.float32)
    path, _, leaf = name.rpartition(".")
    frozen = frozen_at(model, path) if path else None
    if leaf == "weight" and isinstance(frozen, FrozenLinear):
        w_OI = frozen.dequantize(torch.float32)
        return w_OI.T if projection is not None and projection.transposed else w_OI
    for module in (frozen, *model.get_submodule(path).modules()):
        if module is not None and isinstance(getattr(module, leaf, None), Tensor):
            return getattr(module, leaf).detach()
    raise KeyError(f"the model holds no weight for {name}")


def merged_weights(source: ExportSource, stock: Stock) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the stock model with the adapter merged in; what it does not touch comes as it is stored.

    A tied duplicate comes only where training has made it differ from the weight it was tied to.

    Yields:
        The stock name, and the weight in the stock layout; float32 where merged or decoded.
    """
    done: set[str] = set()
    sources: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in source.adapter.merged() if source.adapter is not None else ():
            if weight is None:
                continue
            done.add(name)
            if name in stock.tied.values():
                sources[name] = weight
            if name in stock.tied:
                shared = stock.tied[name]
                if shared not in sources:
                    sources[shared] = stored_weight(source.model, shared, None)
                if torch.equal(weight.float(), sources[shared].float()):
                    continue
            yield name, weight
        for name in stock.names:
            if name not in done:
                yield name, stored_weight(source.model, name, stock.projections.get(name))
