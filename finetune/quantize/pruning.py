"""What `finetune quantize` has to know of pruning before weights are loaded, and says of it in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError
from finetune.quant.pruned import said_pruned
from finetune.quant.pruners.base import PRUNERS, Pruner, PrunerConfig, SparseConfig
from finetune.quant.pruners.kept import Kept
from finetune.quant.rounders.zeros import holds_zero
from finetune.quantize.config import QuantizeConfig

if TYPE_CHECKING:
    from finetune.quant.driver import Layer
    from finetune.structure.base import Structure


def pruner_of(config: QuantizeConfig, told: Mapping[str, Any]) -> Pruner | None:
    """Who prunes; a base that was pruned before keeps its zeros where nobody is asked to.

    Args:
        told: config.json of the base.

    Raises:
        ConfigError: where the storage format has no exact zero.
    """
    pruner: Pruner | None = PRUNERS.build(config.pruner) if config.pruner.prunes else None
    if pruner is None and said_pruned(told):
        pruner = Kept()
    if pruner is not None and not holds_zero(config.quant):
        whose = f"pruner={config.pruner.name}" if not isinstance(pruner, Kept) else "the pruned base"
        raise ConfigError(
            f"quant={config.quant.name} as it is set here has no code for exactly 0, which weights of {whose} have to"
            " be: expected a format that does (nf4, int8, integers with quant.zero_point=integer or"
            " quant.symmetric=true)"
        )
    return pruner


def check_pattern(pruner: PrunerConfig, structure: Structure) -> None:
    """Refuse groups that do not divide the width of a projection.

    Raises:
        ConfigError: naming the first.
    """
    group = pruner.group if isinstance(pruner, SparseConfig) else None
    for p in structure.projections:
        if group is not None and not p.dense and p.in_features % group[1]:
            raise ConfigError(
                f"pruner.pattern is {group[0]}:{group[1]}, but {p.name} has {p.in_features} inputs: expected groups"
                f" that divide them, or pruner.pattern=null pruner.sparsity={group[0] / group[1]:g}"
            )


def sparsity(layers: Sequence[Layer], structure: Structure) -> float:
    """Share of zeros over all projections that were pruned."""
    weights = {p.name: p.experts * p.out_features * p.in_features for p in structure.projections}
    total = sum(weights[layer.name] for layer in layers)
    return sum(weights[layer.name] * (layer.sparsity or 0.0) for layer in layers) / max(1, total)


def settings(pruner: PrunerConfig, reached: float) -> dict[str, Any]:
    """What config.json says of a pruned checkpoint; see `finetune.quant.pruned`."""
    pattern = pruner.pattern if isinstance(pruner, SparseConfig) else None
    return {"method": pruner.name, "sparsity": round(reached, 6), "pattern": pattern}
