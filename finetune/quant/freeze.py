"""Swap the projections of a dense model in memory for frozen ones.

Loading from disk does not come this way (it stores each tensor as it arrives); this serves models that exist already.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.quant.base import QUANTIZERS, FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.structure.base import Projection, Structure


def freeze(model: nn.Module, config: QuantConfig, structure: Structure) -> None:
    """Replace every projection by a frozen module that holds its weight, in place, one after the other.

    Everything else stays dense; nothing in the model asks for a gradient afterwards. Projections that are frozen
    already stay as they are.

    Args:
        structure: what `finetune.structure.inspect(model)` found.

    Raises:
        ConfigError: when the head is to be quantized but shares its weight with the embeddings.
    """
    for projection in [*structure.projections, *head_of(model, config, structure)]:
        replace_projection(model, config, projection)
    if any(p.kind == "experts" for p in structure.projections):
        read_experts_one_by_one(model)
    model.requires_grad_(False)


def replace_projection(model: nn.Module, config: QuantConfig, projection: Projection) -> None:
    """Replace one projection, dense so far, and let go of its dense weight."""
    parent_name, _, leaf = projection.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    dense = getattr(parent, leaf)
    if isinstance(dense, FrozenWeight):
        return
    weight = dense if projection.kind == "experts" else dense.weight
    frozen = empty_frozen(config, projection, dense, dtype=weight.dtype, device=weight.device)
    if isinstance(frozen, FrozenLinear) and projection.transposed:
        frozen.store(weight.detach().T)
    else:
        frozen.store(weight.detach())
    if projection.kind == "experts":
        delattr(parent, leaf)
    setattr(parent, leaf, frozen)  # over a module: in place, so that the order of modules stays


def empty_frozen(
    config: QuantConfig,
    projection: Projection,
    dense: nn.Module | Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> FrozenLinear | FrozenExperts:
    """The empty frozen module that can stand for a dense projection; it takes over the projection's bias.

    A projection that the model wants in floating point gets a dense one, whatever `config` says.

    Args:
        dense: the module ("linear", "conv1d") or the 3-D parameter ("experts").
    """
    if projection.dense:
        config = DenseConfig()
    sizes = (projection.out_features, projection.in_features)
    common = {"dtype": dtype, "device": device, "transposed": projection.transposed}
    if projection.kind == "experts":
        return QUANTIZERS.build(config, *sizes, experts=projection.experts, **common)
    bias = getattr(dense, "bias", None)
    frozen = QUANTIZERS.build(config, *sizes, bias=bias is not None, **common)
    if bias is not None:
        frozen.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return frozen


def read_experts_one_by_one(model: nn.Module) -> None:
    """Choose transformers' eager expert loop, which reads `weight[expert]`; the other ways want a whole tensor."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


def head_of(model: nn.Module, config: QuantConfig, structure: Structure) -> Iterator[Projection]:
    """The output head as a projection, where the config asks for it.

    Raises:
        ConfigError: where it shares its weight with the embeddings.
    """
    if not getattr(config, "head", False) or structure.head is None:
        return
    if structure.tied:
        raise ConfigError(
            f"quant.head is true, but {structure.head} shares its weight with the embeddings: expected false"
        )
    head = model.get_submodule(structure.head)
    if isinstance(head, nn.Linear):
        yield Projection(structure.head, "linear", head.in_features, head.out_features)
