"""The second device as torch knows it; see device.cpp."""

from __future__ import annotations

import sys
import types

import torch

DEVICE = "hpu:0"


def install(library: str) -> None:
    """Make the device known to torch, with what a backend offers in Python."""
    torch.ops.load_library(library)
    module = types.ModuleType("torch.hpu")
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    torch.hpu = sys.modules["torch.hpu"] = module  # type: ignore[attr-defined]
