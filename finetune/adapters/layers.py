"""Layers: whole blocks train, in full; what offsite-tuning trains at the ends of an emulator.

Xiao, Lin and Han 2023 (arXiv:2302.04870) section 3: the first and the last blocks of a model are its adapters, and the
gradient reaches the first ones *through* the frozen blocks between. With `layers: all` it is full fine-tuning of the
blocks.

The trained weight is a copy of the stored one in float32. On a dense base the copy alone computes, and at the start it
gives the stored bits. On a packed base the stored weight goes on computing and the copy adds what it has learnt, W - W0
with W0 the decoded weight, so that the start is the base's own here too.

Shape suffixes: B leading dimensions, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedExperts, AdaptedLinear
from finetune.adapters.base import ADAPTERS, AdapterConfig
from finetune.adapters.emulator import FILE, Emulator, read_emulator
from finetune.adapters.lora_layers import LowRankWeight
from finetune.adapters.own_format import as_saved
from finetune.adapters.peft_format import OWN_METHOD, base_of
from finetune.adapters.weight import WeightAdapter
from finetune.errors import ConfigError, ModelError, nearest
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight
from finetune.quant.dense import DenseExperts, DenseLinear
from finetune.structure import Projection, Structure, inspect

AUTO, ALL = "auto", "all"


@dataclass
class LayersConfig(AdapterConfig):
    """Whole blocks. With `path`, the saved adapter decides which.

    Attributes:
        layers: `auto` for the blocks that the base's offsite.json names, `all`, or a list of block numbers, counted
            from 0, or from the end where negative: [0, -1] is the first and the last.
    """

    name: str = "layers"
    learning_rate: float = 1e-3
    # OmegaConf has no type for "a word or a list of numbers".
    layers: Any = AUTO

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str):
            if self.layers not in (AUTO, ALL):
                hint = nearest(self.layers, (AUTO, ALL))
                raise ConfigError(f"adapter.layers is {self.layers!r}: expected auto, all or a list of blocks{hint}")
        elif not _numbers(self.layers):
            raise ConfigError(
                f"adapter.layers is {self.layers!r}: expected auto, all or a list of blocks, e.g. [0, -1]"
            )

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and broken settings."""
        as_saved(self, directory, ("layers", "train_also"))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


class FullLinear(AdaptedLinear):
    """A frozen linear layer whose whole weight trains.

    Attributes:
        trained_weight: w_OI, laid out in memory as the base's.
        trained_bias: None where the base has no bias.
        packed: whether the base stores codes.
    """

    trained_bias: nn.Parameter | None
    stored: torch.dtype

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__(base)
        self.packed = not isinstance(base, DenseLinear)
        weight_OI = base.dequantize(torch.float32)
        self.stored = torch.float32 if self.packed else base.weight.dtype  # type: ignore[assignment]
        self.trained_weight = nn.Parameter(weight_OI.detach().clone())
        _keep_zeros(self.trained_weight, base)
        bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(torch.float32, copy=True))
        self.register_parameter("trained_bias", bias)

    def adapted(self, x_BI: Tensor) -> Tensor:
        """y_BO by the trained weight, in the dtype of x."""
        if self.packed:
            y_BO = self.base(x_BI)
            y_BO = y_BO + F.linear(x_BI, _learnt(self.trained_weight, self.base).to(x_BI.dtype))
            if self.trained_bias is None or self.bias is None:
                return y_BO
            return y_BO + (self.trained_bias - self.bias.to(self.trained_bias.dtype)).to(y_BO.dtype)
        bias = self.trained_bias
        return F.linear(x_BI, self._worth(self.trained_weight, x_BI), None if bias is None else self._worth(bias, x_BI))

    def _worth(self, parameter: Tensor, x_BI: Tensor) -> Tensor:
        """A parameter as the base's dtype holds it (what an export will hold, also where the model was widened)."""
        return parameter.to(self.stored).to(x_BI.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """The trained weight; the stored one has no part in it."""
        return self.trained_weight.detach().to(torch.float32, copy=True)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Weight and bias."""
        yield "weight", self.merge(self.trained_weight)
        if self.trained_bias is not None:
            yield "bias", self.trained_bias.detach().to(torch.float32, copy=True)


class FullExperts(AdaptedExperts):
    """A frozen stack of experts that trains whole.

    Attributes:
        trained_stack: laid out as the parameter that the stack stands for.
    """

    stored: torch.dtype

    def __init__(self, base: FrozenExperts, *, transposed: bool) -> None:
        super().__init__(base)
        self.packed, self.transposed = not isinstance(base, DenseExperts), transposed
        stack = base.dequantize(torch.float32)
        self.stored = torch.float32 if self.packed else base.weight.dtype  # type: ignore[assignment]
        self.trained_stack = nn.Parameter(stack.detach().clone())
        _keep_zeros(self.trained_stack, base)

    def adapted(self, expert: int | Tensor) -> Any:
        """The trained weight of one expert, or an operand that adds what it has learnt to the packed one."""
        if self.packed:
            return LearntWeight(self, expert)
        return self.trained_stack[expert].to(self.stored).to(self.base[expert].dtype)  # type: ignore[index]

    def merge(self, weight: Tensor) -> Tensor:
        """The trained stack."""
        return self.trained_stack.detach().to(torch.float32, copy=True)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The stack."""
        yield "weight", self.merge(self.trained_stack)


class LearntWeight(LowRankWeight):
    """W0 + (W - W0) of one expert as an operand of the products that expert loops use, W0 packed; see its base."""

    experts: FullExperts  # type: ignore[assignment]

    def __init__(self, experts: FullExperts, expert: int | Tensor) -> None:
        self.experts, self.expert = experts, expert

    def apply(self, x_BI: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`product(x, W0)` and what the difference adds, in the dtype of x."""
        learnt = self._learnt().to(x_BI.dtype)
        added = torch.matmul(x_BI, learnt) if self.experts.transposed else F.linear(x_BI, learnt)
        return product(x_BI, self.experts.base[self.expert]) + added  # type: ignore[index]

    def dense(self) -> Tensor:
        """The sum, in the layout and dtype of the base's weight."""
        base: Tensor = self.experts.base[self.expert]  # type: ignore[index]
        return base + self._learnt().to(base.dtype)

    def _learnt(self) -> Tensor:
        return _learnt(self.experts.trained_stack, self.experts.base)[self.expert]


def _learnt(trained: Tensor, base: FrozenWeight) -> Tensor:
    """W - W0: exactly zero before the first step."""
    return trained - base.dequantize(trained.dtype)  # type: ignore[operator]


def _keep_zeros(trained: nn.Parameter, base: FrozenWeight) -> None:
    """Give the zeros of a pruned base no gradient, by which optimizers leave them zero."""
    if base.pruned:
        stored: Any = base
        trained.register_hook(lambda gradient: torch.where(stored.dequantize(torch.float32) != 0, gradient, 0))


class LayersAdapter(WeightAdapter):
    """Whole blocks of a model attached for training; see `LayersConfig`.

    Args:
        layers: numbers of the blocks.
        emulator: what the base's offsite.json says, where it has one.
    """

    config: LayersConfig  # type: ignore[assignment]

    def __init__(self, config: LayersConfig, model: nn.Module, layers: list[int], emulator: Emulator | None) -> None:
        structure = inspect(model)
        self.layers, self.emulator = layers, emulator
        self.blocks = [structure.blocks[number] for number in layers]
        plan = [p for p in structure.projections if p.block in layers]
        self.parts, self.left = _others(model, self.blocks, plan)
        super().__init__(config, model, plan)  # type: ignore[arg-type]

    def wrap(self, base: FrozenLinear, projection: Projection) -> FullLinear:
        """The whole weight."""
        return FullLinear(base)

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> FullExperts:
        """The whole stack."""
        return FullExperts(base, transposed=projection.transposed)

    def select(self) -> dict[str, tuple[str, ...]]:
        """Norms, routers and whatever else the blocks hold."""
        return self.parts

    @property
    def note(self) -> str:
        """Which blocks train, and what of them does not."""
        which = ", ".join(map(str, self.layers))
        lines = [f"block{'s' * (len(self.layers) > 1)} {which} of {len(self.structure.blocks)} train in full"]
        if any(getattr(module, "packed", False) for module in self.adapted.values()):
            lines.append("from weights decoded out of their storage: quant=none or keep trains dense ones")
        if self.left:
            lines.append(f"except for {', '.join(self.left)}, which stay as they are")
        return "; ".join(lines)

    def file_config(self) -> dict[str, Any]:
        """The blocks' numbers and, for those of an emulator, where they belong."""
        own: dict[str, Any] = {OWN_METHOD: self.config.name, "layers": self.layers, "dtype": self.config.dtype}
        whole = [name for name in self.copies if name not in self.parts]
        origin = {} if self.emulator is None else {"offsite": vars(self.emulator)}
        return own | {"train_also": whole} | origin

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """The blocks have to be the same."""
        if saved.get("layers") != self.layers:
            raise ModelError(
                f"adapter {directory} has layers {saved.get('layers')!r}, but here they are {self.layers!r}"
            )


@ADAPTERS.register(LayersConfig)
def build(config: LayersConfig, model: nn.Module) -> LayersAdapter:
    """Attach whole blocks of a model; `config.path` decides which here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = as_saved(config, Path(config.path), ("layers", "train_also"))
    structure, directory = inspect(model), base_directory(model)
    emulator = None if directory is None else read_emulator(directory)
    return LayersAdapter(config, model, chosen(config, structure, emulator, directory), emulator)


def base_directory(model: nn.Module) -> Path | None:
    """The directory that a model was read from, where that is on this machine."""
    path = base_of(model)
    return Path(path) if path and Path(path).is_dir() else None


def chosen(config: LayersConfig, structure: Structure, emulator: Emulator | None, directory: Path | None) -> list[int]:
    """The numbers of the blocks that `adapter.layers` means, in order.

    Raises:
        ConfigError: for `auto` without an offsite.json, one that speaks of another number of blocks, and a block that
            the model does not have.
    """
    count = len(structure.blocks)
    if config.layers == ALL:
        return list(range(count))
    if config.layers == AUTO:
        if emulator is None:
            where = f"{directory} has no {FILE}" if directory else f"the base has no {FILE} on this machine"
            raise ConfigError(
                f"adapter.layers is auto, but {where}: name the blocks, e.g. adapter.layers=[0,-1], or take an emulator"
                " that `finetune offsite split` made"
            )
        if emulator.blocks != count:
            raise ConfigError(
                f"adapter.layers is auto, but {directory / FILE if directory else FILE} speaks of {emulator.blocks}"
                f" blocks and the model has {count}"
            )
        return list(emulator.train)
    wrong = [number for number in config.layers if not -count <= number < count]
    if wrong:
        raise ConfigError(
            f"adapter.layers names block {wrong[0]}: the model has {count}, expected {-count} to {count - 1}"
        )
    return sorted({number % count for number in config.layers})


def _others(
    model: nn.Module, blocks: list[str], plan: list[Projection]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What blocks hold besides projections: modules with the parameters that train, and names of what cannot.

    A parameter cannot where its module also holds a projection or other modules with weights: nothing could stand for
    that module without standing for those.
    """
    projections = {p.name for p in plan}
    parts: dict[str, tuple[str, ...]] = {}
    left: list[str] = []
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if name in projections or isinstance(module, FrozenWeight):
                continue
            own = [leaf for leaf, p in module.named_parameters(recurse=False) if p.is_floating_point()]
            rest = tuple(leaf for leaf in own if f"{name}.{leaf}" not in projections)
            if not rest:
                continue
            alone = len(rest) == len(own) and not any(True for c in module.children() for _ in c.parameters())
            if alone:
                parts[name] = rest
            else:
                left += [f"{name}.{leaf}" for leaf in rest]
    return parts, left
