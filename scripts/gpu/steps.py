"""A training step of a 7B-shaped Llama: QLoRA here, bf16 LoRA here, PEFT + bitsandbytes; same LoRA, data and AdamW."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

RANK = 16
LENGTH = 2048
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Engine = tuple[list[nn.Parameter], Callable[[torch.Tensor], torch.Tensor]]


def ours(size: str, device: torch.device) -> Engine:
    """finetune, NF4 with double quantization."""
    from finetune.quant.nf4 import NF4Config

    return _finetune(size, NF4Config(), device)


def ours_bf16(size: str, device: torch.device) -> Engine:
    """finetune, dense bfloat16 base."""
    from finetune.quant.dense import DenseConfig

    return _finetune(size, DenseConfig(), device)


def _finetune(size: str, quant: Any, device: torch.device) -> Engine:
    from finetune.model.exchange import exchange
    from gpu.models import adapted, random_llama, sft_loss

    model = random_llama(size, quant, device)
    exchange(model)
    return adapted(model.train(), RANK, "bf16"), sft_loss(model)


def peft_bitsandbytes(size: str, device: torch.device) -> Engine:
    """PEFT over bitsandbytes' NF4 with double quantization, as its users run it."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    from finetune.quant.dense import DenseConfig, DenseLinear
    from gpu.models import random_llama

    model = random_llama(size, DenseConfig(), device)
    for name, module in list(model.named_modules()):
        if isinstance(module, DenseLinear):
            linear = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
            )
            linear.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            model.set_submodule(name, linear.to(device))
    model.is_loaded_in_4bit = True
    torch.manual_seed(2)
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=TARGETS)
    model = get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return trained, lambda ids: model(input_ids=ids, labels=ids).loss


ENGINES: dict[str, Callable[[str, torch.device], Engine]] = {
    "finetune NF4": ours,
    "finetune bf16": ours_bf16,
    "PEFT + bitsandbytes NF4": peft_bitsandbytes,
}


def measure(engine: str, size: str, tokens: tuple[int, ...], device: torch.device, steps: int = 5) -> dict[int, Any]:
    """Median seconds a step, after two to warm up, and the losses, for each number of tokens."""
    from gpu.models import token_ids

    parameters, loss_of = ENGINES[engine](size, device)
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=device.type == "cuda")
    found = {}
    for count in tokens:
        length = min(LENGTH, count)
        ids = token_ids(size, count // length, length, device)
        seconds, losses = [], []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps + 2):
            start = time.perf_counter()
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(round(float(loss.detach()), 4))  # waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        step = statistics.median(seconds[2:])
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        found[count] = {"seconds": step, "tokens_per_second": count / step, "losses": losses, "peak_gib": peak}
    return found


def compare(size: str, tokens: tuple[int, ...], emit: Callable[..., None], device: torch.device) -> None:
    """All engines one after another; the ratios as soon as both sides are there."""
    found: dict[str, dict[int, Any]] = {}
    for engine in ENGINES:
        try:
            found[engine] = measure(engine, size, tokens, device)
        except Exception as error:  # a rival that is not installed must not cost our own figures
            emit("note", f"{engine}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        emit("detail", f"step_{engine}", size=size, tokens={str(count): row for count, row in found[engine].items()})
        for key, rival in (("step_bf16", "finetune bf16"), ("step_peft", "PEFT + bitsandbytes NF4")):
            if engine == rival and "finetune NF4" in found:
                for count in tokens:
                    ratio = found[rival][count]["seconds"] / found["finetune NF4"][count]["seconds"]
                    emit("value", f"{key}_{count}", value=round(ratio, 3))
