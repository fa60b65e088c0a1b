"""What LoRA puts in the place of a frozen linear layer and of a frozen stack of experts; see lora.py.

Shape suffixes: B leading dimensions, O out features, I in features, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedExperts, AdaptedLinear
from finetune.kernels.lora import lora_linear
from finetune.kernels.masked_lora import masked_lora_linear
from finetune.kernels.products import autocast
from finetune.quant.base import FrozenExperts, FrozenLinear
from finetune.quant.dense import DenseLinear


class Factor(nn.Module):
    """One of the two low-rank matrices; not an `nn.Linear`, so that nothing takes it for a projection of the model."""

    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.register_parameter("bias", None)


class LoRALinear(AdaptedLinear):
    """A frozen linear layer with a low-rank product beside it.

    Attributes:
        lora_A: weight A_RI.
        lora_B: weight B_OR.
        scaling: factor on the product.
        dropout: share of the input of A that is zeroed while training.
        trained_bias: what takes the place of the base's bias; None where that stays. B may have one as well. Both are
            PEFT's, and come with a saved adapter that has them.
    """

    over: ClassVar[bool] = True
    trained_bias: nn.Parameter | None

    def __init__(self, base: FrozenLinear, *, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.register_parameter("trained_bias", None)
        self.lora_A, self.lora_B = Factor(rank, base.in_features), Factor(base.out_features, rank)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        self.dropout = dropout

    @property
    def stored(self) -> FrozenLinear:
        """The frozen weight that the product is added to."""
        return self.base

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_RI and B_OR as they multiply; a method that trains them in another form overrides this alone."""
        return self.lora_A.weight, self.lora_B.weight

    def train_biases(self, own: bool, product: bool) -> None:
        """Train the base's bias, where it has one, and a bias of B."""
        if own and self.bias is not None:
            self.trained_bias = nn.Parameter(self.bias.detach().to(torch.float32, copy=True))
        if product:
            self.lora_B.bias = nn.Parameter(torch.zeros(self.out_features))

    def learnt_bias(self) -> Tensor | None:
        """What all outputs are moved by: by what the bias has learnt, and by s times B's; None where neither trains."""
        learnt_O = None if self.lora_B.bias is None else self.scaling * self.lora_B.bias
        if self.trained_bias is None:
            return learnt_O
        moved_O = self.trained_bias - self.bias.to(self.trained_bias.dtype)  # type: ignore[union-attr]
        return moved_O if learnt_O is None else moved_O + learnt_O

    def forward(self, x_BI: Tensor) -> Tensor:
        """y_BO: the base's own while disabled."""
        y_BO = super().forward(x_BI)
        learnt_O = self.learnt_bias() if self.enabled else None
        return y_BO if learnt_O is None else y_BO + learnt_O.to(y_BO.dtype)

    def adapted(self, x_BI: Tensor) -> Tensor:
        """base(x) + s B A dropout(x), in the dtype of x."""
        dropout = self.dropout if self.training else 0.0
        if self.pruned_base() is not None:
            return self._masked(x_BI, dropout)
        factors = self.factors()
        if not isinstance(self.base, FrozenLinear):  # another adapter: the fused product knows stored weights alone
            a_RI, b_OR = (factor.to(x_BI.dtype) for factor in factors)
            low_BR = F.linear(F.dropout(x_BI, dropout), a_RI) * self.scaling
            y_BO: Tensor = self.base(x_BI)
            return y_BO + F.linear(low_BR, b_OR)
        return lora_linear(x_BI, self.base.bias, self.stored.operand(), *factors, self.scaling, dropout=dropout)

    def _masked(self, x_BI: Tensor, dropout: float) -> Tensor:
        """The same with mask * (W + s B A), which is what a pruned weight merges into."""
        x_BI, bias_O = autocast(x_BI, self.bias)
        product = (*self.factors(), self.scaling, self.pruned_base().cleared)
        stored, own = self.stored, self.stored is self.base
        if isinstance(stored, DenseLinear) and own and not dropout:
            return masked_lora_linear(x_BI, *product, lambda: stored.dequantize(x_BI.dtype), bias_O)
        if own:
            y_BO: Tensor = self.base(x_BI)
        else:
            y_BO = F.linear(x_BI, stored.dequantize(x_BI.dtype).masked_fill(product[3](), 0), bias_O)
        return y_BO + masked_lora_linear(F.dropout(x_BI, dropout), *product)

    def merge(self, weight: Tensor) -> Tensor:
        """w_OI + s B A, in float32."""
        a_RI, b_OR = self.factors()
        return weight + self.scaling * (b_OR.float() @ a_RI.float())

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weight, and the bias where one trains."""
        changed, learnt_O = dict(super().merged()), self.learnt_bias()
        if learnt_O is not None:
            bias_O = changed.get("bias", self.bias)
            changed["bias"] = learnt_O.detach().float() + (0 if bias_O is None else bias_O.float())
        yield from changed.items()


class LoRAExperts(AdaptedExperts):
    """A frozen stack of experts with a low-rank product beside each.

    Attributes:
        lora_A: weight [E R, I], the experts one after another, as PEFT's `ParamWrapper` lays it out.
        lora_B: weight [O, R E], the experts interleaved: column r E + e belongs to expert e.
        transposed: whether memory holds [E, I, O].
    """

    over: ClassVar[bool] = True

    def __init__(self, base: FrozenExperts, *, transposed: bool, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.rank, self.transposed, self.scaling = rank, transposed, scaling
        self.lora_A = Factor(rank * self.num_experts, self.in_features)
        self.lora_B = Factor(self.out_features, rank * self.num_experts)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    @property
    def stored(self) -> FrozenExperts:
        """The frozen stack that the products are added to."""
        return self.base

    def factors(self, expert: int | Tensor) -> tuple[Tensor, Tensor]:
        """A_RI and B_OR of one expert."""
        a_ERI = self.lora_A.weight.view(self.num_experts, self.rank, self.in_features)
        b_ORE = self.lora_B.weight.view(self.out_features, self.rank, self.num_experts)
        return a_ERI[expert], b_ORE[:, :, expert]

    def adapted(self, expert: int | Tensor) -> LowRankWeight:
        """The weight of one expert, never added up: in 16 bits the sum would round most of the product away."""
        return LowRankWeight(self, expert)

    def merge(self, weight: Tensor) -> Tensor:
        """The stack plus s B A of each expert, in float32 and the layout of memory."""
        merged = weight.clone()  # a dense base hands out its own storage
        for expert in range(self.num_experts):
            a_RI, b_OR = self.factors(expert)
            delta_OI = self.scaling * (b_OR.float() @ a_RI.float())
            merged[expert] += delta_OI.T if self.transposed else delta_OI
        return merged


def transposed_factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The factors, in PEFT's layout of a stack, of the transposed product of each expert: (B A)^T = A^T B^T.

    Args:
        a: [E R, X], the experts one after another.
        b: [Y, R E], the experts interleaved.

    Returns:
        [E R, Y] and [X, R E].
    """
    a_ERX, b_YRE = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    return b_YRE.permute(2, 1, 0).flatten(0, 1).contiguous(), a_ERX.permute(2, 1, 0).flatten(1).contiguous()


class LowRankWeight:
    """W + s B A of one expert as an operand of `F.linear` and `@`: how transformers' expert loops use `experts[e]`.

    It is no tensor; torch hands it those calls (`__torch_function__`, docs "Extending torch with a Tensor-like type").
    Whatever else is done with it is done with the dense sum.
    """

    def __init__(self, experts: LoRAExperts, expert: int | Tensor) -> None:
        self.experts, self.expert = experts, expert

    def apply(self, x_BI: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`product(x, W)` + s B A dropout(x), in the dtype of x."""
        if self.experts.pruned_base() is not None:
            delta = self._delta().to(x_BI.dtype)
            dropped_BI = self.experts.dropout(x_BI)
            added_BO = dropped_BI @ delta if self.experts.transposed else F.linear(dropped_BI, delta)
            return product(x_BI, self._stored()) + added_BO
        a_RI, b_OR = self.experts.factors(self.expert)
        a_BR = F.linear(self.experts.dropout(x_BI), a_RI.to(x_BI.dtype)) * self.experts.scaling
        return product(x_BI, self.experts.stored[self.expert]) + F.linear(a_BR, b_OR.to(x_BI.dtype))  # type: ignore[index]

    def dense(self) -> Tensor:
        """The sum, in the layout and dtype of the base's weight."""
        base = self._stored()
        return base + self._delta().to(base.dtype)

    def _stored(self) -> Tensor:
        """W in the layout of the base, with the zeros of a pruned one."""
        weight: Tensor = self.experts.stored[self.expert]  # type: ignore[index]
        return weight if self.experts.stored is self.experts.base else self._masked(weight)

    def _delta(self) -> Tensor:
        """s B A, the same."""
        a_RI, b_OR = self.experts.factors(self.expert)
        delta_OI = self.experts.scaling * (b_OR @ a_RI)
        return self._masked(delta_OI.T if self.experts.transposed else delta_OI)

    def _masked(self, weight: Tensor) -> Tensor:
        pruned = self.experts.pruned_base()
        return weight if pruned is None else torch.where(torch.ne(pruned[self.expert], 0), weight, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Split the two products that experts are read by; do anything else with the dense sum."""
        kwargs = kwargs or {}
        second = args[1] if len(args) > 1 else None
        if isinstance(second, cls) and isinstance(args[0], Tensor):
            transposed = second.experts.transposed
            if func is F.linear and not transposed:
                return second.apply(args[0], lambda x, w: F.linear(x, w, *args[2:], **kwargs))
            if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and transposed:
                return second.apply(args[0], torch.matmul)
        return func(
            *(a.dense() if isinstance(a, cls) else a for a in args),
            **{k: a.dense() if isinstance(a, cls) else a for k, a in kwargs.items()},
        )
