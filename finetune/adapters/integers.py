"""What methods have in common that compute with integers on a grid: on which projections, and what they merge into."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from finetune.adapters.targets import ALL_LINEAR
from finetune.adapters.weight import WeightAdapter
from finetune.errors import ConfigError
from finetune.quant.affine_ordered import OrderedAffineLinear
from finetune.quant.affine_storage import Affine, AffineConfig
from finetune.quant.base import QUANTIZERS, FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig, DenseExperts, DenseLinear
from finetune.quant.keep import KeepConfig
from finetune.structure import Projection


def check_base(method: str, quant: QuantConfig, *, dense: bool) -> None:
    """Refuse a storage without a grid of integers, by its name.

    Args:
        dense: whether the method also takes a dense base.

    Raises:
        ConfigError: naming those that it takes.
    """
    if not isinstance(quant, (AffineConfig, KeepConfig, *([DenseConfig] if dense else []))):
        raise ConfigError(f"adapter={method} trains integers, not quant={quant.name}: {_expected(dense)}")


def _expected(dense: bool) -> str:
    names = [name for name, kind in QUANTIZERS.types().items() if issubclass(kind, AffineConfig)]
    return f"set quant={' | '.join([*(['none'] if dense else []), *names])}"


def stored_at(model: nn.Module, name: str) -> Any:
    """What holds the weight of a projection: a frozen module, a plain one, or a parameter."""
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def split_plan(
    config: Any, model: nn.Module, plan: list[Projection], *, dense: bool
) -> tuple[list[Projection], list[str]]:
    """The projections that can be trained in integers, and the names of those that are left out.

    On a base that stores some of them in integers, what it keeps in floating point stays so. A model without weights is
    taken for one that can.

    Raises:
        ConfigError: where nothing can, or something that cannot was named.
    """
    kinds = {p.name: _kind(stored_at(model, p.name), p) for p in plan}
    wanted = "integers" if "integers" in kinds.values() or not dense else "dense"
    able = [p for p in plan if kinds[p.name] in (wanted, "empty")]
    strange = [p for p in plan if p not in able]
    if strange and (config.targets != ALL_LINEAR or not able):
        name = strange[0].name
        raise ConfigError(
            f"adapter={config.name} trains integers, and {name} is {kinds[name]} here: {_expected(dense)}"
        )
    return able, [p.name for p in strange]


def _kind(base: Any, projection: Projection) -> str:
    """How a weight is stored, as far as it matters here."""
    tensors = base.parameters() if isinstance(base, nn.Module) else [base]
    if isinstance(base, OrderedAffineLinear):
        return "stored in act-order, its groups no runs of inputs,"
    if isinstance(base, Affine):
        return "integers"
    if isinstance(base, FrozenWeight) and not isinstance(base, DenseLinear | DenseExperts):
        return f"stored as {getattr(base, 'storage', type(base).__name__)}"
    if projection.dense:
        return "wanted in floating point by the model's own code"
    return "empty" if all(tensor.is_meta for tensor in tensors) else "dense"


class IntegerAdapter(WeightAdapter):
    """A weight adapter whose merged weights are integers on a grid, and known as such.

    Attributes:
        left_out: names of projections that `all-linear` selects and that cannot be trained so here.
    """

    left_out: Sequence[str] = ()
    adapted: dict[str, Any]

    @property
    def note(self) -> str:
        """What is left out."""
        if not self.left_out:
            return ""
        more = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
        return (
            f"adapter={self.config.name} leaves out {self.left_out[0]}{more}, which the base keeps in another storage"
        )

    @abstractmethod
    def merged_settings(self) -> dict[str, AffineConfig]:
        """How merged weights are stored, by the name of the projection."""

    @torch.no_grad()
    def in_codes(self, name: str) -> Affine:
        """The merged weight of one projection as a frozen module, which decodes to what `merged` says bit for bit."""
        module: Affine = self.adapted[name].merge_into_codes()
        return module

    def merged_frozen(self) -> Iterator[tuple[str, Affine]]:
        """Every adapted projection by its name, one at a time, as `in_codes` gives it.

        Put in the place of the base's modules (`detached`, `set_submodule`), they make a model in integers, with
        nothing beside them, that `save_pretrained` writes for `quant=keep`.
        """
        for p in self.projections:
            yield p.name, self.in_codes(p.name)
