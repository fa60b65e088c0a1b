"""The compiled kernels of what lies between the products (norm, activation, attention, rotation) on a CPU.

Each takes over its operator's tensors where the library serves their type, and hands everything else to the reference.

Shape suffixes: B rows, S positions, H query heads, G key/value heads, Q queries, K keys, D features of a head,
M leading dimensions flattened, N features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from finetune.kernels import activation, attention, native, norm, rope

_pointer, _int, _int64, _float, _bool = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_bool
_SIGNATURES = {
    "ft_rms_norm": [_int64, _int64, _pointer, _int, _pointer, _int, _float, _float, _pointer, _pointer, _int],
    "ft_rms_norm_backward": [
        *(_int64, _int64, _pointer, _pointer, _int, _pointer, _int, _pointer, _float, _pointer, _pointer, _int)
    ],
    "ft_act_mul": [_int64, _int64, _pointer, _int64, _pointer, _int64, _int, _int, _pointer, _int],
    "ft_act_mul_backward": [
        *(_int64, _int64, _pointer, _pointer, _int64, _pointer, _int64, _int, _int, _pointer, _pointer, _int)
    ],
    "ft_rope": [_pointer, _pointer, _int64, _pointer, _pointer, _pointer, _int, _bool, _pointer, _int],
    "ft_attention": [*[_pointer] * 6, _bool, _float, _pointer, _pointer, _int],
    "ft_attention_backward": [*[_pointer] * 6, _bool, _float, *[_pointer] * 6, _int],
}
_ACTIVATIONS = {name: number for number, name in enumerate(activation.ACTIVATIONS)}
_WIDEST_HEAD = 256


@cache
def _library() -> ctypes.CDLL:
    """The library with the signatures of this file's functions set."""
    found = native.library()
    assert found is not None
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, _bool
    return found


def _served(*tensors: Tensor) -> bool:
    """Whether tensors are of the one type that the plain loops are compiled for."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.bfloat16) and all(tensor.dtype == dtype for tensor in tensors)


def _integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


# ---- RMSNorm


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    if not (_served(x) and weight.dtype in (x.dtype, torch.float32)):
        return norm.reference(x, weight, eps, offset)
    x, weight = x.contiguous(), weight.contiguous()
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    kinds = native.DTYPES[x.dtype], native.DTYPES[weight.dtype]
    _library().ft_rms_norm(
        *(inverse.numel(), x.shape[-1], x.data_ptr(), kinds[0], weight.data_ptr(), kinds[1]),
        *(eps, offset, out.data_ptr(), inverse.data_ptr(), native.threads()),
    )
    return out, inverse


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    if not (_served(x, grad) and weight.dtype in (x.dtype, torch.float32)):
        return norm.reference_backward(grad, x, weight, inverse, offset, weight_grad)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    grad_weight = weight.new_empty(weight.shape if weight_grad else 0, dtype=torch.float32)
    kinds = native.DTYPES[x.dtype], native.DTYPES[weight.dtype]
    _library().ft_rms_norm_backward(
        *(inverse.numel(), x.shape[-1], grad.data_ptr(), x.data_ptr(), kinds[0], weight.data_ptr(), kinds[1]),
        *(inverse.data_ptr(), offset, grad_x.data_ptr(), grad_weight.data_ptr() if weight_grad else None),
        native.threads(),
    )
    return grad_x, grad_weight.to(weight.dtype)


# ---- Gated activations


def _rows(tensor: Tensor) -> Tensor:
    """A view [M, N] whose features are contiguous; a copy where there is no such view."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def _act_mul(gate: Tensor, up: Tensor, name: str) -> Tensor:
    if not _served(gate, up):
        return activation.reference(gate, up, name)
    gate_MN, up_MN, out = _rows(gate), _rows(up), gate.new_empty(gate.shape)
    _library().ft_act_mul(
        *(*gate_MN.shape, gate_MN.data_ptr(), gate_MN.stride(0), up_MN.data_ptr(), up_MN.stride(0)),
        *(native.DTYPES[gate.dtype], _ACTIVATIONS[name], out.data_ptr(), native.threads()),
    )
    return out


def _act_mul_backward(grad: Tensor, gate: Tensor, up: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not _served(gate, up, grad):
        return activation.reference_backward(grad, gate, up, name)
    grad, gate_MN, up_MN = grad.contiguous(), _rows(gate), _rows(up)
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _library().ft_act_mul_backward(
        *(*gate_MN.shape, grad.data_ptr(), gate_MN.data_ptr(), gate_MN.stride(0), up_MN.data_ptr(), up_MN.stride(0)),
        *(native.DTYPES[gate.dtype], _ACTIVATIONS[name], grad_gate.data_ptr(), grad_up.data_ptr(), native.threads()),
    )
    return grad_gate, grad_up


# ---- Rotary position embedding


def _rope(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    if not _served(x, cos, sin) or x.dim() != 4 or cos.dim() != 3:
        return rope.reference(x, cos, sin, transposed)
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin, out = cos.contiguous(), sin.contiguous(), x.new_empty(x.shape)
    table_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    sizes, strides = _integers(*x.shape, cos.shape[-1]), _integers(*x.stride()[:3])
    pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
    _library().ft_rope(
        sizes, strides, table_batch, *pointers, native.DTYPES[x.dtype], transposed, out.data_ptr(), native.threads()
    )
    return out


# ---- Attention


def serves_attention(query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, scale: float) -> bool:
    """Whether the compiled attention takes these tensors: bf16 on a CPU that multiplies it, heads of one width."""
    return (
        native.level() in ("avx512_bf16", "amx")
        and query_BHQD.dtype == key_BGKD.dtype == value_BGKD.dtype == torch.bfloat16
        and query_BHQD.shape[-1] == value_BGKD.shape[-1] <= _WIDEST_HEAD
        and query_BHQD.numel() > 0
        and key_BGKD.numel() > 0
        and scale > 0
    )


def _heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if not serves_attention(query, key, value, scale):
        return attention.reference(query, key, value, mask, causal, scale)
    B, H, Q, D = query.shape
    query, key, value, mask = _heads(query), _heads(key), _heads(value), _mask(mask)
    out, log_sum = query.new_empty(B, Q, H, D), query.new_empty(B, H, Q, dtype=torch.float32)
    sizes, strides = _geometry(query, key, value, mask, out)
    pointers = query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr()
    done = _library().ft_attention(
        sizes, _integers(*strides), *pointers, causal, scale, out.data_ptr(), log_sum.data_ptr(), native.threads()
    )
    return (out, log_sum) if done else attention.reference(query, key, value, mask, causal, scale)


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if not (serves_attention(query, key, value, scale) and grad.dtype == query.dtype):
        return attention.reference_backward(grad, query, key, value, mask, causal, scale, out, log_sum)
    query, key, value, mask, grad = _heads(query), _heads(key), _heads(value), _mask(mask), _heads(grad)
    results = tuple(attention.empty_heads(tensor) for tensor in (query, key, value))
    sizes, strides = _geometry(query, key, value, mask, out)
    strides += [grad.stride(0), grad.stride(2), grad.stride(1)]
    strides += [stride for result in results for stride in result.stride()[:3]]
    pointers = query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr()
    tensors = (tensor.data_ptr() for tensor in (out, log_sum, grad, *results))
    done = _library().ft_attention_backward(
        sizes, _integers(*strides), *pointers, causal, scale, *tensors, native.threads()
    )
    if not done:
        return attention.reference_backward(grad, query, key, value, mask, causal, scale, out, log_sum)
    return results[0], results[1], results[2]


def _mask(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()


def _geometry(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor
) -> tuple[ctypes.Array[ctypes.c_int64], list[int]]:
    """Sizes, and strides of what both directions read, in the order of csrc/attention.cpp."""
    B, H, Q, D = query.shape
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:3]]
    strides += [out.stride(0), out.stride(2), out.stride(1)]
    strides += [0, 0] if mask is None else [mask.stride(0), mask.stride(2)]
    return _integers(B, H, key.shape[1], Q, key.shape[2], D), strides


_KERNELS: dict[str, Callable[..., object]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "act_mul": _act_mul,
    "act_mul_backward": _act_mul_backward,
    "rope": _rope,
    "attention": _attention,
    "attention_backward": _attention_backward,
}

if native.library() is not None:
    for _name, _kernel in _KERNELS.items():
        torch.library.impl(f"finetune::{_name}", "cpu")(_kernel)
