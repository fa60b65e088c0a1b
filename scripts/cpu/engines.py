"""Frozen linear layers by whoever makes them: each is built from the same float32 weight [O, I] and takes x [M, I].

An engine whose package is missing, or which fails, is left out with a line that says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpu.timing import BASE

Build = Callable[[Tensor], nn.Module]
ENGINES: dict[str, Build] = {}


def engine(name: str) -> Callable[[Build], Build]:
    """Give an engine its name."""

    def keep(build: Build) -> Build:
        ENGINES[name] = build
        return build

    return keep


@engine(BASE)
def dense(w_OI: Tensor) -> nn.Module:
    """nn.Linear in bfloat16."""
    module = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
    module.weight = nn.Parameter(w_OI.bfloat16(), requires_grad=False)
    return module


def ours(name: str, **settings: object) -> Build:
    """A storage format of finetune by its name in `conf/quant`."""

    def build(w_OI: Tensor) -> nn.Module:
        from finetune.quant.base import QUANTIZERS

        config = QUANTIZERS.type_of(name)(**settings)
        module: nn.Module = QUANTIZERS.build(config, *w_OI.shape, dtype=torch.bfloat16, device="cpu")
        module.store(w_OI.bfloat16())  # type: ignore[operator]
        return module

    return build


engine("finetune nf4")(ours("nf4"))
engine("finetune int8")(ours("int8", threshold=0.0))
engine("finetune llm.int8")(ours("int8", threshold=6.0))
for _name in ("int8g", "int4", "int3", "int2", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
    engine(f"finetune {_name}")(ours(_name))


@engine("bitsandbytes nf4")
def bitsandbytes_nf4(w_OI: Tensor) -> nn.Module:
    """Linear4bit with double quantization, as ours."""
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(w_OI.shape[1], w_OI.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    module.weight = bnb.nn.Params4bit(w_OI.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return module.to("cpu")  # type: ignore[no-any-return]


def _bitsandbytes_int8(w_OI: Tensor, threshold: float) -> nn.Module:
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    options = {"has_fp16_weights": False}
    module = bnb.nn.Linear8bitLt(w_OI.shape[1], w_OI.shape[0], bias=False, threshold=threshold, **options)
    module.weight = bnb.nn.Int8Params(w_OI.bfloat16(), requires_grad=False, **options)
    return module.to("cpu")  # type: ignore[no-any-return]


@engine("bitsandbytes int8")
def bitsandbytes_int8(w_OI: Tensor) -> nn.Module:
    """Linear8bitLt without outlier columns."""
    return _bitsandbytes_int8(w_OI, 0.0)


@engine("bitsandbytes llm.int8")
def bitsandbytes_llm_int8(w_OI: Tensor) -> nn.Module:
    """Linear8bitLt with outliers from 6."""
    return _bitsandbytes_int8(w_OI, 6.0)


@engine("torchao int8")
def torchao_int8(w_OI: Tensor) -> nn.Module:
    """Weight-only int8, a scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = nn.Sequential(dense(w_OI))
    quantize_(module, Int8WeightOnlyConfig())
    return module


def build(names: list[str], w_OI: Tensor, skip: Callable[[str, str], None]) -> dict[str, nn.Module]:
    """The engines that can be built here; `skip(name, reason)` hears of the others."""
    built = {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built[name] = ENGINES[name](w_OI)
        except Exception as error:  # whatever another library raises
            skip(name, f"{type(error).__name__}: {error}".splitlines()[0])
    return built
