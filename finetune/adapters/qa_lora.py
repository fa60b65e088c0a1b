"""QA-LoRA: LoRA whose product is one number a group, so that it merges into the zero points of a quantized base.

Xu et al. 2023 (arXiv:2309.14717), algorithm 1: y = W x + s B A P x, where P adds up the inputs of each quantization
group (the paper's average times the size of a group). B A P is constant within a group of a row, and a base with
q * scale + zero takes it up in its real zero points: the codes stay, and nothing is rounded but those (section 3.3).

A P is A with each column repeated over its group, and so it multiplies here: the product costs what LoRA's does.
PEFT's `use_qalora` is for GPTQ modules alone and multiplies the average by the *number* of groups, so the file is ours.

Shape suffixes: O out features, I in features, R rank, G groups of a row, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import LoRAAdapter, LoRAConfig, Size
from finetune.adapters.lora import build as build_lora
from finetune.adapters.lora_layers import Factor, LoRAExperts, LoRALinear
from finetune.adapters.own_format import read_as_lora
from finetune.adapters.peft_format import OWN_METHOD
from finetune.adapters.peft_lora import Saved
from finetune.adapters.targets import ALL_LINEAR
from finetune.errors import ConfigError
from finetune.kernels import affine
from finetune.quant.affine_ordered import OrderedAffineLinear
from finetune.quant.affine_storage import Affine, AffineConfig
from finetune.quant.base import QUANTIZERS, FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig
from finetune.quant.keep import KeepConfig
from finetune.structure import Projection


@dataclass
class QALoRAConfig(LoRAConfig):
    """LoRA's settings, on bases that are stored in groups. The token embedding has no form here."""

    embeds: ClassVar[bool] = False
    trains_besides: ClassVar[bool] = False

    name: str = "qa_lora"

    def read(self, directory: Path) -> Saved:
        """Refuse LoRA's files, PEFT's `use_qalora` among them: their A is another one."""
        return read_as_lora(directory, self.name)

    def check_base(self, quant: QuantConfig) -> None:
        """Refuse a storage without groups."""
        if not isinstance(quant, AffineConfig | KeepConfig):
            raise ConfigError(f"adapter=qa_lora needs a base stored in groups, not quant={quant.name}: {_expected()}")


def _expected() -> str:
    names = [name for name, kind in QUANTIZERS.types().items() if issubclass(kind, AffineConfig)]
    return f"set quant={' | '.join(names)}"


class Grouped:
    """The groups of a base's rows.

    Attributes:
        group_size: inputs of a group; -1 for a whole row.
        groups: of a row.
    """

    group_size: int
    groups: int

    def measure(self, base: FrozenWeight) -> None:
        """Take the groups of a base; without weights it may not be stored in groups yet."""
        self.group_size = base.group_size if isinstance(base, Affine) else -1
        self.groups = affine.groups(base.in_features, self.group_size)

    def spread(self, a_RG: Tensor, in_features: int) -> Tensor:
        """A P, [R, I]."""
        return affine.spread(a_RG, in_features, self.group_size)


class QALoRALinear(Grouped, LoRALinear):
    """A linear layer with a product beside it that is constant in each group of a row.

    Attributes:
        lora_A: weight A_RG.
    """

    over: ClassVar[bool] = False  # its groups are those of the stored weight

    def __init__(self, base: FrozenLinear, *, rank: int, **sizes: Any) -> None:
        super().__init__(base, rank=rank, **sizes)
        self.measure(base)
        self.lora_A = _started(rank, self.groups, base.in_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A P and B."""
        return self.spread(self.lora_A.weight, self.in_features), self.lora_B.weight

    def merge_into(self, frozen: Affine) -> Affine:
        """The codes of a weight that is stored as the base, with the product in its zero points."""
        return frozen.shifted(self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float()))


class QALoRAExperts(Grouped, LoRAExperts):
    """A stack of experts with such a product beside each.

    Attributes:
        lora_A: weight [E R, G], the experts one after another.
    """

    over: ClassVar[bool] = False

    def __init__(self, base: FrozenExperts, *, rank: int, **sizes: Any) -> None:
        super().__init__(base, rank=rank, **sizes)
        self.measure(base)
        self.lora_A = _started(rank * self.num_experts, self.groups, base.in_features)

    def factors(self, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        """A P and B of one expert."""
        a_RG, b_OR = self._matrices(expert)
        return self.spread(a_RG, self.in_features), b_OR

    def merge_into(self, frozen: Affine) -> Affine:
        """The codes of a stack that is stored as the base, with the products in its zero points."""
        pairs = [self._matrices(expert) for expert in range(self.num_experts)]
        return frozen.shifted(self.scaling * torch.stack([b.float() @ a.float() for a, b in pairs]))

    def _matrices(self, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        a_ERG = self.lora_A.weight.view(self.num_experts, self.rank, self.groups)
        b_ORE = self.lora_B.weight.view(self.out_features, self.rank, self.num_experts)
        return a_ERG[expert], b_ORE[:, :, expert]


def _grouped(model: nn.Module, name: str) -> bool:
    """Whether a projection is stored in groups, or has no weights yet, and may be."""
    parent, _, leaf = name.rpartition(".")
    base = getattr(model.get_submodule(parent), leaf)
    tensors = base.parameters() if isinstance(base, nn.Module) else [base]
    if isinstance(base, OrderedAffineLinear):
        return False  # its groups are no runs of inputs
    return isinstance(base, Affine) or all(tensor.is_meta for tensor in tensors)


def _started(rows: int, groups: int, in_features: int) -> Factor:
    """A as large as LoRA's on the unpooled input, so that A P x is as large as A x; the authors draw it over G."""
    factor = Factor(rows, groups)
    bound = 1 / math.sqrt(in_features)
    nn.init.uniform_(factor.weight, -bound, bound)
    return factor


class QALoRAAdapter(LoRAAdapter):
    """QA-LoRA attached to a model; see `QALoRAConfig`."""

    config: QALoRAConfig
    adapted: dict[str, Any]

    def __init__(
        self, config: QALoRAConfig, model: nn.Module, sizes: Mapping[str, Size], plan: list[Projection]
    ) -> None:
        """What the base leaves in floating point is left out, unless it was named.

        Raises:
            ConfigError: where nothing is stored in groups, or something named is not.
        """
        strange = [p for p in plan if not _grouped(model, p.name)]
        if strange and (config.targets != ALL_LINEAR or len(strange) == len(plan)):
            raise ConfigError(
                f"adapter=qa_lora needs a base stored in groups, and {strange[0].name} is not: {_expected()}"
            )
        self.left_out = [p.name for p in strange]
        super().__init__(config, model, sizes, [p for p in plan if p not in strange])

    def wrap(self, base: FrozenLinear, projection: Projection) -> QALoRALinear:
        """A product that is constant in groups beside a linear layer."""
        return QALoRALinear(base, **self._sizes(projection))

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> QALoRAExperts:
        """Such a product beside each expert."""
        return QALoRAExperts(base, transposed=projection.transposed, **self._sizes(projection))

    @property
    def note(self) -> str:
        """What is left out, and where the rank is more than the pooled inputs can use."""
        parts = []
        if self.left_out:
            more = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
            parts.append(f"adapter=qa_lora leaves out {self.left_out[0]}{more}, which the base keeps in floating point")
        narrow = [name for name, module in self.adapted.items() if self.sizes[name].rank > module.groups]
        if narrow:
            name = min(narrow, key=lambda name: self.adapted[name].groups)
            groups = self.adapted[name].groups
            parts.append(
                f"adapter=qa_lora: rank {self.sizes[name].rank} is above the {groups} pooled inputs of {name}: there"
                f" the product has rank {groups} at most"
            )
        return "; ".join(parts)

    @torch.no_grad()
    def merged_frozen(self) -> Iterator[tuple[str, Affine]]:
        """Every adapted projection by its name, in the codes of the base with the product in its zero points.

        Put in the place of the base's modules (`detached`, `set_submodule`), they make a model of the same size, with
        nothing beside the base, that `save_pretrained` writes for `quant=keep`.
        """
        for p in self.projections:
            module = self.adapted[p.name]
            yield p.name, module.merge_into(module.base)

    def file_config(self) -> dict[str, Any]:
        """LoRA's settings, not under PEFT's name."""
        config = super().file_config()
        del config["peft_type"]
        return config | {OWN_METHOD: self.config.name}


@ADAPTERS.register(QALoRAConfig)
def build(config: QALoRAConfig, model: nn.Module) -> QALoRAAdapter:
    """Attach QA-LoRA to a model, as LoRA is."""
    adapter = build_lora(config, model, QALoRAAdapter)
    assert isinstance(adapter, QALoRAAdapter)
    return adapter
