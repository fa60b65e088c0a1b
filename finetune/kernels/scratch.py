"""Memory that products borrow for a decoded weight: one buffer a device and stream, reused by every layer.

A decoded weight lives from its decoding to the end of one product. On a GPU both are launched on the same stream, so
that the next layer's decoding cannot begin before this product has read the buffer: order on the stream is what makes
sharing safe, and why each stream has a buffer of its own. Two threads may launch on one stream (autograd's worker
beside the main thread): a lock is held from the first launch to the last. Under the capture of a CUDA graph nothing is
shared: the graph keeps the address for ever, so it gets memory of its own pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from finetune.kernels.products import owned


class _Buffer:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.bytes: Tensor | None = None


_buffers: dict[tuple[torch.device, int], _Buffer] = {}
_creating = threading.Lock()


@contextmanager
def borrowed(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor to decode into and multiply by before the context ends; nothing may keep it."""
    if _capturing(device):
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    key = (device, _stream(device))
    with _creating:
        buffer = _buffers.setdefault(key, _Buffer())
    size = prod(shape) * dtype.itemsize
    with buffer.lock:
        if buffer.bytes is None or buffer.bytes.numel() < size:
            buffer.bytes = None  # let go of the old one first: both together might not fit
            with torch.inference_mode(False):  # a buffer made in inference mode could not be used outside
                buffer.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        yield buffer.bytes[:size].view(dtype).view(tuple(shape))


def release() -> None:
    """Give all buffers back to torch's allocator."""
    with _creating:
        _buffers.clear()


def held_bytes() -> int:
    """Bytes that the buffers take."""
    return sum(buffer.bytes.numel() for buffer in _buffers.values() if buffer.bytes is not None)


def _stream(device: torch.device) -> int:
    if device.type == "cpu":
        return threading.get_ident()
    return int(torch.get_device_module(device).current_stream(device).stream_id)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def linear_by_scratch(
    x_BI: Tensor,
    bias_O: Tensor | None,
    shape: tuple[int, int],
    decode_into: Callable[..., None],
    storage: Sequence[Any],
) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` by the vendor's product, the weight [O, I] decoded into borrowed memory first."""
    with borrowed(shape, x_BI.dtype, x_BI.device) as w_OI, torch.autocast(x_BI.device.type, enabled=False):
        decode_into(w_OI, *storage)
        return owned(torch.nn.functional.linear(x_BI, w_OI, bias_O))


def gradient_by_scratch(
    grad_BO: Tensor, shape: tuple[int, int], decode_into: Callable[..., None], storage: Sequence[Any]
) -> Tensor:
    """`grad_BO @ w_OI` likewise."""
    with borrowed(shape, grad_BO.dtype, grad_BO.device) as w_OI, torch.autocast(grad_BO.device.type, enabled=False):
        decode_into(w_OI, *storage)
        return grad_BO @ w_OI
