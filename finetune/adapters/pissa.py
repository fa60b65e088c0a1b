"""PiSSA: LoRA whose factors start as the principal part of the weight, in place of it.

Meng et al. 2024 (arXiv:2404.02948), section 3: A and B hold the largest singular vectors of W, and the base what is
left of it. On a quantized base (QPiSSA, section 4) what is left is stored anew, in `iterations` rounds of decomposing
W - Q and quantizing W - s B A, so that Q + s B A is nearer to W than quantize(W) is: a residual base (residual.py).

Without one (a dense base, `iterations: 0`, original weights that cannot be read) the base stays as it is, and the
initial product is taken off in the forward pass: y = W x + s (B A - B_0 A_0) x. It is computed as
s [B, B - B_0] [A - A_0; A_0] x, which is nothing, bit for bit, as long as A and B are what they were, and loses nothing
in 16 bits. Dropout acts on that difference. It is saved as the plain LoRA [B, -B_0] [A; A_0] of twice the rank on the
same base; the header of the file says what it is made of.

Shape suffixes: O out features, I in features, R rank, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import build as build_lora
from finetune.adapters.peft_lora import Saved, parse_saved
from finetune.adapters.residual import ResidualAdapter, ResidualConfig
from finetune.adapters.residual_layers import Rebased, ResidualExperts, ResidualLinear, Weight
from finetune.errors import ModelError
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight
from finetune.structure import Projection

HALVES = "finetune_pissa"
"""Key in the header of the tensors' file: the settings of the trained half, as adapter_config.json would have them."""


@dataclass
class PiSSAConfig(ResidualConfig):
    """Settings as in `ResidualConfig`; without iterations the base stays. The paper has alpha = rank."""

    fewest: ClassVar[int] = 0

    name: str = "pissa"
    alpha: float = 16.0
    learning_rate: float = 0.002

    def read(self, directory: Path) -> Saved:
        """What a saved adapter says of the factors that train; a LoRA that does not say it is read as two halves."""
        config = peft_format.read_config(directory)
        if peft_format.method_of(config) != "LORA":
            return super().read(directory)
        path, halves = directory / peft_format.WEIGHTS, peft_format.check_header(directory).get(HALVES)
        if halves is None:
            return halved(super().read(directory), directory)
        try:
            settings = json.loads(halves)
        except ValueError as error:
            raise ModelError(f"{path} has a header whose {HALVES} is not JSON: {error}") from error
        return parse_saved(settings, path)


class Reduced(Rebased):
    """A weight whose initial product is taken off again.

    Attributes:
        initial_A, initial_B: laid out and typed as the trained factors; None where there is a residual base.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None

    def keep(self, a: Tensor | None, b: Tensor | None) -> None:
        """Take the initial factors."""
        self.register_buffer("initial_A", a, persistent=False)
        self.register_buffer("initial_B", b, persistent=False)


class PiSSALinear(Reduced, ResidualLinear):
    """A linear layer with its principal part beside it."""

    def __init__(self, base: FrozenLinear, **sizes: Any) -> None:
        super().__init__(base, **sizes)
        self.keep(None, None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, or factors of what their product has moved by, [2 R, I] and [O, 2 R]."""
        trained = super().factors()
        if self.initial_A is None or self.initial_B is None:
            return trained
        return moved(trained, (self.initial_A, self.initial_B))


class PiSSAExperts(Reduced, ResidualExperts):
    """A stack of experts with the principal part of each beside it."""

    def __init__(self, base: FrozenExperts, **sizes: Any) -> None:
        super().__init__(base, **sizes)
        self.keep(None, None)

    def factors(self, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        """Those of one expert."""
        trained = super().factors(expert)
        if self.initial_A is None or self.initial_B is None:
            return trained
        a_ERI, b_EOR = self.matrices(self.initial_A, self.initial_B)
        return moved(trained, (a_ERI[expert], b_EOR[expert]))


def moved(trained: tuple[Tensor, Tensor], initial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of B A - B_0 A_0 in float32: [A - A_0; A_0] and [B, B - B_0]."""
    (a_RI, b_OR), (a0_RI, b0_OR) = ((a.float(), b.float()) for a, b in (trained, initial))
    return torch.cat([a_RI - a0_RI, a0_RI]), torch.cat([b_OR, b_OR - b0_OR], dim=1)


class PiSSAAdapter(ResidualAdapter):
    """PiSSA attached to a model; see `PiSSAConfig`."""

    config: PiSSAConfig
    instead: ClassVar[str] = "it starts there from the stored weights, and the base stays as it is"

    def wrap(self, base: FrozenLinear, projection: Projection) -> PiSSALinear:
        """The principal part beside a linear layer."""
        return PiSSALinear(base, **self._sizes(projection))

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> PiSSAExperts:
        """The principal part beside each expert."""
        return PiSSAExperts(base, transposed=projection.transposed, **self._sizes(projection))

    def reads(self, base: FrozenWeight) -> bool:
        """Nor where the base is to stay."""
        return self.config.iterations > 0 and super().reads(base)

    def begin(self, weight: Weight) -> None:
        """The principal part; a residual base where one can be nearer to the original than the base is."""
        a_RI, b_OR = weight.factors(weight.w_OI)
        if weight.original:
            residual = weight.quantized(weight.rest(a_RI, b_OR))
            for _ in range(self.config.iterations - 1):
                a_RI, b_OR = weight.factors(weight.w_OI - weight.decoded(residual))
                residual = weight.quantized(weight.rest(a_RI, b_OR))
            weight.module.take(residual)
        weight.put(a_RI, b_OR)
        if not weight.original:
            assert isinstance(weight.module, Reduced)
            weight.module.keep(*(f.weight.detach().clone() for f in (weight.module.lora_A, weight.module.lora_B)))

    @property
    def keeps_start(self) -> bool:
        """Initial factors or a residual base: always one of them."""
        return True

    def file_config(self) -> dict[str, Any]:
        """LoRA's, of twice the rank where the initial factors are written behind the trained ones."""
        config = super().file_config()
        return config if self.residuals or not self._reduced() else doubled(config)

    def file_metadata(self) -> dict[str, str]:
        """The settings of the trained half."""
        return {} if self.residuals else {HALVES: json.dumps(super().file_config())}

    def file_tensors(self) -> dict[str, Tensor]:
        """Trained factors, with the initial ones behind them."""
        tensors = super().file_tensors()
        for a, b, module in self._reduced():
            trained = module.matrices(tensors[a], tensors[b])
            initial = module.matrices(module.initial_A, -module.initial_B)
            a_RI, b_OR = (torch.cat([t, i], dim=-2 + n) for n, (t, i) in enumerate(zip(trained, initial, strict=True)))
            tensors[a], tensors[b] = module.laid_out(a_RI, b_OR)
        return tensors

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the initial factors from behind the trained ones."""
        tensors = dict(tensors)
        for a, b, module in self._keys():
            if a not in tensors or b not in tensors or tensors[a].shape[0] != 2 * module.lora_A.weight.shape[0]:
                continue
            a_RI, b_OR = module.matrices(tensors[a], tensors[b])
            rank = a_RI.shape[-2] // 2
            tensors[a], tensors[b] = module.laid_out(a_RI[..., :rank, :], b_OR[..., :rank])
            like = module.lora_A.weight
            initial = module.laid_out(a_RI[..., rank:, :], -b_OR[..., rank:])
            module.keep(*(factor.to(like).contiguous() for factor in initial))
        return tensors

    def load(self, directory: Path) -> None:
        """Fill the factors, and take over the initial ones or the residual base, from a saved adapter.

        Raises:
            ModelError: for another method or other settings, and for tensors that are missing or do not fit.
        """
        super().load(directory)
        if not self.residuals and HALVES not in peft_format.check_header(Path(directory)):
            self._remark = (
                f"adapter {directory} is a LoRA that does not say what it started from: its first half trains on, the"
                f" second stays"
            )

    def _keys(self) -> Iterator[tuple[str, str, Any]]:
        """The keys of A and B of each adapted weight, and what stands for it."""
        keys = {id(parameter): key for key, parameter in self.file_keys().items()}
        for module in self.adapted.values():
            yield keys[id(module.lora_A.weight)], keys[id(module.lora_B.weight)], module

    def _reduced(self) -> list[tuple[str, str, Any]]:
        """Those with initial factors."""
        return [entry for entry in self._keys() if entry[2].initial_A is not None]


def halved(saved: Saved, directory: Path) -> Saved:
    """Half the rank at the same scaling.

    Raises:
        ModelError: for a rank that is odd.
    """
    odd = [rank for rank in (saved.rank, *saved.rank_pattern.values()) if rank % 2]
    if odd:
        raise ModelError(
            f"adapter {directory} is a plain LoRA of rank {odd[0]}, without initial factors: set adapter=lora"
        )
    factor = math.sqrt(2) if saved.rslora else 2
    return replace(
        saved,
        rank=saved.rank // 2,
        alpha=saved.alpha / factor,
        rank_pattern={name: rank // 2 for name, rank in saved.rank_pattern.items()},
        alpha_pattern={name: alpha / factor for name, alpha in saved.alpha_pattern.items()},
    )


def doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a LoRA of twice the rank and the same scaling."""
    factor = math.sqrt(2) if config["use_rslora"] else 2
    return {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in config["alpha_pattern"].items()},
    }


@ADAPTERS.register(PiSSAConfig)
def build(config: PiSSAConfig, model: nn.Module) -> PiSSAAdapter:
    """Attach PiSSA to a model, as LoRA is; `attach` then has it find its start."""
    adapter = build_lora(config, model, PiSSAAdapter)
    assert isinstance(adapter, PiSSAAdapter)
    return adapter
