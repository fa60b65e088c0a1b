"""Combine LoRAs: sum_i w_i s_i B_i A_i at every projection, as one LoRA.

Two ways. `concat` joins the factors, [A_1; A_2; ...] and [w_1 s_1 B_1, w_2 s_2 B_2, ...]: exact, with the ranks' sum as
its rank. `sum` factorises the sum anew at a smaller rank, by its singular values: the nearest of that rank (Eckart and
Young 1936), with what is lost stated. Adding A to A and B to B, as PEFT's `linear` does, is neither: it brings in
products of one adapter's B with the other's A.

Shape suffixes: O out features, I in features, R rank, E experts (1 for a plain projection).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.adapters.base import Adapter
from finetune.adapters.lora import LoRAAdapter, LoRAConfig, Size
from finetune.adapters.lora_embedding import LoRAEmbedding
from finetune.adapters.lora_layers import LoRAExperts, LoRALinear
from finetune.errors import ConfigError, nearest
from finetune.structure import Projection, inspect

MODES = ("concat", "sum")
PLAIN = (LoRALinear, LoRAExperts, LoRAEmbedding)
"""What computes nothing but W + s B A. What is made from these may not."""


@dataclass(frozen=True)
class Product:
    """B A, for each expert: `b_EOR @ a_ERI`."""

    a_ERI: Tensor
    b_EOR: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, rank: int, factor: float) -> Product:
        """From PEFT's layout, multiplied by a factor.

        Args:
            a: [E R, I], the experts one after another.
            b: [O, R E], the experts interleaved.
        """
        a_ERI = a.detach().double().reshape(-1, rank, a.shape[1])
        b_ORE = b.detach().double().reshape(b.shape[0], rank, -1)
        return cls(a_ERI, factor * b_ORE.permute(2, 0, 1))

    @property
    def rank(self) -> int:
        """R."""
        return self.a_ERI.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """PEFT's layout, float32."""
        b = self.b_EOR.permute(1, 2, 0).reshape(self.b_EOR.shape[1], -1)
        return self.a_ERI.flatten(0, 1).float().contiguous(), b.float().contiguous()


@dataclass
class Loss:
    """What a re-factorisation leaves out: sums of squares over all weights, float64."""

    lost: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        """Frobenius norm of what is lost over that of the sum."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


def joined(products: Sequence[Product]) -> Product:
    """Their sum, exact, with the ranks' sum as its rank."""
    return Product(torch.cat([p.a_ERI for p in products], 1), torch.cat([p.b_EOR for p in products], 2))


def refactored(product: Product, rank: int, loss: Loss) -> Product:
    """The nearest product of a rank, of each expert, in the Frobenius norm.

    Never forms B A: with B = Q_b R_b and A^T = Q_a R_a, the singular values of R_b R_a^T are those of B A.
    """
    q_b, r_b = torch.linalg.qr(product.b_EOR)
    q_a, r_a = torch.linalg.qr(product.a_ERI.mT)
    u, s_ER, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    loss.lost += float(s_ER[:, rank:].square().sum())
    loss.whole += float(s_ER.square().sum())
    root_E1R = s_ER[:, None, :rank].sqrt()
    return Product((q_a @ v.mT[..., :rank] * root_E1R).mT, q_b @ u[..., :rank] * root_E1R)


def combine(products: Sequence[Product], mode: str, rank: int, loss: Loss) -> Product:
    """The sum of products of one projection; never of a higher rank than its matrix can have.

    Args:
        rank: of the result, where `mode` is `sum`.
    """
    whole = joined(products)
    most = min(whole.a_ERI.shape[2], whole.b_EOR.shape[1])
    if mode == "sum":
        most = min(most, rank)
    if whole.rank > most:
        return refactored(whole, most, loss)
    loss.whole += float(((whole.b_EOR.mT @ whole.b_EOR) * (whole.a_ERI @ whole.a_ERI.mT)).sum())
    return whole


def check_combination(weights: Mapping[str, float], mode: str, rank: int | None) -> None:
    """Refuse what no combination can be, whatever the adapters.

    Raises:
        ConfigError: naming the value.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}: expected {' | '.join(MODES)}{nearest(str(mode), MODES)}")
    if not weights:
        raise ConfigError("there is nothing to combine: expected at least one adapter")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"the weight of {name} is {weight!r}: expected a number")
    if rank is not None and mode != "sum":
        raise ConfigError(f"rank is {rank}, but mode={mode} has the ranks' sum: set mode=sum, or leave rank out")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is {rank!r}: expected at least 1")


def combined(
    model: nn.Module, loras: Mapping[str, Adapter], weights: Mapping[str, float], mode: str, rank: int | None
) -> tuple[LoRAAdapter, float]:
    """A new LoRA, attached to a bare model, that computes the weighted sum of others.

    Args:
        loras: by name, attached to this model and unmounted.
        rank: for `sum`; None takes the largest of theirs.

    Returns:
        The adapter, and the relative error of `Loss`.

    Raises:
        ConfigError: for adapters that are no plain LoRAs, naming the one.
    """
    check_combination(weights, mode, rank)
    products: dict[str, list[Product]] = {}
    projections: dict[str, Projection] = {}
    for name, lora in loras.items():
        if isinstance(lora, LoRAAdapter) and lora.besides:
            raise ConfigError(f"{name} also has {lora.besides}, which is no product to combine")
        if not isinstance(lora, LoRAAdapter) or any(type(module) not in PLAIN for module in lora.adapted.values()):
            raise ConfigError(f"{name} is adapter={lora.config.name}, which is no plain low-rank product: use stacks")
        if lora.copies:
            raise ConfigError(f"{name} also trains {next(iter(lora.copies))} whole, which is no product to combine")
        for p in lora.projections:
            size, (a, b) = lora.sizes[p.name], _factors(lora.adapted[p.name])
            factor = weights[name] * size.scaling(lora.config.rslora)
            products.setdefault(p.name, []).append(Product.of(a, b, size.rank, factor))
            projections[p.name] = p
    loss = Loss()
    largest = rank or max(size.rank for lora in loras.values() for size in lora.sizes.values())  # type: ignore[attr-defined]
    results = {name: combine(found, mode, largest, loss) for name, found in products.items()}
    plan = _in_order(model, projections)
    common = Counter(product.rank for product in results.values()).most_common(1)[0][0]
    config = LoRAConfig(rank=common, alpha=float(common), targets=[p.name for p in plan])
    sizes = {name: Size(product.rank, float(product.rank)) for name, product in results.items()}
    adapter = LoRAAdapter(config, model, sizes, plan)
    with torch.no_grad():
        for name, product in results.items():
            for parameter, values in zip(_factors(adapter.adapted[name]), product.factors(), strict=True):
                parameter.copy_(values)
    return adapter, loss.relative


def _factors(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B of an adapted projection, in PEFT's layout."""
    if isinstance(module, LoRAEmbedding):
        return module.lora_embedding_A, module.lora_embedding_B
    return module.lora_A.weight, module.lora_B.weight  # type: ignore[union-attr,return-value]


def _in_order(model: nn.Module, projections: Mapping[str, Projection]) -> list[Projection]:
    """Projections as the model has them, the embedding first and the head last."""
    order = {p.name: number for number, p in enumerate(inspect(model).projections)}
    return sorted(projections.values(), key=lambda p: order.get(p.name, -1 if p.kind == "embedding" else len(order)))
