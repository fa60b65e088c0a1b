"""LoRA: y = W x + s B A dropout(x), with A and B trained and W frozen.

Hu et al. 2021 (arXiv:2106.09685) section 4.1; s = alpha / rank, or alpha / sqrt(rank) with `rslora` (Kalajdzievski
2023, arXiv:2312.03732). A starts as kaiming_uniform(a = sqrt 5), as in the authors' loralib, and B as zeros, so that
the adapted model starts as the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.adapted import AdaptedWeight
from finetune.adapters.base import ADAPTERS
from finetune.adapters.full_copy import resolve_modules, saved_whole, trained_whole
from finetune.adapters.lora_besides import NOTHING, ROWS_KEY, Besides, biases, token_rows
from finetune.adapters.lora_embedding import LoRAEmbedding, check_lookup
from finetune.adapters.lora_layers import LoRAExperts, LoRALinear, transposed_factors
from finetune.adapters.lora_parameter import LoRAParameter, parameters_of
from finetune.adapters.peft_lora import Saved, read_saved, resolve_saved
from finetune.adapters.select import BiasLinear
from finetune.adapters.token_rows import TokenRows
from finetune.adapters.weight import WeightAdapter, WeightConfig, choose, freeze_dense
from finetune.errors import ConfigError, ModelError
from finetune.quant.base import FrozenExperts, FrozenLinear
from finetune.structure import Projection, Structure, inspect

NUMBERED = re.compile(r"\.\d+\.")
"""What is stored for one of several blocks has a number in its name."""


@dataclass
class LoRAConfig(WeightConfig):
    """LoRA on any linear layer, stack of experts or token embedding.

    With `path`, the saved adapter decides rank, alpha, rslora, targets and train_also; a value set here that is neither
    the default nor the saved one is refused. (A value set to the default cannot be told from one left alone.)
    `dropout` belongs to the training, not to the adapter, and is always taken from here.

    Attributes:
        rank: inner width of the two factors; on experts, of each expert.
        alpha: numerator of the scaling.
        dropout: share of the input of A that is zeroed while training.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
    """

    embeds: ClassVar[bool] = True
    trains_besides: ClassVar[bool] = True
    """Whether it takes PEFT's files that train more than the products; see lora_besides.py."""

    name: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"adapter.rank is {self.rank}: expected at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"adapter.alpha is {self.alpha}: expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout is {self.dropout}: expected 0 or more and less than 1")

    def read(self, directory: Path) -> Saved:
        """What the adapter_config.json of a saved adapter says, refused where it is of another method than this."""
        return read_saved(directory)

    def check_saved(self, directory: Path) -> None:
        """Refuse another method, settings that we do not compute, and another rank, alpha or rslora than set here."""
        saved = self.read(directory)
        if saved.besides and not self.trains_besides:
            raise ModelError(
                f"adapter {directory} has {saved.besides}, which adapter={self.name} does not train: set adapter=lora"
            )
        default = type(self)()
        for key in ("rank", "alpha", "rslora"):
            mine, theirs = getattr(self, key), getattr(saved, key)
            if mine not in (getattr(default, key), theirs):
                raise ConfigError(
                    f"adapter.{key} is {mine}, but the adapter {directory} has {theirs}: leave adapter.{key} out"
                )

    def check_stored(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a rank above every side of every matrix that is stored for the blocks.

        Packing makes sides longer, joining makes one of two longer: the shorter side of a projection is never above
        the longest one stored.
        """
        sides = [max(shape) for name, shape in shapes.items() if len(shape) > 1 and NUMBERED.search(name)]
        if sides and self.rank > max(sides):
            raise ConfigError(
                f"adapter.rank is {self.rank}, but the blocks of the model have no matrix with a side above"
                f" {max(sides)}: expected less"
            )


@dataclass(frozen=True)
class Size:
    """Rank and alpha of one projection."""

    rank: int
    alpha: float

    def scaling(self, rslora: bool) -> float:
        """The factor on B A x."""
        return self.alpha / (math.sqrt(self.rank) if rslora else self.rank)


class LoRAAdapter(WeightAdapter):
    """LoRA attached to a model; see `LoRAConfig`.

    Raises:
        ConfigError: also for a rank larger than a targeted projection.
    """

    config: LoRAConfig

    def __init__(
        self,
        config: LoRAConfig,
        model: nn.Module,
        sizes: Mapping[str, Size],
        plan: list[Projection],
        besides: Besides = NOTHING,
    ) -> None:
        self.sizes, self.besides = sizes, besides
        super().__init__(config, model, plan)
        self.torn = [name for p in plan if p.kind == "embedding" for name in self.structure.ties if name != p.name]

    def check(self) -> None:
        """A rank above the shorter side of a projection spends parameters on nothing; PEFT lets a file have one."""
        for p in self.projections:
            side = min if self.config.path is None else max
            rank, most = self.sizes[p.name].rank, side(p.in_features, p.out_features)
            if rank > most:
                raise ConfigError(
                    f"adapter.rank is {rank}, but {p.name} is {p.out_features} x {p.in_features}:"
                    f" expected at most {most}, or targets without it"
                )
            if p.kind == "embedding":
                check_lookup(self.model.get_submodule(p.name), p.name)

    def wrap(self, base: FrozenLinear, projection: Projection) -> LoRALinear:
        """A low-rank product beside a linear layer."""
        return LoRALinear(base, **self._sizes(projection))

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> LoRAExperts:
        """A low-rank product beside each expert."""
        return LoRAExperts(base, transposed=projection.transposed, **self._sizes(projection))

    def wrap_embedding(self, base: nn.Embedding, projection: Projection) -> LoRAEmbedding:
        """A low-rank table beside the token embedding."""
        return LoRAEmbedding(base, **self._sizes(projection))

    def select(self) -> dict[str, tuple[str, ...]]:
        """Modules whose bias trains, where every bias does."""
        whole = trained_whole(self.model, self.structure, self.config.train_also)
        self._biased, parts = biases(self.model, self.besides, self.projections, whole)
        self.biased = tuple(parts)
        return parts

    def further(self) -> dict[str, AdaptedWeight]:
        """Projections whose bias alone trains, and tables of which rows do."""
        freeze_dense(self.model, self.structure, self._biased)
        found: dict[str, AdaptedWeight] = {}
        for p in self._biased:
            base: Any = self.model.get_submodule(p.name)
            found[p.name] = BiasLinear(base)
        rows: dict[str, AdaptedWeight] = {**token_rows(self.model, self.structure, self.besides)}
        for name in self.besides.parameters:
            size = self.sizes[f"{name}.weight"]
            rows[name] = LoRAParameter(
                self.model.get_submodule(name), rank=size.rank, scaling=size.scaling(self.config.rslora)
            )
        twice = next((name for name in rows if name in found or name in self.adapted or name in self.copies), None)
        if twice is not None:
            raise ConfigError(f"the adapter {self.config.path} trains {twice} in two ways: expected one of them")
        return found | rows

    def _trained(self, wrapped: AdaptedWeight, dtype: torch.dtype) -> AdaptedWeight:
        if isinstance(wrapped, LoRALinear):
            wrapped.train_biases(self.besides.bias != "none", self.besides.lora_bias)
        return super()._trained(wrapped, dtype)

    def _sizes(self, projection: Projection) -> dict[str, Any]:
        size = self.sizes[projection.name]
        return {"rank": size.rank, "scaling": size.scaling(self.config.rslora), "dropout": self.config.dropout}

    @property
    def mergeable(self) -> bool:
        """Unless a saved adapter changes a token embedding that is tied here, or brings biases that the base lacks."""
        return not self.obstacle

    @property
    def obstacle(self) -> str:
        """Names both."""
        if self.torn:
            tied = ", ".join(self.torn)
            return f"{self.structure.embeddings}, whose weight is tied to {tied}, cannot change on its own"
        linear = ((name, module) for name, module in self.adapted.items() if isinstance(module, LoRALinear))
        without = sorted({n.rpartition(".")[2] for n, m in linear if m.bias is None}) if self.besides.lora_bias else ()
        return f"the layout of the base has no bias for {', '.join(without)}" if without else ""

    @property
    def peft_obstacle(self) -> str:
        """PEFT adds the product to zeros of a pruned base too."""
        masked = any(module.pruned_base() is not None for module in self.adapted.values())
        return "PEFT knows no masks, and this base was pruned" if masked else super().peft_obstacle

    def file_keys(self) -> dict[str, nn.Parameter]:
        """PEFT's names. Several parameters of one experts module nest there, the first of them innermost."""
        siblings: dict[str, list[str]] = {}
        for p in self.projections:
            if p.kind == "experts":
                siblings.setdefault(p.name.rpartition(".")[0], []).append(p.name)
        keys = {}
        for p in self.projections:
            parent, module = p.name.rpartition(".")[0], self.adapted[p.name]
            if isinstance(module, LoRAEmbedding):
                keys[f"{peft_format.PREFIX}{p.name}.lora_embedding_A"] = module.lora_embedding_A
                keys[f"{peft_format.PREFIX}{p.name}.lora_embedding_B"] = module.lora_embedding_B
                continue
            if p.kind == "experts":
                depth = len(siblings[parent]) - 1 - siblings[parent].index(p.name)
                name = parent + ".base_layer" * depth
            else:
                name = p.name
            for factor in ("lora_A", "lora_B"):
                keys[f"{peft_format.PREFIX}{name}.{factor}.weight"] = getattr(module, factor).weight
            if isinstance(module, LoRALinear):
                own = {"base_layer.bias": module.trained_bias, "lora_B.bias": module.lora_B.bias}
                keys |= {f"{peft_format.PREFIX}{name}.{leaf}": p for leaf, p in own.items() if p is not None}
        return keys | self._keys_besides() | self.copy_keys()

    def _keys_besides(self) -> dict[str, nn.Parameter]:
        """PEFT's names of what is no projection; rows that several tables use come once, as those of the first."""
        keys: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for name, module in self.followed.items():
            if isinstance(module, BiasLinear):
                keys[f"{peft_format.PREFIX}{name}.bias"] = module.trained_bias
            elif isinstance(module, TokenRows) and id(module.rows_NH) not in seen:
                seen.add(id(module.rows_NH))
                keys[f"{peft_format.PREFIX}{name}.{ROWS_KEY}"] = module.rows_NH
            elif isinstance(module, LoRAParameter):
                keys[f"{peft_format.PREFIX}{name}.lora_A.weight"] = module.lora_A.weight
                keys[f"{peft_format.PREFIX}{name}.lora_B.weight"] = module.lora_B.weight
        return keys

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse another rank, alpha or rslora; dropout plays no part after training."""
        theirs = self.config.read(directory)
        if theirs.rslora != self.config.rslora:
            raise ModelError(
                f"adapter {directory} has rslora {theirs.rslora}, but it is attached with {self.config.rslora}"
            )
        for name, size in self.sizes.items():
            rank, alpha = theirs.size_of(name)
            if (rank, alpha) != (size.rank, size.alpha):
                raise ModelError(
                    f"adapter {directory} has rank {rank} and alpha {alpha:g} for {name}, but it is attached with"
                    f" rank {size.rank} and alpha {size.alpha:g}"
                )

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out PEFT's copies of the base, and turns the stacked experts of PEFT before 0.20 into their present
        layout; see `stacks_by_output`."""
        tensors = peft_format.without_base(
            tensors, {name: module.base for name, module in self.adapted.items()}, self.file_keys()
        )
        tensors = peft_format.without_twins(tensors, self.copies) if self.besides.bias == "all" else tensors
        if not peft_format.stacks_by_output(config):
            return tensors
        names = {id(parameter): key for key, parameter in self.file_keys().items()}
        for module in self.adapted.values():
            if isinstance(module, LoRAExperts):
                a, b = names[id(module.lora_A.weight)], names[id(module.lora_B.weight)]
                if a in tensors and b in tensors:
                    tensors[a], tensors[b] = transposed_factors(tensors[a], tensors[b], module.num_experts)
        return tensors

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it."""
        modules = [p.name for p in self.projections if p.kind != "experts"]
        parameters = [p.name for p in self.projections if p.kind == "experts"]
        others = [f"{name}.weight" for name in self.besides.parameters]
        stacks = [p.name for p in self.structure.projections if p.kind == "experts"]
        saved = Saved(
            rank=self.config.rank,
            alpha=self.config.alpha,
            rslora=self.config.rslora,
            # PEFT refuses dropout beside parameters even to read the file; it plays no part after training.
            dropout=0.0 if parameters or others else self.config.dropout,
            target_modules=peft_format.shorten(modules, self.names),
            target_parameters=[*peft_format.shorten(parameters, stacks, parts=2), *others],
            modules_to_save=[name for name in self.copies if name not in self.biased],
            besides=self.besides,
            rank_pattern={n: s.rank for n, s in self.sizes.items() if s.rank != self.config.rank},
            alpha_pattern={n: s.alpha for n, s in self.sizes.items() if s.alpha != self.config.alpha},
        )
        conv1d = any(p.transposed for p in self.projections if p.kind == "conv1d")
        return saved.to_peft(
            peft_format.base_of(self.model), fan_in_fan_out=conv1d, task_type=peft_format.task_type(self.structure)
        )


@ADAPTERS.register(LoRAConfig)
def build(config: LoRAConfig, model: nn.Module, kind: type[LoRAAdapter] = LoRAAdapter) -> LoRAAdapter:
    """Attach LoRA to a model; `config.path` decides the structure here, its tensors are loaded by `attach`.

    Args:
        kind: what to attach; a method that is LoRA but for a part of it brings its own.
    """
    structure = inspect(model)
    if config.path is None:
        plan = choose(model, structure, config)
        return kind(config, model, {p.name: Size(config.rank, config.alpha) for p in plan}, plan)
    config.check_saved(Path(config.path))
    saved = config.read(Path(config.path))
    plan, sizes = resolve_saved(saved, model, structure, Path(config.path))
    config = agreed(config, saved, model, structure, plan)
    besides = replace(saved.besides, parameters=tuple(parameters_of(saved, model)))
    sizes |= {f"{name}.weight": saved.size_of(f"{name}.weight") for name in besides.parameters}
    more = {"besides": besides} if besides else {}
    return kind(config, model, {name: Size(*size) for name, size in sizes.items()}, plan, **more)


def agreed(
    config: LoRAConfig, saved: Saved, model: nn.Module, structure: Structure, plan: list[Projection]
) -> LoRAConfig:
    """The configuration with the saved adapter's structure.

    Raises:
        ConfigError: for targets or modules that are neither the default nor what was saved, naming both.
    """
    default = LoRAConfig()
    where = f"the adapter {config.path}"
    if config.targets != default.targets and choose(model, structure, config) != plan:
        leaves = ", ".join(sorted({p.leaf for p in plan}))
        raise ConfigError(
            f"adapter.targets is {list(config.targets)}, but {where} adapts others ({leaves}): leave it out"
        )
    whole = saved_whole(model, structure, saved.modules_to_save)
    if config.train_also and resolve_modules(model, structure, config.train_also) != whole:
        raise ConfigError(
            f"adapter.train_also is {config.train_also}, but {where} has {whole}: leave adapter.train_also out"
        )
    targets = [p.name for p in plan] or default.targets
    return replace(config, rank=saved.rank, alpha=saved.alpha, rslora=saved.rslora, targets=targets, train_also=whole)
