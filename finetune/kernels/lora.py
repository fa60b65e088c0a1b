"""LoRA on a frozen weight of any storage format, as one operator with a backward by hand.

`y = x W^T + b + s (k o x) A^T B^T`, where k is what dropout keeps of x over the share that it keeps. The low-rank
product is added in place to what the base gives, and so is its gradient; nothing is kept for the backward but x, the
small product `low_BR = s (k o x) A^T` and the bits of k. LoRA: Hu et al. 2021 (arXiv:2106.09685) section 4.1.

`finetune::lora_linear` takes the base as an `Operand`, so every format that has one has this operator too. The factors
may be float32 beside a 16-bit input: they are cast to the dtype of the input, and their gradients come in their own.

Shape suffixes: B leading dimensions, N rows (B flattened), O out features, I in features, R rank, K bytes of kept bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels import operand
from finetune.kernels.autocast import no_autocast
from finetune.kernels.dropout import draw_kept, zero_dropped
from finetune.kernels.operand import Operand
from finetune.kernels.products import autocast

_FACTORS = "Tensor a, Tensor b, float scaling, Tensor? kept"

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define(
    f"lora_linear(Tensor x, Tensor? bias, Tensor[] base, str spec, SymInt out_features, {_FACTORS}) -> (Tensor, Tensor)"
)
_library.define(
    "lora_gradients(Tensor grad, Tensor x, Tensor low, Tensor[] base, str spec, SymInt in_features, "
    f"{_FACTORS}, bool[] needed) -> (Tensor, Tensor, Tensor)"
)


def lora_linear(
    x_BI: Tensor,
    bias_O: Tensor | None,
    base: Operand,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`y_BO = x W^T + bias + scaling * dropout(x) A^T B^T` in the dtype of `x_BI`.

    With B = 0 it is the base's own product, bit for bit. The gradient flows to x, A, B and the bias, once: there is no
    second derivative. Under autocast `x_BI` is cast first, as for `torch.nn.functional.linear`.

    Args:
        base: the frozen weight W.
        a_RI, b_OR: the factors, in any float dtype.
        scaling: s, alpha / rank in LoRA.
        dropout: share of the input of A that is zeroed; drawn from torch's default generator. 0 while evaluating.
    """
    inputs = arguments(x_BI, bias_O, base, a_RI, b_OR, scaling, dropout)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Recorded.apply(*inputs)
    y_BO, _ = torch.ops.finetune.lora_linear(*inputs)
    return y_BO


def arguments(
    x_BI: Tensor, bias_O: Tensor | None, base: Operand, a_RI: Tensor, b_OR: Tensor, scaling: float, dropout: float
) -> tuple[Any, ...]:
    """Those of the operator: what autocast wants is cast, and what is dropped is drawn."""
    x_BI, bias_O = autocast(x_BI, bias_O)
    kept_K = draw_kept(x_BI, dropout) if dropout else None
    # What is kept is divided by its share; on the small product that costs less than on x.
    factor = scaling / (1 - dropout)
    return x_BI, bias_O, base.tensors, base.spec, base.out_features, a_RI, b_OR, factor, kept_K


def linear(
    x: Tensor,
    bias: Tensor | None,
    base: list[Tensor],
    spec: str,
    out_features: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y_BO and `low_BR = scaling * (kept o x) A^T`, in plain torch around the base's own product."""
    with no_autocast(x):
        y = operand.linear(x, bias, base, spec, out_features).contiguous()
        low = torch.nn.functional.linear(zero_dropped(x, kept), a.to(x.dtype)).mul_(scaling)
        _rows(y).addmm_(_rows(low), b.to(x.dtype).t())
    return y, low


def gradients(
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    base: list[Tensor],
    spec: str,
    in_features: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    kept: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B, those not needed empty."""
    grad_x, grad_a, grad_b = (grad.new_empty(0), a.new_empty(0), b.new_empty(0))
    with no_autocast(grad):
        back_NR = (_rows(grad) @ b.to(grad.dtype)).mul_(scaling)
        if needed[0]:
            grad_x = operand.input_gradient(grad, base, spec, in_features).contiguous()
            _add_to_input(grad_x, back_NR, a.to(grad.dtype), kept)
        if needed[1]:
            grad_a = (back_NR.t() @ _rows(zero_dropped(x, kept))).to(a.dtype)
        if needed[2]:
            # The short side first: oneDNN is a third faster so.
            grad_b = (_rows(low).t() @ _rows(grad)).t().to(b.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_x, grad_a, grad_b


def _add_to_input(grad_x: Tensor, back_NR: Tensor, a_RI: Tensor, kept: Tensor | None) -> None:
    if kept is None:
        _rows(grad_x).addmm_(back_NR, a_RI)
    else:
        grad_x.add_(zero_dropped((back_NR @ a_RI).view_as(grad_x), kept))


def _rows(x_BX: Tensor) -> Tensor:
    """Leading dimensions flattened; a view of a contiguous tensor."""
    return x_BX.reshape(-1, x_BX.shape[-1])


@torch.library.register_fake("finetune::lora_linear")
def _linear_fake(
    x: Tensor, bias: Tensor | None, base: list[Tensor], spec: str, out_features: int, a: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty([*x.shape[:-1], out_features]), x.new_empty([*x.shape[:-1], a.shape[0]])


@torch.library.register_fake("finetune::lora_gradients")
def _gradients_fake(
    grad: Tensor, x: Tensor, low: Tensor, base: list[Tensor], spec: str, in_features: int, a: Tensor, b: Tensor,
    scaling: float, kept: Tensor | None, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    whole = ([*grad.shape[:-1], in_features], a.shape, b.shape)
    shapes = [shape if need else [0] for shape, need in zip(whole, needed, strict=True)]
    return grad.new_empty(shapes[0]), a.new_empty(shapes[1]), b.new_empty(shapes[2])


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], *more: Tensor | None) -> None:
    """Keep what the backward needs, and more that another one needs, which comes first."""
    x, _, base, spec, _, a, b, scaling, kept = inputs
    low = output[1]
    ctx.save_for_backward(*more, x, low, a, b, kept, *base)
    ctx.settings = (spec, x.shape[-1], scaling)


def _backward(ctx: Any, grad_BO: Tensor, _: Any) -> tuple[Any, ...]:
    return backward(ctx, grad_BO, ctx.saved_tensors, ctx.needs_input_grad)


def backward(ctx: Any, grad_BO: Tensor, saved: Any, needs: Any) -> tuple[Any, ...]:
    """Gradients of the operator's arguments.

    Args:
        saved: by `save`, without what is another's.
        needs: which of the arguments need one.
    """
    x, low, a, b, kept, *base = saved
    spec, in_features, scaling = ctx.settings
    need_x, need_bias, _, _, _, need_a, need_b, _, _ = needs
    needed = [need_x, need_a, need_b]
    found = torch.ops.finetune.lora_gradients(grad_BO, x, low, base, spec, in_features, a, b, scaling, kept, needed)
    grad_x, grad_a, grad_b = (grad if need else None for grad, need in zip(found, needed, strict=True))
    grad_bias = _rows(grad_BO).sum(dim=0) if need_bias else None
    return grad_x, grad_bias, [None] * len(base), None, None, grad_a, grad_b, None, None


class _Recorded(torch.autograd.Function):
    """The operator as eager autograd records it. What `register_autograd` makes for an operator that takes a list costs
    0.17 ms a call more, which is 3 % of a small model's step."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = torch.ops.finetune.lora_linear(*inputs)
        save(ctx, inputs, output)
        # Some formats flatten the leading dimensions; what is no view may be written over by what comes next.
        return output[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Any, ...]:
        grad_x, grad_bias, _, *rest = _backward(ctx, grad_BO, None)
        return grad_x, grad_bias, None, *rest


torch.library.impl("finetune::lora_linear", "default")(linear)
torch.library.impl("finetune::lora_gradients", "default")(gradients)
torch.library.register_autograd("finetune::lora_linear", _backward, setup_context=save)
