"""`finetune doctor`: what a bug report needs, and why a backend is off."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys

from finetune.device import cpu_has_bf16

PACKAGES = (
    "finetune-kit",
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "peft",
    "hydra-core",
    "wandb",
    "triton",
    "numpy",
)


def versions() -> dict[str, str]:
    """Installed version of every package that matters; "not installed" where it is absent."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def backends() -> dict[str, str]:
    """Each backend with "on" or the reason why it is off."""
    import torch

    from finetune.kernels import native, triton_backend

    reason, no_triton = native.why_off(), triton_backend.why_off()
    waits = "on" if torch.cuda.is_available() else "ready, but torch sees no GPU"
    state = {
        "torch reference kernels": "on",
        "compiled CPU kernels": f"off: {reason}" if reason else f"on: {native.level()}",
        "Triton kernels": f"off: {no_triton}" if no_triton else waits,
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        state["cuda"] = f"on: {torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    elif torch.version.cuda is None and torch.version.hip is None:
        state["cuda"] = "off: this torch was built without CUDA or ROCm"
    else:
        state["cuda"] = "off: torch sees no device (driver missing, or CUDA_VISIBLE_DEVICES empty)"
    state["bfloat16 on the CPU"] = (
        "on" if cpu_has_bf16() else "off: no AVX512-BF16 or AMX; train.dtype=auto is fp32 here"
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its hints about optional hub kernels are no faults
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        state["bitsandbytes"] = f"off: {type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        state["bitsandbytes"] = (
            "on" if torch.cuda.is_available() else "on for exports; 8-bit and paged optimizers need CUDA"
        )
    state["Weights & Biases"] = wandb_state()
    return state


def wandb_state() -> str:
    """Whether runs would be uploaded."""
    import netrc

    if os.environ.get("WANDB_MODE") in ("disabled", "offline"):
        return f"offline: WANDB_MODE={os.environ['WANDB_MODE']}"
    if os.environ.get("WANDB_API_KEY"):
        return "on: WANDB_API_KEY is set"
    try:
        logged_in = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    return "on: logged in" if logged_in else "offline: not logged in (`wandb login`)"


def report(model_path: str | None = None) -> str:
    """The whole report as text; with `model_path` also what the model is made of."""
    import torch

    lines = [
        "```",
        f"finetune doctor, Python {platform.python_version()} ({sys.executable})",
        f"system: {platform.platform()}",
    ]
    lines.append(f"cores: {os.cpu_count()}, torch threads: {torch.get_num_threads()}")
    lines += [f"{name}: {version}" for name, version in versions().items()]
    lines += [f"{name}: {state}" for name, state in backends().items()]
    if model_path is not None:
        lines += ["", *describe(model_path)]
    return "\n".join([*lines, "```"])


def describe(model_path: str) -> list[str]:
    """What of a model would be quantized and adapted, from its configuration alone; no weights are read."""
    from finetune.model.check import check_path
    from finetune.model.config import ModelConfig
    from finetune.model.exchange import candidates
    from finetune.model.load import skeleton
    from finetune.structure import inspect

    config = ModelConfig(path=model_path)
    check_path(config)
    model = skeleton(config)
    structure = inspect(model)
    weights = sum(p.numel() for p in model.parameters())
    adapted = sum(p.in_features * p.out_features * p.experts for p in structure.projections)
    tied = " (tied)" if structure.tied else ""
    share = f"{adapted:,} weights ({adapted / weights:.1%}) in {len(structure.projections)} projections"
    lines = [
        f"model: {model_path}: {weights:,} weights, {len(structure.blocks)} blocks, head {structure.head}{tied}",
        f"quantized and open to LoRA: {share}; in the first block:",
    ]
    lines += [
        f"  {p.name}: {p.kind} {p.in_features} -> {p.out_features}"
        + (f" x {p.experts} experts" if p.experts > 1 else "")
        for p in structure.projections
        if p.block == 0
    ]
    return [*lines, f"open to fused CPU kernels, each tried against the original when loaded: {candidates(model)}"]
