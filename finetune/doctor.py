"""`finetune doctor`: what a bug report needs, why a backend is off, and what of a model would be adapted."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from finetune.device import cpu_has_bf16
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.model.task import Task

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


def report(config: RunConfig | None = None) -> str:
    """The whole report as text; with a configuration also what of its model its adapter would train."""
    import torch

    lines = [
        "```",
        f"finetune doctor, Python {platform.python_version()} ({sys.executable})",
        f"system: {platform.platform()}",
    ]
    lines.append(f"cores: {os.cpu_count()}, torch threads: {torch.get_num_threads()}")
    lines += [f"{name}: {version}" for name, version in versions().items()]
    lines += [f"{name}: {state}" for name, state in backends().items()]
    if config is not None:
        lines += ["", *describe(config)]
    return "\n".join([*lines, "```"])


def describe(config: RunConfig) -> list[str]:
    """What of a model would be quantized and adapted, from its configuration alone; no weights are read.

    Raises:
        ModelError: where the configuration cannot be read, or makes no model that could be trained.
    """
    from finetune.adaptation import describe as adapted
    from finetune.model.exchange import candidates
    from finetune.model.load import check_path, check_storage
    from finetune.structure import inspect

    check_path(config.model)
    check_storage(config.model, config.quant)
    model, task = _empty(config)
    structure = inspect(model)
    weights = sum(p.numel() for p in model.parameters())
    inside = sum(p.in_features * p.out_features * p.experts for p in structure.projections)
    stored = sum(p.in_features * p.out_features * p.experts for p in structure.projections if not p.dense)
    made_of = f"{len(structure.blocks)} blocks, {len(structure.projections)} projections"
    kind = f"{weights:,} weights as a {task.words}"
    return [
        f"model: {config.model.path}: {kind}, {made_of} with {inside / weights:.1%} of them",
        f"quant={config.quant.name}: {_storage(config, stored / weights)}",
        *adapted(model, config.adapter, config.quant),
        f"open to fused CPU kernels, each tried against the original when loaded: {candidates(model)}",
    ]


def _storage(config: RunConfig, share: float) -> str:
    """What the storage format takes."""
    if config.quant.name in ("none", "dense"):
        return "everything stays in 16 or 32 bits"
    if config.quant.name == "keep":
        from finetune.model.load import storage

        stored = storage(config.model)
        return f"as the checkpoint stores it{f': {stored}' if stored else ''}"
    return f"stores {share:.1%} of the weights; embeddings, norms, routers and heads stay in 16 or 32 bits"


def _empty(config: RunConfig) -> tuple[Any, Task]:
    """The model without weights for the first task that its checkpoint can serve, that of the objective first."""
    from finetune.model.load import skeleton, stored_config
    from finetune.model.task import Task, own_classes
    from finetune.model.task_head import refuse_bidirectional

    stored = stored_config(config.model)
    placeholders = tuple(f"LABEL_{number}" for number in range(max(2, len(stored.get("id2label") or ()))))
    classes = Task("classification", own_classes(stored) or placeholders)
    wanted = classes if config.objective.task == "classification" else Task(config.objective.task)
    first: UserError | None = None
    for task in dict.fromkeys((wanted, Task("seq2seq"), classes)):
        try:
            model = skeleton(config.model, task)
            if task.kind == "causal_lm":
                refuse_bidirectional(model, f"model.path={config.model.path}")
        except UserError as error:
            first = first or error
        else:
            return model, task
    assert first is not None
    raise first
