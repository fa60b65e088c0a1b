"""What surrounds the products, on a GPU: RMSNorm, gated activations and rotary embedding, each in one pass over memory.

The operators and their formulas are those of kernels/norm.py, activation.py and rope.py; everything is computed in
float32 and rounded once.

Shape suffixes: M rows (all leading dimensions), N features, B rows of a batch, S positions, H heads, D features of a
head, R of them rotated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels import activation as activations
from finetune.kernels import norm
from finetune.kernels.triton_backend import by_rows, on

WIDEST = 32768
"""Features of a row that one program holds at most; wider ones go to the reference."""


@triton.jit
def _rms_norm(x, weight, y, inverse, N, eps, offset, BLOCK: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    wide = tl.load(x + row * N + column, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / N + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + row * N + column, (wide * r * w).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, r)


@triton.jit
def _rms_norm_backward(grad, x, weight, inverse, grad_x, N, offset, BLOCK: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    wide = tl.load(x + row * N + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    through = tl.load(grad + row * N + column, mask=inside, other=0.0).to(tl.float32) * w
    r = tl.load(inverse + row)
    mean = tl.sum(through * wide, axis=0) / N
    tl.store(grad_x + row * N + column, (r * (through - wide * mean * r * r)).to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _activated(wide, KIND: tl.constexpr):
    """act(x) and its derivative; KIND as in `activations.ACTIVATIONS`."""
    if KIND == 0:
        s = tl.sigmoid(wide)
        value = wide * s
        slope = s * (1 + wide * (1 - s))
    elif KIND == 1:
        cdf = 0.5 * (1 + tl.erf(wide * 0.7071067811865476))
        value = wide * cdf
        slope = cdf + wide * tl.exp(-0.5 * wide * wide) * 0.3989422804014327  # 1 / sqrt(2 pi)
    else:
        s = tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))  # 2 sqrt(2 / pi)
        value = wide * s
        slope = s + value * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * wide * wide)
    return value, slope


@triton.jit
def _act_mul(gate, up, y, N, gate_stride, up_stride, KIND: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Grid: rows, pieces of a row."""
    row = tl.program_id(0).to(tl.int64)
    for step in tl.static_range(STEPS):
        column = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        value, _ = _activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), KIND)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * N + column, (value * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _act_mul_backward(
    grad, gate, up, grad_gate, grad_up, N, gate_stride, up_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    for step in tl.static_range(STEPS):
        column = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        value, slope = _activated(
            tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), KIND
        )
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row * N + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_gate + row * N + column, (g * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + row * N + column, (g * value).to(grad_up.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    x, cos, sin, y, S, H, b_stride, s_stride, h_stride, cos_stride, D: tl.constexpr, R: tl.constexpr,
    TRANSPOSED: tl.constexpr, BH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Grid: positions of all rows, groups of BH heads."""
    position = tl.program_id(0).to(tl.int64)
    b, s = position // S, position % S
    head = tl.program_id(1) * BH + tl.arange(0, BH)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < H) & (column < R // 2)
    source = x + b * b_stride + s * s_stride + head * h_stride
    target = y + (position * H + head) * D
    angle = b * cos_stride + s * R + column
    c1 = tl.load(cos + angle, mask=column < R // 2, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + R // 2, mask=column < R // 2, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=column < R // 2, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + R // 2, mask=column < R // 2, other=0.0).to(tl.float32)
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + column + R // 2, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        one, two = first * c1 + second * s2, second * c2 - first * s1
    else:
        one, two = first * c1 - second * s1, second * c2 + first * s2
    tl.store(target + column, one.to(y.dtype.element_ty), mask=inside)
    tl.store(target + column + R // 2, two.to(y.dtype.element_ty), mask=inside)
    if R < D:
        rest = R + tl.arange(0, REST)[None, :]
        kept = (head < H) & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=kept, other=0.0), mask=kept)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`finetune::rms_norm`."""
    width = x.shape[-1]
    if not 0 < width <= WIDEST:
        return norm.reference(x, weight, eps, offset)
    x = x.contiguous()
    y = torch.empty_like(x)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        with on(x):
            block = triton.next_power_of_2(width)
            _rms_norm[(inverse.numel(),)](
                x, weight.contiguous(), y, inverse, width, eps, offset, block, num_warps=_warps(block)
            )
    return y, inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """`finetune::rms_norm_backward`; a weight that trains is rare and goes to the reference."""
    width = x.shape[-1]
    if weight_grad or not 0 < width <= WIDEST:
        return norm.reference_backward(grad, x, weight, inverse, offset, weight_grad)
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel():
        with on(x):
            block = triton.next_power_of_2(width)
            _rms_norm_backward[(inverse.numel(),)](
                grad, x, weight.contiguous(), inverse, grad_x, width, offset, block, num_warps=_warps(block)
            )
    return grad_x, weight.new_empty(0)


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`finetune::act_mul`."""
    gate_MN, up_MN = _rows(gate), _rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        rows = by_rows(y)
        with on(y):
            _act_mul[rows.grid](
                gate_MN, up_MN, y, y.shape[-1], gate_MN.stride(0), up_MN.stride(0), _kind(activation), rows.block,
                rows.steps,
            )  # fmt: skip
    return y


def act_mul_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`finetune::act_mul_backward`."""
    gate_MN, up_MN, grad = _rows(gate), _rows(up), grad.contiguous()
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if grad.numel():
        rows = by_rows(grad)
        with on(grad):
            _act_mul_backward[rows.grid](
                grad, gate_MN, up_MN, grad_gate, grad_up, grad.shape[-1], gate_MN.stride(0), up_MN.stride(0),
                _kind(activation), rows.block, rows.steps,
            )  # fmt: skip
    return grad_gate, grad_up


def rope(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """`finetune::rope`; x is [B, S, H, D] with any strides but for a last one of 1."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, positions, heads, width = x.shape
    turned = cos.shape[-1]
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    together = min(8, triton.next_power_of_2(heads))
    half, rest = triton.next_power_of_2(turned // 2), triton.next_power_of_2(max(1, width - turned))
    stride = 0 if cos.shape[0] == 1 else cos.stride(0)
    with on(x):
        _rope[(rows * positions, -(-heads // together))](
            x, cos, sin, y, positions, heads, *x.stride()[:3], stride, width, turned, transposed, together, half, rest
        )
    return y


def _rows(tensor: Tensor) -> Tensor:
    """[M, N] with columns side by side; a copy only where no view is."""
    flat_MN = tensor.reshape(-1, tensor.shape[-1])
    return flat_MN if flat_MN.stride(1) == 1 else flat_MN.contiguous()


def _kind(activation: str) -> int:
    return list(activations.ACTIVATIONS).index(activation)


def _warps(block: int) -> int:
    return max(4, min(16, block // 1024))
