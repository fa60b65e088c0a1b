"""The GPU backend in Triton: for which devices it registers, and what every launch needs.

Triton serves CUDA, ROCm (whose torch says "cuda" as well) and, with Intel's build, XPU. Nothing is imported or probed
before the first tensor on such a device arrives: `register` leaves a small function with the dispatcher that imports
its module then. Without Triton, or with `FINETUNE_TRITON=off`, the reference in plain torch serves these devices too.

Triton's interpreter (`TRITON_INTERPRET=1` in the environment before the import) runs the same kernels on CPU tensors:
called directly, or with `FINETUNE_CPU=off` by the operators.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, where a product of bfloat16 is garbage: operands are upcast first."""
DEVICES = ("cuda", "xpu", *(("cpu",) if INTERPRETED and os.environ.get("FINETUNE_CPU") == "off" else ()))
"""torch's names of the devices that Triton serves: those it compiles for, and in its interpreter a CPU without kernels
of its own."""
EXACT = {"enable_fp_fusion": False}
"""Launch option: no fused multiply-add where separate roundings are promised bit for bit."""


@cache
def why_off() -> str | None:
    """Why Triton's kernels cannot be used on any device; None where they can, as far as that shows without a device.

    Triton builds its launchers with a C compiler on the machine that it runs on.
    """
    if os.environ.get("FINETUNE_TRITON") == "off":
        return "FINETUNE_TRITON=off"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton wants a C compiler, and there is neither gcc nor clang here"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own has no headers; so does Triton choose
    if not Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h").is_file():
        return "Triton wants the headers of Python, and there is no Python.h here"
    return None


def register(operator: str, module: str, function: str) -> None:
    """Make `finetune.kernels.<module>.<function>` serve an operator on the devices of Triton, where Triton can work."""
    if why_off() is not None:
        return

    def serve(*arguments: Any) -> Any:
        return getattr(import_module(f"finetune.kernels.{module}"), function)(*arguments)

    torch.library.impl(f"finetune::{operator}", DEVICES)(serve)


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the device of a tensor, also where another one is current."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The same memory, contiguous and one-dimensional."""
    return tensor.detach().reshape(-1).contiguous()


class Rows(NamedTuple):
    """How a kernel that decodes row by row is launched.

    Attributes:
        grid: rows, pieces of a row.
        block: weights that a program decodes at a time: eight a thread.
        steps: how many times.
    """

    grid: tuple[int, int]
    block: int
    steps: int


def by_rows(out: Tensor) -> Rows:
    """One program a row, or several where it is long."""
    width = out.shape[-1]
    block = min(1024, 1 << (width - 1).bit_length())
    steps = 4 if width >= 4 * block else 1
    return Rows((out.numel() // width, -(-width // (block * steps))), block, steps)
