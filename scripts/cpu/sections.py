"""What is measured, a function each: they run in a process of their own and hand on rows for the result file.

Shape suffixes: M rows of the input, O out features, I in features.
"""

# ruff: noqa: B023 - what is defined in a loop is called before the loop goes on

from __future__ import annotations

import hashlib
import statistics
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpu.around import around
from cpu.engines import build
from cpu.timing import BASE, Call, clock, interleaved, speed

Emit = Callable[..., None]
SHAPES = ((2048, 2048), (4096, 4096))
LINEAR = (4096, 4096)
FEW, MANY = (1, 2, 4, 8, 16, 64, 512, 1024), (8, 64, 512, 1024)
NF4 = [BASE, "finetune nf4", "bitsandbytes nf4"]
INT8 = [
    BASE, "finetune int8", "finetune llm.int8", "bitsandbytes int8", "bitsandbytes llm.int8", "torchao int8",
]  # fmt: skip
GROUPS = [BASE, "finetune int8g", "finetune int4", "finetune int3", "finetune int2"]
BLOCKS = [BASE, *(f"finetune {kind}" for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"))]


def weight(shape: tuple[int, int]) -> Tensor:
    """float32 [O, I] as a model is initialised, the same for every engine and process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def dequantize(options: Namespace, emit: Emit) -> None:
    """One engine decodes NF4 to bfloat16 (or fills as many values: the limit), a fresh output at every call."""
    for shape in SHAPES:
        for double_quant in (False, True):
            call = decoder(options.engine, shape, double_quant)
            digest = hashlib.sha256(call().view(torch.uint8).numpy()).hexdigest()
            sample = interleaved({"": call}, clock(options.threads), options.rounds, options.seconds)[""]
            emit(
                engine=options.engine,
                shape=shape,
                double_quant=double_quant,
                milliseconds=statistics.median(sample) * 1e3,
                digest=digest,
            )


def decoder(engine: str, shape: tuple[int, int], double_quant: bool) -> Callable[[], Tensor]:
    """How an engine decodes a weight of a shape; `fill` writes as many bytes."""
    if engine == "fill":
        return lambda: torch.empty(shape, dtype=torch.bfloat16).fill_(1.0)
    w_OI = weight(shape).bfloat16()
    if engine == "finetune":
        from finetune.kernels import ops

        stored = ops.quantize_4bit(w_OI, "nf4", 64, double_quant)
        return lambda: ops.dequantize_4bit(*stored, "nf4", 64, list(shape), torch.bfloat16)
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(w_OI, quant_type="nf4", compress_statistics=double_quant)
    return lambda: bnb.dequantize_4bit(packed, state)  # type: ignore[no-any-return]


def quantize(options: Namespace, emit: Emit) -> None:
    """Encoding a bfloat16 weight to NF4, ours beside bitsandbytes', without and with double quantization."""
    import bitsandbytes.functional as bnb

    from finetune.kernels import ops

    w_OI = weight(SHAPES[0]).bfloat16()
    for double_quant in (False, True):
        calls: dict[str, Call] = {
            "finetune": lambda: ops.quantize_4bit(w_OI, "nf4", 64, double_quant),
            "bitsandbytes": lambda: bnb.quantize_4bit(w_OI, quant_type="nf4", compress_statistics=double_quant),
        }
        mine, (theirs, state) = calls["finetune"](), calls["bitsandbytes"]()
        same = torch.equal(mine.codes_P1.flatten(), theirs.flatten()) and torch.equal(mine[1], state.absmax)
        samples = interleaved(calls, clock(options.threads), options.rounds, options.seconds)
        for name, sample in samples.items():
            emit(
                engine=name,
                shape=SHAPES[0],
                double_quant=double_quant,
                weights_per_second=w_OI.numel() / statistics.median(sample),
                speed=speed(sample, samples["bitsandbytes"]),
                same_bits=same,
            )


def linear(options: Namespace, emit: Emit) -> None:
    """A frozen linear layer in inference, and forward plus gradient of the input."""
    names = {"nf4": NF4, "int8": INT8, "groups": GROUPS, "blocks": BLOCKS}[options.family]
    rows = {"nf4": FEW, "int8": (1, 8, 64, 512, 1024)}.get(options.family, (1, 8, 512))
    if options.quick:
        rows = tuple(count for count in rows if count in (1, 8, 512))
    w_OI = weight(LINEAR)
    modules = build(names, w_OI, lambda name, reason: emit(engine=name, skipped=reason))
    # Training first: a forward without a graph makes bitsandbytes 0.50.2 repack its weight, and gradients end there.
    for mode in ("training", "inference"):
        for count in rows:
            if mode == "training" and count not in MANY:
                continue
            _products(options, emit, w_OI, {n: m.train(mode == "training") for n, m in modules.items()}, mode, count)


def _products(options: Namespace, emit: Emit, w_OI: Tensor, modules: dict[str, Any], mode: str, count: int) -> None:
    """One number of rows in one mode, all engines in turn."""
    x_MI = torch.randn(count, w_OI.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact_MO = x_MI.float() @ w_OI.T
    grad_MO = torch.ones(count, w_OI.shape[0], dtype=torch.bfloat16)

    def call(module: Any) -> Call:
        if mode == "inference":
            return lambda: _without_graph(module, x_MI)
        leaf_MI = x_MI.clone().requires_grad_()
        return lambda: torch.autograd.grad(module(leaf_MI), leaf_MI, grad_MO)[0]

    calls, errors = {}, {}
    for name, module in modules.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y_MO = _without_graph(module, x_MI) if mode == "inference" else module(x_MI.clone().requires_grad_())
                errors[name] = float((y_MO.float() - exact_MO).norm() / exact_MO.norm())
                calls[name] = call(module)
                calls[name]()
        except Exception as error:  # whatever another library raises
            calls.pop(name, None)
            emit(engine=name, mode=mode, m=count, skipped=f"{type(error).__name__}: {error}".splitlines()[0])
    samples = interleaved(calls, clock(options.threads), options.rounds, options.seconds)
    for name, sample in samples.items():
        emit(
            engine=name,
            shape=LINEAR,
            mode=mode,
            m=count,
            milliseconds=statistics.median(sample) * 1e3,
            speed=speed(sample, samples[BASE]),
            relative_error=errors[name],
        )


@torch.no_grad()
def _without_graph(module: Any, x_MI: Tensor) -> Any:
    return module(x_MI)


SECTIONS: dict[str, Callable[[Namespace, Emit], None]] = {
    "dequantize": dequantize,
    "quantize": quantize,
    "linear": linear,
    "around": around,
}
