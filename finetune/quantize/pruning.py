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
    from finetune.model.held import Held
    from finetune.quant.driver import Layer
    from finetune.quant.pruners.cut import Cut
    from finetune.quantize.write import Stored
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


def cut_of(config: QuantizeConfig, model: Any, held: Held) -> Cut | None:
    """Who takes whole parts out, having seen that it can; None where nobody is to.

    Args:
        model: on the meta device.
        held: what it was opened as.

    Raises:
        ConfigError: for a share that takes nothing, and a fit that would fill the zeros of a pruned base.
        ModelError: for a model that cannot be smaller in this way.
    """
    from finetune.model.pretrained import empty_model, quiet

    if not config.pruner.cuts:
        return None
    if said_pruned(model.config) and getattr(config.pruner, "refit", False):
        raise ConfigError(
            f"model.path={config.model.path} was pruned, and fitting what pruner={config.pruner.name} leaves would fill"
            " its zeros: expected pruner.refit=false"
        )

    def build(stock: Any) -> Any:
        return empty_model(stock, config.model, held)

    cut: Cut = PRUNERS.build(config.pruner)
    with quiet():
        cut.plan(build(model.config), build)
    return cut


def moved(stored: Stored, blocks: Mapping[str, str]) -> Stored:
    """What is on disk by the names that it has once some blocks are gone.

    Args:
        blocks: new names by the old ones, where they differ.
    """

    def new(name: str) -> str:
        old = next((block for block in blocks if name.startswith(f"{block}.")), None)
        return name if old is None else blocks[old] + name.removeprefix(old)

    return {new(name): [(new(key), tensor) for key, tensor in parts] for name, parts in stored.items()}


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
