"""Where a run computes, and in which dtype."""

from __future__ import annotations

import atexit
import os
from typing import Any

from finetune.errors import ConfigError


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        ConfigError: naming the device and what there is.
    """
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device}, but torch sees no CUDA device (`finetune doctor` says why); use device=cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is mps, but torch sees no Metal device; use device=cpu")


def make_accelerator(device: str) -> Any:
    """accelerate's view of the processes and of this one's device; at exit the processes part in good order."""
    from accelerate import Accelerator

    _forget_another(device)
    if ":" in device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.num_processes > 1:
        # Gloo's threads may still hold tensors of the last sum: to let go of them while Python shuts down aborts it.
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def _forget_another(device: str) -> None:
    """Let accelerate choose anew where an earlier call, as from a notebook, settled on another device.

    It keeps the first device for the life of the process: batches would go there, whatever device the model is on.
    """
    import torch
    from accelerate.state import AcceleratorState, PartialState

    settled = PartialState._shared_state.get("device")
    if settled is None or PartialState().num_processes > 1 or device == "auto":
        return
    wanted = torch.device(device)
    if settled.type != wanted.type or wanted.index not in (None, settled.index or 0):
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        AcceleratorState._reset_state(reset_partial_state=True)


def resolve_dtype(name: str, device: Any) -> str:
    """bf16, fp16 or fp32; `auto` is bf16 where the device computes in it."""
    import torch

    if name != "auto":
        return name
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if kind == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    return "fp32"


def torch_dtype(name: str) -> Any:
    """torch's dtype for bf16, fp16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    import torch

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
